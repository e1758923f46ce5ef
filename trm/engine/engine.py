"""Continuous batching in depth: one thread, one model, many requests at different steps.

A tick is one supervision step over every row that is inside the recursion, wherever it stands.
A row that reaches its effort chooses a token, passes the backbone and starts again at step 0
while the others go on. Requests come in through `submit` from any thread; news goes out as
events, from the engine's thread. Every accepted request ends in exactly one final event.
"""

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import psutil
import torch

from trm.chat import ChatFormat
from trm.engine.detokenizer import TextStream
from trm.engine.drafting import Drafter
from trm.engine.handle import Handle, Reservation
from trm.engine.prefix import Prefix
from trm.engine.request import Event, FinishReason, Follow, Reply, Request, Stats, TokenLogprobs, TokenTrace, Usage
from trm.engine.runner import Halting, Runner, Span
from trm.engine.sampling import candidates, choose, token_logprobs
from trm.engine.scheduler import Copy, Row, Scheduler
from trm.errors import BadRequest, ConfigError, DeviceError, InternalError, TRMError
from trm.model import TRMForCausalLM

logger = logging.getLogger(__name__)

DEFAULT_CACHE_SHARE = 0.25  # of the memory that is free when the engine starts
CLOSE_S = 5.0  # that a step which has begun may take, when the engine closes
STATE_EFFORT_LIMIT = 2  # times the trained depth: with keys from the state every step costs cache


@dataclass(frozen=True)
class EngineConfig:
    """Sizes of the engine.

    max_rows: rows decoded together. max_model_len: positions of one request, prompt and reply; None for
    the model's, or what fits into the cache. max_queue: requests that may wait. kv_cache_bytes: None for a
    quarter of the free memory at most. prefill_chunk: prompt positions cached per tick, padding included.
    max_draft_tokens: tokens that the backbone may draft for the recursion to verify at once, where that
    pays; 0 for none. max_step_s: longer than this no step takes unless the device hangs; 0 for no limit.
    """

    max_rows: int = 32
    max_model_len: int | None = None
    max_queue: int = 256
    kv_cache_bytes: int | None = None
    prefill_chunk: int = 256
    max_draft_tokens: int = 7
    max_step_s: float = 300.0

    def __post_init__(self) -> None:
        for name, least in (
            ("max_rows", 1),
            ("max_queue", 0),
            ("prefill_chunk", 1),
            ("max_draft_tokens", 0),
            ("max_model_len", 2),
            ("kv_cache_bytes", 1),
            ("max_step_s", 0),
        ):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ConfigError(f"{name} is {value}; it must be at least {least}")


