"""The engine's loop: what one step does, for all rows together. One thread runs it.

Asks the scheduler who is next, the runner for the numbers and `choosing` for the tokens, and tells the listeners.
Where a call fails its rows fail, and the others go on. Raises DeviceError where the device computes no more.
"""

import logging
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice

import torch

from trm.engine.choosing import Chosen, ask_draft, ask_reply, take_draft, take_reply
from trm.engine.hosted import Hosted
from trm.engine.request import Event, FinishReason
from trm.engine.row import Pass, Row
from trm.engine.runner import Chunk, Halted, Halting, Runner
from trm.engine.sampling import Answer, Ask, likeliest
from trm.engine.scheduler import Copy, Scheduler
from trm.engine.slots import Span
from trm.errors import DeviceError, InternalError, TRMError

logger = logging.getLogger(__name__)


@dataclass
class Counters:
    """What the loop has done since it began; see `Stats`."""

    steps: int = 0
    row_places: int = 0
    ticks: int = 0
    row_steps: int = 0
    backbone_calls: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generation_tokens: int = 0
    draft_tokens: int = 0
    accepted_tokens: int = 0


class Loop:
    """Advances the rows of a scheduler, which `lock` guards. `end_id` ends a reply."""

    def __init__(
        self,
        runner: Runner,
        scheduler: Scheduler,
        prefill_chunk: int,
        end_id: int,
        lock: threading.Condition,
    ) -> None:
        self.runner = runner
        self.scheduler = scheduler
        self.counters = Counters()
        self._prefill_chunk = prefill_chunk
        self._end_id = end_id
        self._lock = lock

    def step(self) -> bool:
        """Advance every row by one tick. Returns whether there is anything left to do."""
        with self._lock:
            gone = self.scheduler.cancelled()
        for row in gone:
            self._finish(row, "cancelled")
        with self._lock:
            before = len(self.scheduler.running)
            copies = self.scheduler.admit()
            for row in self.scheduler.running[before:]:
                self.runner.seat(row.slot, row.decoder.model)
            unfinished = self.scheduler.unfinished
        if unfinished:
            self.counters.steps += 1
            self.counters.row_places += min(self.scheduler.max_rows, unfinished)
        for copy in copies:
            self._call([copy.row], partial(self._take_over, copy))
        self._encode()
        self._tick()
        self._answer()
        with self._lock:
            return self.scheduler.unfinished > 0

    def abandon(self, failure: BaseException) -> None:
        """End everything that is left, without touching the device: the loop will not step again."""
        with self._lock:
            left = [*self.scheduler.running, *self.scheduler.waiting]
            for row in left:
                self.scheduler.release(row)
        for row in left:
            error = type(as_error(failure))("the engine died; see the server's log")
            self._emit(row, Event(finish_reason="error", usage=row.usage(), error=error))

    # --- the stages of a step --------------------------------------------------------------------

    def _take_over(self, copy: Copy) -> None:
        """Give a row the prefix that a slot holds; where that is not finite, the row computes its own."""
        row, length = copy.row, copy.length
        if copy.source != row.slot:
            entries = row.decoder.entries(row.steps)
            if not self.runner.finite(copy.source, length, entries):
                return
            self.runner.copy(copy.source, row.slot, length, entries)
        row.cached = row.taken.cached_tokens = length

    def _encode(self) -> None:
        """One backbone call for the next parts of prompts and the next tokens of rows that are ready; then drafts."""
        chosen, fed = self.scheduler.prefilling(self._prefill_chunk), self.scheduler.feeding()
        prompts = [
            Chunk(row.slot, row.cached, row.request.prompt_ids[row.cached : row.cached + count], steps=row.steps)
            for row, count in chosen
        ]
        tokens = [Chunk(row.slot, row.cached, (row.token,), place=0) for row in fed]
        prompting = [row for row, _ in chosen]
        if not prompts or not tokens or not self._pass([*prompting, *fed], [*prompts, *tokens], fail=False):
            # Together, or where that fails, apart.
            prompts_done = bool(prompts) and self._pass(prompting, prompts)
            tokens_done = bool(tokens) and self._pass(fed, tokens)
        else:
            prompts_done = tokens_done = True
        if prompts_done:
            for row, count in chosen:
                row.cached += count
        if tokens_done:
            for row in fed:
                row.work = Pass()
            self._trace(fed)
            self._draft_behind(fed)

    def _draft_behind(self, rows: Sequence[Row]) -> None:
        """Let the backbone draft tokens behind those that have just passed it, where that pays."""
        lengths = {}
        for decoder, its in _by_decoder(rows).items():
            running = sum(row.decoder is decoder for row in self.scheduler.running)
            lengths[decoder] = decoder.drafter.length(its, running) if decoder.drafter else 0
        for offset in range(1, max(lengths.values(), default=0) + 1):
            rows = [row for row in rows if min(row.room_for_draft, lengths[row.decoder]) >= offset]
            if not rows or not self._draft(rows, offset - 1):
                return
            drafted = [(row, work.draft[-1]) for row, work in _at_work(rows) if len(work.draft) == offset]
            chunks = [Chunk(row.slot, row.cached + offset, (token,), place=offset) for row, token in drafted]
            rows = [row for row, _ in drafted]
            if not rows or not self._pass(rows, chunks):
                return

    def _draft(self, rows: Sequence[Row], place: int) -> bool:
        """Choose each row's next draft as its token would be chosen, but from the backbone's own logits."""

        def ask(row: Row, work: Pass) -> list[Ask]:
            one = ask_draft(row, work)
            return [] if one is None else [one]

        answered = self._chosen(rows, ask, place)
        for row, work, _, answers in answered or ():
            for answer in answers:
                take_draft(row, work, answer, self._end_id)
        return answered is not None

    def _chosen(
        self, rows: Sequence[Row], ask: Callable[[Row, Pass], list[Ask]], first: int = 0, last: bool = False
    ) -> list[tuple[Row, Pass, list[Ask], list[Answer]]] | None:
        """Choose the tokens that are asked for, at the places of each row's pass from `first` on: all together.

        last: the passes end with it, and the next ones begin with what is chosen.
        Rows that cannot even ask fail alone. Where choosing fails all others do, and None is returned.
        """
        asked: list[tuple[Row, Pass, list[Ask]]] = []

        def note(row: Row, work: Pass) -> None:
            asked.append((row, work, ask(row, work)))

        for row, work in list(_at_work(rows)):
            self._call([row], partial(note, row, work), on_device=False)
        asking = [(row, asks) for row, _, asks in asked if asks]
        answers: list[Answer] = []

        def choose_all() -> None:
            slots = [row.slot for row, asks in asking for _ in asks]
            places = [first + place for _, asks in asking for place in range(len(asks))]
            ahead = [row.position_ahead if last else None for row, asks in asking for _ in asks]
            answers.extend(self.runner.choose(slots, places, [one for _, asks in asking for one in asks], ahead))

        if asking and not self._call([row for row, _ in asking], choose_all):
            return None
        left = iter(answers)
        return [(row, work, asks, list(islice(left, len(asks)))) for row, work, asks in asked]

    def _pass(self, rows: Sequence[Row], chunks: Sequence[Chunk], fail: bool = True) -> bool:
        """One backbone call; where it fails, `rows` do, unless `fail` is False."""
        if self._call(rows, lambda: self.runner.encode(chunks), fail=fail):
            self.counters.backbone_calls += 1
            return True
        return False

    def _tick(self) -> None:
        """One supervision step for every row that has any left, decoder by decoder."""
        done = [self._tick_of(rows) for rows in _by_decoder(self.scheduler.thinking()).values()]
        if any(done):
            self.counters.ticks += 1
            self.scheduler.clock += 1

    def _tick_of(self, rows: Sequence[Row]) -> bool:
        """One supervision step for rows of one decoder; whether it was done."""
        working = list(_at_work(rows))
        spans = [Span(row.slot, row.cached, work.places) for row, work in working]
        steps = [work.step for _, work in working]
        limits = None
        if any(row.request.params.halts for row in rows):
            limits = [Halting.of(row.request.params) for row in rows]

        def tick() -> None:
            halted = self.runner.tick(spans, steps, limits)
            for index, (_, work) in enumerate(working):
                work.step += 1
                earlier, work.unread = work.unread, None
                if halted is not None:
                    work.unread = partial(_note_halted, work, work.step, halted, index)
                if not self.runner.late:
                    earlier, work.unread = work.unread, None
                if earlier is not None:
                    earlier()

        if not self._call(rows, tick):
            return False
        self.counters.row_steps += len(rows)
        self._trace(rows)
        return True

    def _trace(self, rows: Sequence[Row]) -> None:
        """Note the candidates of rows that are traced, where they think on; those of the last step lead to a token."""
        rows = [row for row in rows if row.request.params.trace is not None and not row.answered]

        def note() -> None:
            num = max(row.request.params.trace or 0 for row in rows)
            seen = likeliest(self.runner.logits([row.slot for row in rows]), num)
            for (row, work), found in zip(_at_work(rows), seen, strict=True):
                work.seen.append(found[: row.request.params.trace])

        if rows:
            self._call(rows, note)

    def _answer(self) -> None:
        """Choose the tokens of rows that have had their steps; emit, and finish those that are done."""
        for row, work, asks, answers in self._chosen(self.scheduler.answered(), ask_reply, last=True) or ():
            self._call([row], partial(self._take, row, work, asks, answers), on_device=False)

    def _take(self, row: Row, work: Pass, asks: Sequence[Ask], answers: Sequence[Answer]) -> None:
        """Take the tokens of a row's pass, see `take_reply`; book them and tell of them."""
        chosen = take_reply(row, work, asks, answers, self._end_id)
        self._count(row, work, chosen.ids)
        if work.draft and not all(answer.finite for answer in answers):
            # A draft that overflowed poisons the tokens before it, even masked: go on without drafts.
            self.runner.clear(row.slot, row.cached, row.cached + work.places)
            row.may_draft, chosen.error = False, None
        row.work = None
        said = _event(row, chosen)
        if chosen.reason:
            self._finish(row, chosen.reason, said)
            return
        if chosen.ids:
            self._emit(row, said)
        if chosen.error:
            self._fail(row, chosen.error)

    def _count(self, row: Row, work: Pass, ids: Sequence[int]) -> None:
        """Book a pass: the tokens that the row has just got, and what became of its draft."""
        drafted, accepted = len(work.draft), sum(map(int.__eq__, ids, work.draft))
        counters, taken = self.counters, row.taken
        if ids and len(row.reply) == len(ids):
            counters.prompt_tokens += len(row.request.prompt_ids)
            counters.cached_tokens += taken.cached_tokens
        counters.generation_tokens += len(ids)
        counters.draft_tokens += drafted
        counters.accepted_tokens += accepted
        taken.draft_tokens += drafted
        taken.accepted_tokens += accepted
        taken.passes += 1
        taken.pass_steps += work.step
        if row.decoder.drafter is not None:
            row.decoder.drafter.learn(row, judged=min(len(ids), drafted), accepted=accepted)

    # --- how things end --------------------------------------------------------------------------

    def _call(self, rows: Sequence[Row], run: Callable[[], None], on_device: bool = True, fail: bool = True) -> bool:
        """Do something for some rows; where it fails, those rows fail, unless `fail` is False, and the engine goes on.

        on_device: whether it is a call of the model, and not our own work on what the model gave.

        Raises DeviceError, and so ends the engine, where the device computes no more.
        """
        try:
            run()
            return True
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # a library in Rust that panics raises no Exception
            logger.exception("a step of %d rows failed", len(rows))
            self.runner.probe()
            for row in rows if fail else ():
                self._fail(row, as_error(error, on_device=on_device))
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
            keep = self.runner.finite(row.slot, row.cached, row.decoder.entries(row.steps))
        if row.slot >= 0 and not keep:
            self.runner.clear(row.slot, 0, row.request.positions)
        elif row.slot >= 0 and reason == "cancelled":
            self.runner.clear(row.slot, row.cached, row.cached + (row.work.places if row.work else 1))
        with self._lock:
            if row.slot >= 0:
                self.runner.leave(row.slot)
            self.scheduler.release(row, keep)
        said = said or Event()
        text = said.text
        try:
            text += "" if error else row.stream.finish()
            if reason == "length" and row.stream.stopped:  # by what has become text only now
                reason = "stop"
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as failure:  # as in `_call`
            logger.exception("the end of a reply could not be decoded")
            reason, error = "error", as_error(failure, on_device=False)
        ending = replace(said, text=text, finish_reason=reason, usage=row.usage(), error=error, stop=row.stream.stopped)
        self._emit(row, ending)

    def _emit(self, row: Row, event: Event) -> None:
        """Tell the listener. One that raises loses its request, not everybody's."""
        try:
            row.emit(event)
        except BaseException:  # even what would end a thread of its own
            logger.exception("a listener failed; its request is cancelled")
            row.cancelled = True


