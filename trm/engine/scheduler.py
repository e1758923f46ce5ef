"""Choose which rows advance next.

Holds waiting and running rows and the free slots; touches no tensors, so policy is tested in
microseconds. First come, first served; a slot holds any request that was accepted, so nothing
is preempted. Raises Overloaded when the queue is full.
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from trm.engine.request import Event, Request
from trm.errors import BadRequest, Overloaded


@dataclass(eq=False)
class Row:
    """One accepted request on its way through the engine.

    Its tokens are the prompt, then the reply. `cached` of them have their keys and values in the
    slot; the token after those is the one being worked on, at supervision step `step` of `steps`.
    """

    request: Request
    steps: int
    emit: Callable[[Event], None]
    slot: int = -1
    cached: int = 0
    step: int = 0
    thinking: bool = False  # the token at `cached` has passed the backbone
    reply: list[int] = field(default_factory=list)
    supervision_steps: int = 0
    cancelled: bool = False

    @property
    def to_prefill(self) -> int:
        """Prompt tokens still to be cached before the last one, which decodes like any other token."""
        return max(0, len(self.request.prompt_ids) - 1 - self.cached)

    @property
    def token(self) -> int:
        """The token after the cached ones."""
        prompt = self.request.prompt_ids
        return prompt[self.cached] if self.cached < len(prompt) else self.reply[self.cached - len(prompt)]


class Scheduler:
    """Rows waiting and running. Not thread-safe: the engine guards it."""

    def __init__(self, max_rows: int, max_queue: int) -> None:
        self.max_rows = max_rows
        self.max_queue = max_queue
        self.waiting: deque[Row] = deque()
        self.running: list[Row] = []
        self._free = list(range(max_rows - 1, -1, -1))

    def submit(self, rows: Sequence[Row]) -> None:
        """Queue all rows or none. Rows that fit into free slots do not count against the queue."""
        if len(rows) > self.max_queue + self.max_rows:
            raise BadRequest(
                f"{len(rows)} samples are asked for at once; this server takes {self.max_queue + self.max_rows}",
                param="n",
            )
        room = self.max_queue + len(self._free) - len(self.waiting)
        if len(rows) > room:
            raise Overloaded(
                f"the queue is full: {len(self.waiting)} requests wait, {self.max_queue} may; try again shortly"
            )
        self.waiting.extend(rows)

    def admit(self) -> None:
        """Give free slots to the rows that have waited longest."""
        while self._free and self.waiting:
            row = self.waiting.popleft()
            row.slot = self._free.pop()
            self.running.append(row)

    def take_cancelled(self) -> list[Row]:
        """Remove cancelled rows, waiting or running, and return them; their slots are free again."""
        gone = [row for row in (*self.running, *self.waiting) if row.cancelled]
        for row in gone:
            self.release(row)
        return gone

    def release(self, row: Row) -> None:
        """Forget a row, wherever it is, and free its slot."""
        if row.slot < 0:
            self.waiting.remove(row)
            return
        self.running.remove(row)
        self._free.append(row.slot)
        row.slot = -1

    def prefilling(self, budget: int) -> list[tuple[Row, int]]:
        """Rows with prompt left to cache and how many tokens of it now, oldest first, `budget` tokens in all."""
        chosen = []
        for row in self.running:
            if row.to_prefill and budget > 0:
                count = min(budget, row.to_prefill)
                chosen.append((row, count))
                budget -= count
        return chosen

    def feeding(self) -> list[Row]:
        """Rows whose next token must pass the backbone."""
        return [row for row in self.running if not row.to_prefill and not row.thinking]

    def thinking(self) -> list[Row]:
        """Rows inside the recursion, at whatever step."""
        return [row for row in self.running if row.thinking]
