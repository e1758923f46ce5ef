"""Does something grow? A trend over samples with an interval that a busy server's ups and downs cannot narrow.

Neighbouring samples say nearly the same, so they do not count one by one: the line is fitted through
the medians of a few stretches of time, and its uncertainty is that of so few points.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

STRETCHES = 12
T_95 = 2.228  # two-sided, STRETCHES - 2 degrees of freedom


@dataclass(frozen=True)
class Growth:
    """From the first sample to the last, along the line: a share of the level at the start, with its 95 % interval."""

    level: float
    share: float
    low: float
    high: float

    def __str__(self) -> str:
        low, share, high = (f"{100 * round(one, 4) + 0.0:+.2f} %" for one in (self.low, self.share, self.high))
        return f"{share} [{low}, {high}]"

    def below(self, limit: float, unit: float = 0.0) -> bool:
        """Whether even the interval's upper end is. `unit`: what cannot be had in parts may grow by one at least."""
        return self.high < max(limit, unit / self.level)


def growth(times: Sequence[float], values: Sequence[float]) -> Growth:
    """The trend of values at increasing times. Raises ValueError for fewer than two samples a stretch."""
    if len(times) < 2 * STRETCHES:
        raise ValueError(f"{len(times)} samples; a trend takes at least {2 * STRETCHES}")
    x = np.array([np.mean(part) for part in np.array_split(np.asarray(times, float), STRETCHES)])
    y = np.array([np.median(part) for part in np.array_split(np.asarray(values, float), STRETCHES)])
    centred = x - x.mean()
    slope = float(centred @ y / (centred @ centred))
    rest = y - y.mean() - slope * centred
    error = T_95 * float(np.sqrt(rest @ rest / (STRETCHES - 2) / (centred @ centred)))
    level = float(y.mean() + slope * (times[0] - x.mean()))
    span = (times[-1] - times[0]) / level
    return Growth(level, slope * span, (slope - error) * span, (slope + error) * span)
