"""Continuous batching in depth: one thread, one backbone, many requests at different steps.

A tick is one supervision step over every row that is inside the recursion, wherever it stands.
A row that reaches its effort chooses a token, passes the backbone and starts again at step 0
while the others go on. Requests come in through `submit` from any thread; news goes out as
events, from the engine's thread. Every accepted request ends in exactly one final event.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import psutil
import torch

from trm.chat import ChatFormat
from trm.engine.detokenizer import TextStream
from trm.engine.drafting import Drafter
from trm.engine.handle import Handle, Reservation
from trm.engine.hosted import Hosted
from trm.engine.loop import Loop
from trm.engine.prefix import Prefix
from trm.engine.request import Event, Reply, Request, Stats
from trm.engine.runner import CHECKED_SLOTS, COST_POSITIONS, Runner
from trm.engine.scheduler import Scheduler
from trm.engine.slots import WIDTH
from trm.engine.static import StaticRunner, default_buckets
from trm.errors import BadRequest, ConfigError, DeviceError, UnknownModel
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
    quarter of the free memory at most. prefill_chunk: prompt positions cached per tick.
    max_draft_tokens: tokens that the backbone may draft for the recursion to verify at once, where that
    pays; 0 for none. max_step_s: longer than this no step takes unless the device hangs; 0 for no limit.
    row_buckets: numbers of rows that calls are filled up to; None for powers of two on a GPU, where each becomes one
    launch, and for calls of any size on a CPU.
    """

    max_rows: int = 32
    max_model_len: int | None = None
    max_queue: int = 256
    kv_cache_bytes: int | None = None
    prefill_chunk: int = 256
    max_draft_tokens: int = 7
    max_step_s: float = 300.0
    row_buckets: tuple[int, ...] | None = None

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
        buckets = self.row_buckets
        if buckets is not None and (not buckets or buckets[0] < 1 or list(buckets) != sorted(set(buckets))):
            raise ConfigError(f"row_buckets is {list(buckets)}; it must rise from at least 1, as 1,2,4,8 does")