class Engine:
    """Owns the model from `start` to `close`. `step` may be called directly where no thread is started."""

    def __init__(self, model: TRMForCausalLM, chat: ChatFormat, config: EngineConfig | None = None) -> None:
        self.model = model.eval()
        self.chat = chat
        self.config = config = config or EngineConfig()
        limit = model.config.max_supervision
        if model.config.kv_source == "state":
            limit = min(limit, STATE_EFFORT_LIMIT * model.config.n_supervision)
        self.max_supervision: int = limit
        self.bytes_per_token = Runner.bytes_per_position(model, limit)
        self.max_model_len = self._fit_length()
        self.runner = Runner(model, config.max_rows, self.max_model_len, limit, config.max_draft_tokens)
        self.scheduler = Scheduler(config.max_rows, config.max_queue, model.config.kv_source == "state")
        self.drafter = Drafter(self.runner.measure(), config.max_draft_tokens) if config.max_draft_tokens else None
        self._streams: dict[Row, TextStream] = {}
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._closing = False
        self._dead = False
        self._step_began: float | None = None  # of the step that the thread is in, by the monotonic clock
        self._steps = self._row_places = self._ticks = self._row_steps = self._backbone_calls = 0
        self._prompt_tokens = self._cached_tokens = self._generation_tokens = 0
        self._draft_tokens = self._accepted_tokens = 0

    # --- callers' side, any thread -------------------------------------------------------------

    def start(self) -> None:
        """Start the thread that owns the model, once."""
        if self._thread is not None:
            raise RuntimeError("the engine's thread is started already")
        self._thread = threading.Thread(target=self._run, name="trm-engine", daemon=True)
        self._thread.start()

    def check(self, request: Request) -> int:
        """Supervision steps that a request asks for. Raises BadRequest where it could never be served.

        Does not look at the prompt's tokens, see `_read`.
        """
        if request.positions > self.max_model_len:
            raise BadRequest(
                f"the prompt has {len(request.prompt_ids)} tokens and max_tokens is {request.params.max_tokens}, "
                f"together {request.positions}; this server takes {self.max_model_len}",
                param=request.prompt_field,
                code="context_length_exceeded",
            )
        vocabulary = self.model.config.vocab_size
        steps = (
            self.model.config.n_supervision if request.params.n_supervision is None else request.params.n_supervision
        )
        if not 0 <= steps <= self.max_supervision:
            raise BadRequest(
                f"supervision_steps is {steps}; this server takes 0 to {self.max_supervision}",
                param="supervision_steps",
            )
        params = request.params
        if params.halts and self.model.config.kv_source == "state":
            raise BadRequest(
                "this model takes keys and values from the state: a token that stopped early would leave holes "
                "in the cache; leave halt_threshold and halt_tolerance out",
                param="halt_tolerance" if params.halt_threshold is None else "halt_threshold",
            )
        if not all(0 <= token < vocabulary for token, _ in params.logit_bias):
            raise BadRequest(f"logit_bias names token ids outside 0 to {vocabulary - 1}", param="logit_bias")
        for name, wanted in (("logprobs", params.logprobs), ("trace", params.trace)):
            if (wanted or 0) > vocabulary:
                raise BadRequest(f"the model knows {vocabulary} tokens; ask for no more of them", param=name)
        return steps

    def reserve(self, count: int) -> Reservation:
        """Keep places for so many requests, all or none, until they are submitted: now is the time to prepare them.

        Raises BadRequest, Overloaded, or DeviceError where the engine is closed.
        """
        with self._changed:
            self._check_open()
            self.scheduler.reserve(count)
        return Reservation(count, self._give_back)

    def submit(
        self,
        requests: Sequence[Request],
        on_event: Callable[[int, Event], None] | None = None,
        reservation: Reservation | None = None,
    ) -> list[Handle]:
        """Accept all requests or none, in the places of `reservation` if there is one; those left over are given back.

        `on_event(index, event)` is called in the engine's thread and must not block; without it, events
        wait in the handles. Raises BadRequest, Overloaded, or DeviceError where the engine is closed.
        """
        prefixes: dict[int, Prefix] = {}  # by the identity of the prompt, which samples share
        handles = []
        for index, request in enumerate(requests):
            steps, prompt = self.check(request), request.prompt_ids
            if id(prompt) not in prefixes:
                prefixes[id(prompt)] = self._read(request)
            emit = None if on_event is None else partial(on_event, index)
            handles.append(Handle(request, steps, emit, prefixes[id(prompt)].fork()))
        rows = [handle.row for handle in handles]
        streams = {row: TextStream(self.chat, row.request.params.stop) for row in rows}
        with self._changed:
            self._check_open()
            if reservation is None:
                self.scheduler.submit(rows)
            else:
                if len(rows) > reservation.count:
                    raise ValueError(f"{len(rows)} requests for {reservation.count} reserved places")
                self.scheduler.submit(rows, reservation.count)
                reservation.count = 0
            self._streams.update(streams)
            self._changed.notify()
        return handles

    def generate(self, requests: Sequence[Request]) -> list[Reply]:
        """Replies in the order of the requests, which may be more than the queue holds at once.

        Meant for an engine that serves nobody else; beside other callers it may raise Overloaded.
        """
        at_once = self.config.max_rows + self.config.max_queue
        replies = []
        for start in range(0, len(requests), at_once):
            handles = self.submit(requests[start : start + at_once])
            while self._thread is None and self.step():
                pass
            replies += [handle.result() for handle in handles]
        return replies

    def stats(self) -> Stats:
        """Gauges and counters now."""
        with self._changed:
            running, waiting = list(self.scheduler.running), len(self.scheduler.waiting)
        reserved = sum(row.request.positions for row in running)
        return Stats(
            requests_running=len(running),
            requests_waiting=waiting,
            kv_cache_usage_ratio=reserved / (self.config.max_rows * self.max_model_len),
            kv_cache_bytes=self.bytes_per_token * self.config.max_rows * self.max_model_len,
            kv_cache_bytes_per_token=self.bytes_per_token,
            steps=self._steps,
            row_places=self._row_places,
            ticks=self._ticks,
            row_steps=self._row_steps,
            backbone_calls=self._backbone_calls,
            prompt_tokens=self._prompt_tokens,
            cached_tokens=self._cached_tokens,
            generation_tokens=self._generation_tokens,
            draft_tokens=self._draft_tokens,
            accepted_tokens=self._accepted_tokens,
        )

    def alive(self) -> bool:
        """Whether the engine can still serve what it accepts. After a step that was too long it can again."""
        began, limit = self._step_began, self.config.max_step_s
        hangs = began is not None and 0 < limit < time.monotonic() - began
        return not self._dead and not hangs and self._thread is not None and self._thread.is_alive()

    def close(self, drain_s: float = 0.0) -> bool:
        """Take no more requests, give the accepted ones up to `drain_s` seconds, cancel the rest, end the thread.

        Returns whether the thread has ended. It has not where a call of the model still hangs after CLOSE_S more.
        """
        with self._changed:
            self._closing = True
            self._changed.notify()
        deadline = time.monotonic() + drain_s
        while self._thread is not None and self._thread.is_alive() and time.monotonic() < deadline:
            self._thread.join(0.05)
        with self._changed:
            for row in (*self.scheduler.running, *self.scheduler.waiting):
                row.cancelled = True
            self._changed.notify()
        if self._thread is None:
            while self.step():
                pass
            return True
        self._thread.join(CLOSE_S)
        return not self._thread.is_alive()

    def _read(self, request: Request) -> Prefix:
        """Look at all tokens of a prompt, which takes a while if they are many. Raises BadRequest for unknown ones."""
        prompt, vocabulary = request.prompt_ids, self.model.config.vocab_size
        if not prompt:
            raise BadRequest("the prompt is empty", param=request.prompt_field)
        if not 0 <= min(prompt) <= max(prompt) < vocabulary:
            raise BadRequest(f"the prompt holds token ids outside 0 to {vocabulary - 1}", param=request.prompt_field)
        return Prefix(prompt)

    def _check_open(self) -> None:
        if self._closing or self._dead:
            raise DeviceError("the engine is shut down; it takes no more requests")

    def _give_back(self, reservation: Reservation) -> None:
        with self._changed:
            self.scheduler.reserved -= reservation.count
            reservation.count = 0

    # --- the engine's side, one thread -----------------------------------------------------------

    def step(self) -> bool:
        """Advance every row by one tick. Returns whether there is anything left to do."""
        with self._changed:
            gone = self.scheduler.cancelled()
        for row in gone:
            self._finish(row, "cancelled")
        with self._changed:
            copies = self.scheduler.admit()
            unfinished = len(self.scheduler.running) + len(self.scheduler.waiting)
        if unfinished:
            self._steps += 1
            self._row_places += min(self.config.max_rows, unfinished)
        for copy in copies:
            self._call([copy.row], partial(self._take_over, copy))
        self._prefill()
        self._feed()
        self._tick()
        self._answer()
        with self._changed:
            return bool(self.scheduler.running or self.scheduler.waiting)

    def _take_over(self, copy: Copy) -> None:
        """Give a row the prefix that a slot holds; where that is not finite, the row computes its own."""
        row, length = copy.row, copy.length
        if copy.source != row.slot:
            if not self.runner.finite(copy.source, length, row.steps):
                return
            self.runner.copy(copy.source, row.slot, length, row.steps)
        row.cached = row.cached_tokens = length

    def _prefill(self) -> None:
        """Cache the next prompt tokens of rows that have some left."""
        if chosen := self.scheduler.prefilling(self.config.prefill_chunk):
            rows = [row for row, _ in chosen]
            spans = [Span(row.slot, row.cached, count) for row, count in chosen]
            tokens = [row.request.prompt_ids[row.cached : row.cached + count] for row, count in chosen]
            if self._call(rows, lambda: self.runner.prefill(spans, tokens, [row.steps for row in rows])):
                self._backbone_calls += 1
                for row, count in chosen:
                    row.cached += count

    def _feed(self) -> None:
        """Pass the next token of rows that are ready through the backbone, and what it drafts behind it."""
        rows = self.scheduler.feeding()
        if not rows or not self._pass(rows, [row.token for row in rows], offset=0):
            return
        for row in rows:
            row.thinking, row.step, row.draft, row.halted_at, row.seen = True, 0, [], [], []
        self._trace(rows)
        length = self.drafter.length(rows, len(self.scheduler.running)) if self.drafter else 0
        for offset in range(1, length + 1):
            rows = [row for row in rows if row.room_for_draft >= offset]
            if not rows or not self._call(rows, partial(self._draft, rows)):
                return
            rows = [row for row in rows if len(row.draft) == offset]
            if not rows or not self._pass(rows, [row.draft[-1] for row in rows], offset):
                return

    def _draft(self, rows: Sequence[Row]) -> None:
        """Choose each row's next draft as its token would be chosen, but from the backbone's own logits."""
        logits = self.runner.logits([row.slot for row in rows], len(rows[0].draft))[:, 0]
        for row, *answer in zip(rows, logits, logits.argmax(dim=-1).tolist(), _finite(logits), strict=True):
            self._call([row], partial(self._draft_token, row, *answer))

    def _draft_token(self, row: Row, logits: torch.Tensor, best: int, finite: bool) -> None:
        """Add a token to a row's draft, unless the reply would end there."""
        if not finite:
            return
        follow = row.matcher.follow(row.draft) if row.matcher else None
        if follow and (follow.complete or follow.failure):
            return
        token = _next_token(row, logits, best, row.draft, follow)
        if token != self.chat.end_id or row.request.params.ignore_eos:
            row.draft.append(token)

    def _pass(self, rows: Sequence[Row], tokens: Sequence[int], offset: int) -> bool:
        """One backbone call for one token of each row, `offset` places behind the chosen one."""
        slots, positions = [row.slot for row in rows], [row.cached + offset for row in rows]
        if self._call(rows, lambda: self.runner.feed(slots, positions, tokens, offset)):
            self._backbone_calls += 1
            return True
        return False

    def _tick(self) -> None:
        """One supervision step for every row that has any left."""
        rows = self.scheduler.thinking()
        if not rows:
            return
        spans = [Span(row.slot, row.cached, 1 + len(row.draft)) for row in rows]
        steps = [row.step for row in rows]
        limits = None
        if any(row.request.params.halts for row in rows):
            limits = [Halting.of(row.request.params) for row in rows]
        halted: list[list[bool]] = []
        if not self._call(rows, lambda: halted.extend(self.runner.tick(spans, steps, limits))):
            return
        self._ticks += 1
        self._row_steps += len(rows)
        self.scheduler.clock += 1
        for row in rows:
            row.step += 1
        for row, stopped in zip(rows, halted, strict=limits is not None):
            row.note_halted(stopped)
        self._trace(rows)

    def _trace(self, rows: Sequence[Row]) -> None:
        """Note the candidates of rows that are traced, where they think on; those of the last step lead to a token."""
        rows = [row for row in rows if row.request.params.trace is not None and not row.answered]

        def note() -> None:
            for row, logits in zip(rows, self.runner.logits([row.slot for row in rows]), strict=True):
                row.seen.append(candidates(logits[0], row.request.params.trace or 0))

        if rows:
            self._call(rows, note)

    def _answer(self) -> None:
        """Choose the tokens of rows that have had their steps; emit, and finish those that are done."""
        rows = self.scheduler.answered()
        if not rows:
            return
        logits: list[torch.Tensor] = []
        count = 1 + max(len(row.draft) for row in rows)
        if not self._call(rows, lambda: logits.append(self.runner.logits([row.slot for row in rows], count=count))):
            return
        finite, best = _finite(logits[0]), logits[0].argmax(dim=-1).tolist()
        for row, *answers in zip(rows, logits[0], best, finite, strict=True):
            self._call([row], partial(self._choose, row, *answers))

    def _choose(self, row: Row, logits: torch.Tensor, best: Sequence[int], finite: Sequence[bool]) -> None:
        """Choose a row's token, and the ones behind it as long as they are what was drafted.

        logits (C, V), their argmax and whether they are finite, at the positions of the row's span.
        """
        params, stream, follow = row.request.params, self._streams[row], None
        ids: list[int] = []
        text = ""
        logprobs: list[TokenLogprobs] = []
        traces: list[TokenTrace] = []
        reason: FinishReason | None = None
        error: TRMError | None = None
        places = 1 + len(row.draft)
        for place in range(places):
            if not finite[place]:
                error = DeviceError("the model gave a logit that is not finite; the request was ended")
                break
            if row.matcher:
                follow = row.matcher.follow()
                if follow.failure:
                    error = BadRequest(
                        f"response_format: after {len(row.reply)} tokens {follow.failure}", param="response_format"
                    )
                    break
            token = _next_token(row, logits[place], best[place], (), follow)
            ids.append(token)
            text += stream.push(token)
            if params.logprobs is not None:
                logprobs.append(token_logprobs(logits[place], token, params.logprobs))
            if params.trace is not None:
                traces.append((*row.seen, candidates(logits[place], params.trace)))
            row.take(token)
            row.cached += 1
            row.supervision_steps += row.steps_taken(place)
            if (token == self.chat.end_id and not params.ignore_eos) or stream.stopped or _completes(row, token):
                reason = "stop"
            elif len(row.reply) >= params.max_tokens:
                reason = "length"
            if reason or place == len(row.draft) or token != row.draft[place]:
                break
        row.passes += 1
        row.pass_steps += row.step
        self._count(row, ids)
        if row.draft and not all(finite[:places]):
            # A draft that overflowed poisons the tokens before it, even masked: go on without drafts.
            self.runner.clear(row.slot, row.cached, row.cached + places)
            row.may_draft, error = False, None
        row.thinking, row.draft = False, []
        said = Event(tuple(ids), text, None, _usage(row), logprobs=tuple(logprobs), traces=tuple(traces))
        if reason:
            self._finish(row, reason, said)
            return
        if ids:
            self._emit(row, said)
        if error:
            self._fail(row, error)

    def _count(self, row: Row, ids: Sequence[int]) -> None:
        """Book the tokens that a row has just got, and what became of its draft."""
        accepted = sum(token == drafted for token, drafted in zip(ids, row.draft, strict=False))
        if ids and len(row.reply) == len(ids):
            self._prompt_tokens += len(row.request.prompt_ids)
            self._cached_tokens += row.cached_tokens
        self._generation_tokens += len(ids)
        self._draft_tokens += len(row.draft)
        self._accepted_tokens += accepted
        row.draft_tokens += len(row.draft)
        row.accepted_tokens += accepted
        if self.drafter is not None:
            self.drafter.learn(row, judged=min(len(ids), len(row.draft)), accepted=accepted)

    def _call(self, rows: Sequence[Row], run: Callable[[], None]) -> bool:
        """Do something for some rows; where it fails, those rows fail and the engine goes on.

        Raises DeviceError, and so ends the engine, where the device computes no more.
        """
        try:
            run()
            return True
        except Exception as error:
            logger.exception("a step of %d rows failed", len(rows))
            self.runner.probe()
            for row in rows:
                self._fail(row, _told(error))
            return False

    def _fail(self, row: Row, error: TRMError) -> None:
        self._finish(row, "error", error=error)

    def _finish(self, row: Row, reason: FinishReason, said: Event | None = None, error: TRMError | None = None) -> None:
        """Free the row's slot and send its final event, which brings what is yet to be `said`.

        What lies in the slot stays for others, if finite logits have shown that it is finite; at effort 0
        nobody has read the keys from the context yet.
        """
        keep = bool(row.reply) and error is None
        if keep and row.steps == 0:
            keep = self.runner.finite(row.slot, row.cached, row.steps)
        if row.slot >= 0 and not keep:
            self.runner.clear(row.slot, 0, row.request.positions)
        elif row.slot >= 0 and reason == "cancelled":
            self.runner.clear(row.slot, row.cached, row.cached + 1 + len(row.draft))
        with self._changed:
            self.scheduler.release(row, keep)
            stream = self._streams.pop(row)
        said = said or Event()
        text = said.text
        try:
            text += "" if error else stream.finish()
            if reason == "length" and stream.stopped:  # by what has become text only now
                reason = "stop"
        except Exception as failure:
            logger.exception("the end of a reply could not be decoded")
            reason, error = "error", _told(failure)
        self._emit(row, replace(said, text=text, finish_reason=reason, usage=_usage(row), error=error))

    def _emit(self, row: Row, event: Event) -> None:
        """Tell the listener. One that raises loses its request, not everybody's."""
        try:
            row.emit(event)
        except BaseException:  # even what would end a thread of its own
            logger.exception("a listener failed; its request is cancelled")
            row.cancelled = True

    def _run(self) -> None:
        """The thread: step while there is work, sleep while there is none, and let nobody wait for ever."""
        try:
            while True:
                with self._changed:
                    while not (self.scheduler.running or self.scheduler.waiting):
                        if self._closing:
                            return
                        self._changed.wait()
                self._step_began = time.monotonic()
                self.step()
                self._step_began = None
        except BaseException as failure:  # whatever it was: nobody may wait for ever
            logger.exception("the engine's thread died")
            self._dead = True
            with self._changed:
                left = [*self.scheduler.running, *self.scheduler.waiting]
                for row in left:
                    self.scheduler.release(row)
            for row in left:
                died = type(_told(failure))("the engine died; see the server's log")
                self._emit(row, Event(finish_reason="error", usage=_usage(row), error=died))

    def _fit_length(self) -> int:
        """Positions per slot: what is asked for, bounded by the model and by the cache's bytes."""
        config, longest = self.config, self.model.config.max_position_embeddings
        budget = config.kv_cache_bytes
        if budget is None:
            budget = int(_free_bytes(self.model.device) * DEFAULT_CACHE_SHARE)
        fits = budget // (self.bytes_per_token * config.max_rows)
        wanted = config.max_model_len
        if wanted is not None and wanted > longest:
            raise ConfigError(f"max_model_len is {wanted}; the model has positions for {longest}")
        if fits < (wanted or 2):
            raise ConfigError(
                f"the cache of {budget} bytes holds {fits} positions for each of {config.max_rows} rows "
                f"({self.bytes_per_token} bytes each); {wanted or 2} are needed: "
                "lower max_rows or max_model_len, or raise kv_cache_bytes"
            )
        return wanted or min(longest, fits)