def as_error(failure: BaseException, on_device: bool = True) -> TRMError:
    """What a request learns of an exception that ended it: whether the device failed, or a bug of ours did.

    Torch tells of its failures, and of those of the device, by RuntimeError and its own children of it. Outside calls
    of the model a plain RuntimeError is a bug, and only those children are the device's.
    """
    if isinstance(failure, TRMError):
        return failure
    what = f"{type(failure).__name__}; the server's log has the details"
    ours = isinstance(failure, NotImplementedError | RecursionError)
    theirs = RuntimeError if on_device else torch.OutOfMemoryError | torch.AcceleratorError
    if isinstance(failure, theirs | MemoryError) and not ours:
        return DeviceError(f"the device failed in a call of the model: {what}")
    return InternalError(f"a bug of the server made decoding fail: {what}")


def _by_decoder(rows: Iterable[Row]) -> dict[Hosted, list[Row]]:
    """Rows of the same decoder together, in their order."""
    found: dict[Hosted, list[Row]] = {}
    for row in rows:
        found.setdefault(row.decoder, []).append(row)
    return found


def _note_halted(work: Pass, step: int, halted: Halted, index: int) -> None:
    work.note_halted(step, halted.of(index))


def _at_work(rows: Iterable[Row]) -> Iterable[tuple[Row, Pass]]:
    """Rows that are inside the recursion, with their passes."""
    return ((row, row.work) for row in rows if row.work is not None)


def _event(row: Row, chosen: Chosen) -> Event:
    return Event(
        tuple(chosen.ids),
        chosen.text,
        None,
        row.usage(),
        logprobs=tuple(chosen.logprobs),
        traces=tuple(chosen.traces),
    )