class Engine:
    """Owns the model from `start` to `close`. `step` may be called directly where no thread is started.

    `others`: further decoders on the model's backbone, by the names that requests choose them by. The cache is as
    wide as the widest of all needs it.
    """

    def __init__(
        self,
        model: TRMForCausalLM,
        chat: ChatFormat,
        config: EngineConfig | None = None,
        others: Mapping[str, Hosted] | None = None,
    ) -> None:
        self.model = model.eval()
        self.chat = chat
        self.config = config = config or EngineConfig()
        self.decoders: dict[str | None, Hosted] = {None: host(model, chat)}
        self.decoders.update((others or {}).items())
        self._buckets = config.row_buckets
        if self._buckets is None and model.device.type == "cuda":
            self._buckets = default_buckets(config.max_rows, config.max_draft_tokens)
        self._runner_type = Runner if self._buckets is None else StaticRunner
        self._entries = max(decoder.entries() for decoder in self.decoders.values())
        self.bytes_per_token = Runner.bytes_per_position(model, self._entries)
        self.max_model_len = self._fit_length()
        self._changed = threading.Condition()
        with self._enough_memory():
            runner = self._runner(model, config.max_rows, self.max_model_len, self._entries, config.max_draft_tokens)
            for decoder in self.decoders.values():
                self._try(decoder)
            runner.exact = self.decoders[None].exact
            runner.prepare()
        self.dtype = str(model.backbone.dtype).removeprefix("torch.")
        self.loop = Loop(
            runner,
            Scheduler(config.max_rows, config.max_queue),
            config.prefill_chunk,
            chat.end_id,
            self._changed,
        )
        self._thread: threading.Thread | None = None
        self._closing = False
        self._dead = False
        self._step_began: float | None = None  # of the step that the thread is in, by the monotonic clock

    @property
    def max_supervision(self) -> int:
        """The most supervision steps that a request may ask its own model for."""
        return self.decoders[None].max_supervision

    @property
    def exact(self) -> bool:
        """Whether replies are the same to the bit in any company, whoever decodes them."""
        return all(decoder.exact for decoder in list(self.decoders.values()))

    # --- callers' side, any thread -------------------------------------------------------------

    def start(self) -> None:
        """Start the thread that owns the model, once."""
        if self._thread is not None:
            raise RuntimeError("the engine's thread is started already")
        self._thread = threading.Thread(target=self._run, name="trm-engine", daemon=True)
        self._thread.start()

    def decoder(self, name: str | None) -> Hosted:
        """The decoder of a name, None for the model's own. Raises UnknownModel."""
        found = self.decoders.get(name)
        if found is None:
            raise UnknownModel(f"decoder {name!r} is not loaded")
        return found

    def load(self, name: str, decoder: Hosted) -> None:
        """Take a decoder in, while others decode. It is tried in the caller's thread.

        Raises ConfigError for a name that is taken, and for a decoder that needs more of the cache or the device's
        memory than there is.
        """
        if decoder.entries() > self._entries:
            raise ConfigError(
                f"decoder {name!r} needs {decoder.entries()} cache entries for the recursion; this engine was started "
                f"with {self._entries}: name the decoder when it starts"
            )
        with self._enough_memory():
            self._try(decoder)
        with self._changed:
            if name in self.decoders:
                raise ConfigError(f"decoder {name!r} is loaded already; unload it first, or choose another name")
            self.decoders[name] = decoder

    def unload(self, name: str) -> Hosted:
        """Let a decoder take no more requests; those that it has go on, see `rows_of`. Raises UnknownModel."""
        with self._changed:
            decoder = self.decoder(name)
            del self.decoders[name]
            decoder.closed = True
            self.loop.scheduler.forget(decoder)
        return decoder

    def rows_of(self, decoder: Hosted) -> int:
        """How many requests of a decoder run or wait."""
        with self._changed:
            scheduler = self.loop.scheduler
            return sum(row.decoder is decoder for row in (*scheduler.running, *scheduler.waiting))

    def leaving(self, name: str) -> int:
        """How many requests run or wait for a decoder of that name that was unloaded."""
        with self._changed:
            rows = (*self.loop.scheduler.running, *self.loop.scheduler.waiting)
            return sum(row.decoder.closed and row.request.decoder == name for row in rows)

    def check(self, request: Request, decoder: Hosted) -> int:
        """Supervision steps that a request asks `decoder` for. Raises BadRequest where it could never be served.

        Does not look at the prompt's tokens, see `_read`.
        """
        config = decoder.model.config
        if request.positions > self.max_model_len:
            raise BadRequest(
                f"the prompt has {len(request.prompt_ids)} tokens and max_tokens is {request.params.max_tokens}, "
                f"together {request.positions}; this server takes {self.max_model_len}; "
                "shorten the prompt or lower max_tokens",
                param=request.prompt_field,
                code="context_length_exceeded",
            )
        params, vocabulary = request.params, config.vocab_size
        steps: int = config.n_supervision if params.n_supervision is None else params.n_supervision
        if not 0 <= steps <= decoder.max_supervision:
            raise BadRequest(
                f"supervision_steps is {steps}; this server takes 0 to {decoder.max_supervision}",
                param="supervision_steps",
            )
        if params.halts and decoder.depth_matters:
            raise BadRequest(
                "this model (kv_source 'state') cannot halt early: a token that did would leave holes in the cache; "
                "leave halt_threshold and halt_tolerance out",
                param="halt_tolerance" if params.halt_threshold is None else "halt_threshold",
            )
        if not all(0 <= token < vocabulary for token, _ in params.logit_bias):
            raise BadRequest(f"logit_bias names token ids outside 0 to {vocabulary - 1}", param="logit_bias")
        for name, wanted in (("logprobs", params.logprobs), ("trace", params.trace)):
            if (wanted or 0) > vocabulary:
                raise BadRequest(f"{name} is {wanted}; the model has only {vocabulary} tokens", param=name)
        return steps

    def reserve(self, count: int) -> Reservation:
        """Keep places for so many requests, all or none, until they are submitted: now is the time to prepare them.

        Raises BadRequest, Overloaded, or DeviceError where the engine is closed.
        """
        with self._changed:
            self._check_open()
            self.loop.scheduler.reserve(count)
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
            decoder, prompt = self.decoder(request.decoder), request.prompt_ids
            steps = self.check(request, decoder)
            if id(prompt) not in prefixes:
                prefixes[id(prompt)] = self._read(request)
            text = TextStream(decoder.chat, request.params.stop, request.stop_before)
            prefix = prefixes[id(prompt)].fork()
            handles.append(Handle(request, decoder, steps, text, prefix, on_event and partial(on_event, index)))
        rows = [handle.row for handle in handles]
        with self._changed:
            self._check_open()
            if any(row.decoder.closed for row in rows):
                raise UnknownModel("the decoder was unloaded before the request was accepted")
            if reservation is None:
                self.loop.scheduler.submit(rows)
            else:
                if len(rows) > reservation.count:
                    raise ValueError(f"{len(rows)} requests for {reservation.count} reserved places")
                self.loop.scheduler.submit(rows, reservation.count)
                reservation.count = 0
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
            running, waiting = list(self.loop.scheduler.running), len(self.loop.scheduler.waiting)
        reserved = sum(row.request.positions for row in running)
        return Stats(
            requests_running=len(running),
            requests_waiting=waiting,
            kv_cache_usage_ratio=reserved / (self.config.max_rows * self.max_model_len),
            kv_cache_bytes=self.bytes_per_token
            * (self.config.max_rows + self._runner_type.spare)
            * self._runner_type.width(self.model, self.max_model_len),
            kv_cache_bytes_per_token=self.bytes_per_token,
            **vars(self.loop.counters),
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
            for row in (*self.loop.scheduler.running, *self.loop.scheduler.waiting):
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
            self.loop.scheduler.reserved -= reservation.count
            reservation.count = 0

    # --- the engine's side, one thread -----------------------------------------------------------

    def step(self) -> bool:
        """Advance every row by one tick. Returns whether there is anything left to do."""
        return self.loop.step()

    def _run(self) -> None:
        """The thread: step while there is work, sleep while there is none, and let nobody wait for ever."""
        try:
            while True:
                with self._changed:
                    while not self.loop.scheduler.unfinished:
                        if self._closing:
                            return
                        self._changed.wait()
                self._step_began = time.monotonic()
                self.step()
                self._step_began = None
        except BaseException as failure:  # whatever it was: nobody may wait for ever
            logger.exception("the engine's thread died")
            self._dead = True
            self.loop.abandon(failure)

    def _runner(self, model: TRMForCausalLM, *sizes: int) -> Runner:
        """A runner of these sizes, see `Runner`, for the device that the model lies on."""
        return Runner(model, *sizes) if self._buckets is None else StaticRunner(model, *sizes, buckets=self._buckets)

    def _try(self, decoder: Hosted) -> None:
        """Find out whether a decoder's numbers depend on their company, and what its calls cost.

        In slots of its own: others may be decoding.
        """
        sizes = min(CHECKED_SLOTS, self.config.max_rows), min(COST_POSITIONS[-1] + 1, self.max_model_len)
        runner = self._runner(decoder.model, *sizes, decoder.entries(1))
        decoder.exact = runner.check_exact()
        if self.config.max_draft_tokens:
            decoder.drafter = Drafter(runner.measure(), self.config.max_draft_tokens)

    @contextmanager
    def _enough_memory(self) -> Iterator[None]:
        """Raise ConfigError where a GPU's memory runs out."""
        try:
            yield
        except torch.OutOfMemoryError as error:
            config = self.config
            raise ConfigError(
                f"the memory of {self.model.device} holds the model, but not its cache and its calls of up to "
                f"{config.max_rows} rows beside it: lower --max-rows (or --row-buckets) or --kv-cache-bytes"
            ) from error

    def _fit_length(self) -> int:
        """Positions per slot: what is asked for, bounded by the model and by the cache's bytes."""
        config, longest = self.config, self.model.config.max_position_embeddings
        budget = config.kv_cache_bytes
        if budget is None:
            budget = int(_free_bytes(self.model.device) * DEFAULT_CACHE_SHARE)
        fits = budget // (self.bytes_per_token * (config.max_rows + self._runner_type.spare))
        if self._runner_type.width(self.model, 1) > 1:
            fits -= fits % WIDTH
        wanted = config.max_model_len
        if wanted is not None and wanted > longest:
            raise ConfigError(f"max_model_len is {wanted}; this model takes at most {longest}")
        needed = self._runner_type.width(self.model, wanted or 2)
        if fits < needed:
            raise ConfigError(
                f"the cache of {budget} bytes holds {fits} positions for each of {config.max_rows} rows "
                f"({self.bytes_per_token} bytes each); {needed} are needed: "
                "lower max_rows or max_model_len, or raise kv_cache_bytes"
            )
        return wanted or min(longest, fits)


def host(model: TRMForCausalLM, chat: ChatFormat) -> Hosted:
    """A model's decoder, for an engine to decode with."""
    limit: int = model.config.max_supervision
    if model.config.kv_source == "state":
        limit = min(limit, STATE_EFFORT_LIMIT * model.config.n_supervision)
    return Hosted(model.eval(), chat, limit)


def _free_bytes(device: torch.device) -> int:
    """Memory that is free now, on the device that the cache will lie on."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)