def _told(failure: BaseException) -> TRMError:
    """What a request learns of an exception that ended it: whether the device failed, or a bug of ours did.

    Torch tells of its failures, and of those of the device, by RuntimeError and its own children of it.
    """
    if isinstance(failure, TRMError):
        return failure
    what = f"{type(failure).__name__}; the server's log has the details"
    ours = isinstance(failure, NotImplementedError | RecursionError)
    if isinstance(failure, RuntimeError | MemoryError) and not ours:
        return DeviceError(f"the device failed in a call of the model: {what}")
    return InternalError(f"decoding failed on a bug of the server: {what}")


def _next_token(row: Row, logits: torch.Tensor, best: int, draft: Sequence[int], follow: Follow | None) -> int:
    """The token behind a row's reply and `draft`. logits (V,), and `best` their argmax."""
    request = row.request
    if request.params.plain_greedy and (follow is None or follow.allows(best)):
        return best
    reply = [*row.reply, *draft] if draft else row.reply
    return choose(logits, request.params, request.prompt_ids, reply, None if follow is None else follow.mask)


def _completes(row: Row, token: int) -> bool:
    """Tell a row's grammar of the token it got, if it has one; whether nothing may follow."""
    if row.matcher is None:
        return False
    row.matcher.advance(token)
    return row.matcher.follow().complete


def _usage(row: Row) -> Usage:
    return Usage(
        prompt_tokens=len(row.request.prompt_ids),
        completion_tokens=len(row.reply),
        supervision_steps=row.supervision_steps,
        cached_tokens=row.cached_tokens,
        draft_tokens=row.draft_tokens,
        accepted_tokens=row.accepted_tokens,
        queue_s=row.queue_s,
    )


def _finite(logits: torch.Tensor) -> list[Any]:
    """Whether all of the logits (…, V) are finite: nested lists of bool."""
    low, high = logits.aminmax(dim=-1)  # neither hides a NaN
    return (low.isfinite() & high.isfinite()).tolist()


def _free_bytes(device: torch.device) -> int:
    """Memory that is free now, on the device that the cache will lie on."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)
