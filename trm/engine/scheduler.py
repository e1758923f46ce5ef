"""Choose which rows advance next, in which slot, and whose keys and values they may take over.

Holds waiting and running rows, the free slots and what the slots still contain; touches no
tensors, so policy is tested in microseconds. First come, first served; a slot holds any request
that was accepted, so nothing is preempted. Raises Overloaded when the queue is full.
"""

import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from trm.engine.hosted import Hosted
from trm.engine.prefix import BLOCK, Prefix, common_length
from trm.engine.row import Row
from trm.errors import BadRequest, Overloaded

PACE_WINDOW = 64  # departures that tell how soon a place becomes free


@dataclass(frozen=True)
class Kept:
    """What a free slot still holds: a decoder's keys and values of `ids`, good for up to `depth` supervision steps."""

    decoder: Hosted | None = None
    ids: tuple[int, ...] = ()
    depth: int = 0
    prefix: Prefix = field(default_factory=Prefix, compare=False)  # of these tokens and perhaps more


@dataclass(frozen=True)
class Copy:
    """Take over the first `length` positions of slot `source` for `row`."""

    row: Row
    source: int
    length: int


class Scheduler:
    """Rows waiting and running, each of some decoder. Not thread-safe: the engine guards it. `now`: seconds."""

    def __init__(
        self,
        max_rows: int,
        max_queue: int,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self.max_rows = max_rows
        self.max_queue = max_queue
        self.waiting: deque[Row] = deque()
        self.running: list[Row] = []
        self.reserved = 0  # places kept for rows that are not here yet
        self.clock = 0  # ticks since the recursion last stood empty
        self._free = {slot: Kept() for slot in range(max_rows)}  # the next to be given up first
        self._now = now
        self._departures = deque([0.0], maxlen=PACE_WINDOW)  # after the time when the first row came

    @property
    def unfinished(self) -> int:
        """Rows that are here, running or waiting."""
        return len(self.running) + len(self.waiting)

    def reserve(self, count: int) -> None:
        """Keep places for so many rows. Rows that fit into free slots do not count against the queue."""
        if count > self.max_queue + self.max_rows:
            raise BadRequest(
                f"{count} samples are asked for at once; this server takes at most {self.max_queue + self.max_rows}",
                param="n",
            )
        taken = len(self.waiting) + self.reserved
        missing = count - (self.max_queue + len(self._free) - taken)
        if missing > 0:
            retry_after_s = self._seconds_until_free(missing)
            raise Overloaded(
                f"the queue is full: {taken} requests wait, and at most {self.max_queue} may; "
                f"try again in {retry_after_s} s",
                retry_after_s,
            )
        self.reserved += count

    def submit(self, rows: Sequence[Row], reserved: int | None = None) -> None:
        """Queue all rows or none, in places that were reserved for them or, if None were, are reserved now."""
        if reserved is None:
            reserved = len(rows)
            self.reserve(reserved)
        self.reserved -= reserved
        now = self._now()
        if not self.unfinished:
            self._departures = deque([now], maxlen=PACE_WINDOW)
        for row in rows:
            row.submitted_at = now
        self.waiting.extend(rows)

    def admit(self) -> list[Copy]:
        """Give free slots to the rows that have waited longest; returns the prefixes that are ready to be copied.

        A row takes over from whichever slot begins most like its prompt. Where that is a running row whose
        prompt is being cached right now, it waits for it. It moves into a free slot that holds little else
        than what it wants, or else into the one that was used longest ago.
        """
        for row in self.running:
            if row.source is not None and (row.source.slot < 0 or row.source.cached >= row.source_length):
                row.source = None
        late = [row for row in self.running if not row.settled and row.source is None]
        copies = [copy for row in late for copy in self._settle(row, *self._best_source(row))]
        while self._free and self.waiting:
            row = self.waiting[0]  # it stays until it runs: whatever fails in between, somebody knows of it
            row.taken.queue_s = self._now() - row.submitted_at
            source, length = self._best_source(row)
            if isinstance(source, int) and 2 * length >= len(self._free[source].ids):
                row.slot = source
            else:
                if isinstance(source, int):
                    self._free[source] = self._free.pop(source)  # used just now
                row.slot = next(iter(self._free))
            self.running.append(self.waiting.popleft())
            copies += self._settle(row, source, length)
            del self._free[row.slot]
        return copies

    def cancelled(self) -> list[Row]:
        """Cancelled rows, running or waiting; they are still here."""
        return [row for row in (*self.running, *self.waiting) if row.cancelled]

    def release(self, row: Row, keep: bool = False) -> None:
        """Forget a row, wherever it is, and free its slot; `keep` says that its keys and values are good."""
        self._departures.append(self._now())
        if row.slot < 0:
            row.taken.queue_s = self._departures[-1] - row.submitted_at
            self.waiting.remove(row)
            return
        self.running.remove(row)
        if keep and not row.decoder.closed:
            self._free[row.slot] = Kept(row.decoder, row.cached_ids, row.steps, row.prefix)
        else:
            self._free = {row.slot: Kept(), **self._free}
        row.slot = -1

    def forget(self, decoder: Hosted) -> None:
        """Let free slots hold nothing of a decoder any more."""
        emptied = {slot: Kept() for slot, kept in self._free.items() if kept.decoder is decoder}
        self._free = emptied | {slot: kept for slot, kept in self._free.items() if slot not in emptied}

    def prefilling(self, budget: int) -> list[tuple[Row, int]]:
        """Rows with prompt left to cache and how many tokens of it now, by slot, chosen oldest first.

        Together they come to `budget` at most.
        """
        chosen: list[tuple[Row, int]] = []
        for row in self.running:
            if budget and row.settled and row.to_prefill:
                count = min(row.to_prefill, budget)
                chosen.append((row, count))
                budget -= count
        return sorted(chosen, key=lambda chunk: chunk[0].slot)

    def feeding(self) -> list[Row]:
        """Rows whose next token must pass the backbone, by slot.

        A row of N steps begins its tokens when the clock is a multiple of N: so rows of equal effort reach
        the backbone together, in one call of many rows instead of many calls of few, and wait for it only
        once, before their first token. For rows that halt, N is what they take on average.
        """
        if not any(row.thinking for row in self.running):
            self.clock = 0
        paces = [row.expected_steps for row in self.running if row.request.params.halts and row.taken.passes]
        pace = round(sum(paces) / len(paces)) if paces else 1
        ready = (row for row in self.running if row.settled and not row.to_prefill and not row.thinking)
        begun = (row for row in ready if not self.clock % max(1, pace if row.request.params.halts else row.steps))
        return sorted(begun, key=lambda row: row.slot)

    def thinking(self) -> list[Row]:
        """Rows with supervision steps to do, wherever they stand, by slot."""
        return sorted((row for row in self.running if row.thinking and not row.answered), key=lambda row: row.slot)

    def answered(self) -> list[Row]:
        """Rows that have had their steps and choose a token now, by slot."""
        return sorted((row for row in self.running if row.answered), key=lambda row: row.slot)

    def _seconds_until_free(self, count: int) -> int:
        """When so many rows more will have left, at the pace of the latest; at least 1."""
        if not self.unfinished:
            return 1
        elapsed = self._now() - self._departures[0]
        return max(1, math.ceil(count * elapsed / max(1, len(self._departures) - 1)))

    def _best_source(self, row: Row) -> tuple[Row | int | None, int]:
        """What begins most like the row's prompt, and how much of it: a running row, a free slot, or nothing.

        Of equals the slot that was used last, which has the longest to live, else the oldest row.
        """
        sources: list[Row | int] = [*reversed(self._free), *(other for other in self.running if other.settled)]
        lengths = [self._common(row, source) for source in sources]
        length = max(lengths, default=0)
        return (sources[lengths.index(length)], length) if length else (None, 0)

    def _settle(self, row: Row, source: Row | int | None, length: int) -> list[Copy]:
        """Take over what `source` holds, or wait for it where it is still being cached."""
        if isinstance(source, Row) and source.cached < length:
            row.source, row.source_length = source, length
            return []
        row.settled = True
        if source is None:
            return []
        return [Copy(row, source.slot if isinstance(source, Row) else source, length)]

    def _common(self, row: Row, source: Row | int) -> int:
        """Prompt tokens that `row` could take over from another row, once that is prefilled, or from a free slot.

        Only of its own decoder: another one projects other keys, from states of the backbone that nobody keeps.
        """
        held = source if isinstance(source, Row) else self._free[source]
        if held.decoder is not row.decoder:
            return 0
        if isinstance(held, Row):
            length, depth = held.cached + held.to_prefill, held.steps
        else:
            length, depth = len(held.ids), held.depth
        if row.decoder.depth_matters and depth < row.steps:
            return 0
        most = min(length, len(row.request.prompt_ids) - 1)
        start = row.prefix.equal_tokens(held.prefix, most)
        end = min(start + BLOCK, most)
        theirs = held.ids(start, end) if isinstance(held, Row) else held.ids[start:end]
        return start + common_length(row.request.prompt_ids[start:end], theirs)
