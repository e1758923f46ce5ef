"""Intervals and tests against values computed by hand."""

import pytest

from training.evaluation.statistics import Paired, holm, paired, ratio_interval, wilson_interval


@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
    [(0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (5, 10, 0.2366, 0.7634), (450, 500, 0.8706, 0.9233)],
)
def test_wilson_interval(successes: int, trials: int, low: float, high: float) -> None:
    assert wilson_interval(successes, trials) == pytest.approx((low, high), abs=1e-4)


def test_paired_comparison() -> None:
    ours, theirs = [True] * 9 + [False] * 3, [True] * 3 + [False] * 8 + [True]

    assert paired(ours, theirs) == Paired(wins=6, losses=1)
    assert paired(ours, theirs).p == pytest.approx(2 * (1 + 7) / 128)
    assert paired(theirs, ours).p == paired(ours, theirs).p
    assert paired(ours, ours).p == 1.0
    assert Paired(1500, 0).p == pytest.approx(0, abs=1e-300)  # 2**1500 is no float


def test_holm_correction() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])  # 3p, the 0.06 before, 2p, 4p
    assert holm([0.6, 0.7]) == [1.0, 1.0]
    assert holm([]) == []


def test_interval_of_a_ratio() -> None:
    spread = 1.96 / 3**0.5  # three groups with a standard deviation of 1

    assert ratio_interval([1, 2, 3], [1, 1, 1]) == pytest.approx((2 - spread, 2 + spread))
    assert ratio_interval([2, 4, 6], [1, 2, 3]) == pytest.approx((2, 2))  # the same loss per token everywhere
