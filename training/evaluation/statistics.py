"""Intervals and paired tests, exact where they can be. Knows numbers only."""

import math
from collections.abc import Sequence
from typing import NamedTuple

Z95 = 1.96  # standard errors on either side of a 95 % interval


class Paired(NamedTuple):
    """Two ways of answering the same problems: how many only the first got right, how many only the second."""

    wins: int
    losses: int

    @property
    def p(self) -> float:
        """Exact McNemar test, two-sided: the chance of a split at least as uneven between equals."""
        trials = self.wins + self.losses
        tail = sum(math.comb(trials, k) for k in range(min(self) + 1))
        return min(1.0, 2 * tail / (1 << trials))


def paired(ours: Sequence[bool], theirs: Sequence[bool]) -> Paired:
    """Compare problem by problem; both in the same order."""
    pairs = list(zip(ours, theirs, strict=True))
    return Paired(sum(a and not b for a, b in pairs), sum(b and not a for a, b in pairs))


def holm(p_values: Sequence[float]) -> list[float]:
    """Corrected for testing several at once (Holm, 1979), in the order given."""
    corrected = [1.0] * len(p_values)
    largest = 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        corrected[index] = largest
    return corrected


def wilson_interval(successes: int, trials: int) -> tuple[float, float]:
    """95 % confidence interval of a proportion (Wilson, 1927): sensible near 0 and 1 too."""
    share = successes / trials
    centre = share + Z95 * Z95 / (2 * trials)
    spread = Z95 * math.sqrt(share * (1 - share) / trials + Z95 * Z95 / (4 * trials * trials))
    scale = 1 + Z95 * Z95 / trials
    return max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)


def ratio_interval(sums: Sequence[float], counts: Sequence[int]) -> tuple[float, float]:
    """95 % confidence interval of sum(sums) / sum(counts), drawn in groups: a loss per token, problem by problem.

    The normal approximation for a ratio of sums over independent groups. One group says nothing: its interval is
    the point itself.
    """
    groups, total = len(sums), sum(counts)
    ratio = sum(sums) / total
    square = sum((s - ratio * c) ** 2 for s, c in zip(sums, counts, strict=True))
    spread = Z95 * math.sqrt(square * groups / max(1, groups - 1)) / total
    return ratio - spread, ratio + spread
