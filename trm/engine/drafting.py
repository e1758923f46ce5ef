"""How many tokens the backbone should draft before the recursion verifies them all in one pass.

A draft of k tokens costs k more backbone passes and makes every supervision step work on k + 1
positions; it pays where the recursion usually agrees with the backbone and where more positions
in a call cost less than more calls: with few rows. Both are measured, the agreement per row while
it decodes, the costs once when the engine starts. Touches no tensors.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Protocol

FIRST_GUESS = 0.7  # acceptance assumed before anything was measured
MEMORY = 0.9  # weight of the past when an acceptance is learnt
LEAST_GAIN = 1.05  # expected speed-up below which drafting is left out
PROBE_EVERY = 32  # rounds without a draft after which one token is drafted, to learn whether things have changed


@dataclass(frozen=True)
class Costs:
    """Seconds of one backbone pass, one supervision step and the head over some numbers of positions, ascending."""

    positions: Sequence[int]
    backbone_s: Sequence[float]
    step_s: Sequence[float]
    head_s: Sequence[float]

    def backbone(self, num_positions: int) -> float:
        """Seconds of a backbone pass over `num_positions` positions, however they are spread over rows."""
        return self._between(self.backbone_s, num_positions)

    def step(self, num_positions: int) -> float:
        """Seconds of a supervision step over `num_positions` positions."""
        return self._between(self.step_s, num_positions)

    def head(self, num_positions: int) -> float:
        """Seconds to read out the logits of `num_positions` positions."""
        return self._between(self.head_s, num_positions)

    def _between(self, seconds: Sequence[float], wanted: int) -> float:
        """Straight lines through the measured points, which never fall, the last one continued."""
        at, rising = self.positions, list(accumulate(seconds, max))
        right = next((i for i in range(1, len(at)) if at[i] >= wanted), len(at) - 1)
        slope = (rising[right] - rising[right - 1]) / (at[right] - at[right - 1])
        return rising[right - 1] + slope * (wanted - at[right - 1])


class Drafted(Protocol):
    """What is asked of a row: see `trm.engine.row.Row`."""

    acceptance: float | None

    @property
    def room_for_draft(self) -> int: ...

    @property
    def expected_steps(self) -> float: ...


class Drafter:
    """Chooses draft lengths up to `max_tokens`, and learns from what became of the drafts."""

    def __init__(self, costs: Costs, max_tokens: int) -> None:
        self.costs = costs
        self.max_tokens = max_tokens
        self.acceptance = FIRST_GUESS  # where a new row starts
        self._rounds_without = 0

    def length(self, rows: Sequence[Drafted], num_running: int) -> int:
        """Tokens to draft for each of `rows`, which pass the backbone together, while `num_running` rows share steps.

        One length for all: each further token is a backbone call that they share.
        """
        drafting = [row for row in rows if row.room_for_draft > 0]
        if not drafting:
            return 0
        longest = min(self.max_tokens, max(row.room_for_draft for row in drafting))
        acceptance = sum(self._acceptance(row) for row in drafting) / len(drafting)
        steps = sum(row.expected_steps for row in drafting) / len(drafting)
        length = self._best(acceptance, len(rows), num_running, steps, longest)
        self._rounds_without = 0 if length else self._rounds_without + 1
        if self._rounds_without >= PROBE_EVERY and self._best(1.0, len(rows), num_running, steps, longest):
            self._rounds_without = 0
            return 1
        return length

    def learn(self, row: Drafted, judged: int, accepted: int) -> None:
        """Of a row's drafted tokens `judged` were compared with the recursion's choice and `accepted` were equal."""
        for agreed in [1.0] * accepted + [0.0] * (judged - accepted):
            row.acceptance = MEMORY * self._acceptance(row) + (1 - MEMORY) * agreed
            self.acceptance = MEMORY * self.acceptance + (1 - MEMORY) * agreed

    def _acceptance(self, row: Drafted) -> float:
        return self.acceptance if row.acceptance is None else row.acceptance

    def _best(self, acceptance: float, num_rows: int, num_running: int, steps: float, longest: int) -> int:
        """The length with the most tokens per second, 0 where none is worth its trouble."""

        def tokens_per_s(length: int) -> float:
            tokens = sum(acceptance**k for k in range(length + 1))
            drafting_s = length * (self.costs.backbone(num_rows) + self.costs.head(num_rows))
            verified = num_rows * (length + 1)
            thinking_s = steps * self.costs.step(num_running * (length + 1)) + self.costs.head(verified)
            return tokens / (self.costs.backbone(num_rows) + drafting_s + thinking_s)

        best = max(range(1, longest + 1), key=tokens_per_s)
        return best if tokens_per_s(best) > LEAST_GAIN * tokens_per_s(0) else 0
