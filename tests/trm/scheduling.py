"""What the scheduler's tests share: rows, the engine's loop without a model, what must hold after every operation."""

import itertools
import random
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

from trm.engine.hosted import Hosted
from trm.engine.prefix import Prefix
from trm.engine.request import Event, Request, SamplingParams
from trm.engine.row import Pass, Row
from trm.engine.scheduler import Copy, Scheduler

NO_TEXT: Any = None  # in place of a reply's text stream, which a schedule does not touch
NEVER_SEEN = itertools.count(1000)


def some_decoder(kv_source: str = "context") -> Hosted:
    """A decoder as far as a schedule knows it."""
    return Hosted(SimpleNamespace(config=SimpleNamespace(kv_source=kv_source)), NO_TEXT, 4)


CONTEXT, OTHER, STATE = some_decoder(), some_decoder(), some_decoder("state")


def make_row(prompt: int | Sequence[int] = 3, steps: int = 2, decoder: Hosted = CONTEXT, **params: Any) -> Row:
    """A row with these prompt ids, or with so many that no other row begins with."""
    if isinstance(prompt, int):
        prompt = [next(NEVER_SEEN) for _ in range(prompt)]
    return Row(Request(tuple(prompt), SamplingParams(**params)), decoder, steps, ignore, NO_TEXT, Prefix(prompt))


def ignore(event: Event) -> None:
    """Events are the engine's business."""


def slots_of(rows: Sequence[Row]) -> list[int]:
    return [row.slot for row in rows]


def admit(scheduler: Scheduler, *rows: Row) -> list[Copy]:
    scheduler.submit(rows)
    return scheduler.admit()


def keep(scheduler: Scheduler, ids: Sequence[int], steps: int = 2, decoder: Hosted = CONTEXT) -> int:
    """Let a row come and go that leaves `ids` in its slot, which is returned."""
    row = make_row([*ids, 0], steps, decoder)
    admit(scheduler, row)
    row.cached, slot = len(ids), row.slot
    scheduler.release(row, keep=True)
    return slot


class Loop:
    """The engine's loop without a model: a slot holds tokens, depths and decoders, as they were computed or copied."""

    def __init__(self, scheduler: Scheduler, prefill_chunk: int = 100, seed: int = 0) -> None:
        self.scheduler = scheduler
        self.prefill_chunk = prefill_chunk
        self.rng = random.Random(seed)
        self.slots: list[list[tuple[int, int, Hosted]]] = [[] for _ in range(scheduler.max_rows)]
        self.fed: list[list[Row]] = []  # by step
        self.clocks: dict[Row, int] = {}  # at a row's first token
        self.copies = 0

    def admit(self) -> None:
        copies = self.scheduler.admit()
        for row in self.scheduler.running:
            assert row.settled is (row.source is None)
            if row.source is not None:
                assert row.source.slot >= 0, "nobody waits for a row that has left"
                assert row.source.settled, "nor for one that waits itself"
                assert row.source.to_prefill, "nor for one that is done"
        for copy in copies:
            row, taken = copy.row, self.slots[copy.source][: copy.length]
            assert row.settled
            assert row.cached == 0
            assert 0 < copy.length < len(row.request.prompt_ids), "the last prompt token is never shared"
            assert [token for token, _, _ in taken] == list(row.request.prompt_ids[: copy.length])
            assert all(decoder is row.decoder for _, _, decoder in taken)
            if row.decoder.depth_matters:
                assert all(depth >= row.steps for _, depth, _ in taken)
            self.copies += 1
            if self.rng.random() < 0.9:  # else it was not finite, and the row computes its own
                self.slots[row.slot] = [(token, min(depth, row.steps), owner) for token, depth, owner in taken]
                row.cached = copy.length
        for row in self.scheduler.running:
            del self.slots[row.slot][row.cached :]  # whatever lay here is lost

    def compute(self) -> None:
        """One step of everything that has a slot."""
        for row, count in self.scheduler.prefilling(self.prefill_chunk):
            self._cache(row, row.request.prompt_ids[row.cached : row.cached + count])
        self.fed.append(self.scheduler.feeding())
        for row in self.fed[-1]:
            self.clocks.setdefault(row, self.scheduler.clock)
            row.work = Pass()
        if thinking := self.scheduler.thinking():
            self.scheduler.clock += 1
            for row in thinking:
                assert row.work is not None
                row.work.step += 1
                row.work.note_halted(row.work.step, [row.request.params.halts and self.rng.random() < 0.5])
        for row in self.scheduler.answered():
            assert row.work is not None
            self._cache(row, [row.token])
            row.taken.passes += 1
            row.taken.pass_steps += row.work.step
            row.take(self.rng.randrange(2))
            row.work = None

    def step(self) -> list[Row]:
        """One step of the whole loop; returns the rows that it finished."""
        self.admit()
        self.compute()
        done = [row for row in self.scheduler.running if len(row.reply) >= row.request.params.max_tokens]
        for row in done:
            self.release(row, good=True)
        return done

    def release(self, row: Row, good: bool) -> None:
        slot = row.slot
        self.scheduler.release(row, keep=good)
        if slot >= 0 and not good:
            self.slots[slot] = []

    def _cache(self, row: Row, tokens: Sequence[int]) -> None:
        assert len(self.slots[row.slot]) == row.cached
        self.slots[row.slot] += [(token, row.steps, row.decoder) for token in tokens]
        row.cached += len(tokens)
        assert tuple(token for token, _, _ in self.slots[row.slot]) == row.cached_ids


def check(scheduler: Scheduler) -> None:
    """What must hold after every operation."""
    assert all(row.slot >= 0 for row in scheduler.running)
    used = slots_of(scheduler.running)
    assert sorted([*used, *scheduler._free]) == list(range(scheduler.max_rows)), "every slot is used or free, once"
    assert all(row.slot == -1 for row in scheduler.waiting)
    assert len(scheduler.waiting) + scheduler.reserved <= scheduler.max_queue + len(scheduler._free)
    assert not {id(row) for row in scheduler.running} & {id(row) for row in scheduler.waiting}
