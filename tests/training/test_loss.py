"""The objective: which tokens may halt."""

import pytest
import torch

from training.loss import TokenLosses, halting_targets, objective


def test_a_token_may_halt_where_it_is_right_or_no_deeper_step_helps() -> None:
    # Tokens: falling by enough, falling by too little, rising, falling much later, right at once.
    cross_entropy = torch.tensor([[1.0, 1.0, 1.0, 1.0, 1.0], [0.5, 0.99, 1.1, 1.2, 0.5], [0.4, 0.98, 1.2, 0.1, 0.4]])
    right = torch.zeros(3, 5, dtype=torch.bool)
    right[0, 4] = True

    targets = halting_targets(cross_entropy, right, delta=0.05)

    assert targets.int().tolist() == [[0, 1, 1, 0, 1], [0, 1, 1, 0, 0], [1, 1, 1, 1, 1]]


@pytest.mark.parametrize(("halt_delta", "expected"), [(0.05, [[0, 1, 1], [1, 1, 1]]), (None, [[0, 1, 0], [1, 0, 0]])])
def test_a_token_that_is_not_settled_may_not_halt_however_right_it_is(
    halt_delta: float | None, expected: list[list[int]]
) -> None:
    # Three labels: right at both steps, right at once, never right and never better.
    right = torch.tensor([[True, True, False], [True, False, False]])
    settled = torch.tensor([[False, True, True], [True, True, True]])
    sure = 20.0  # of halting everywhere: the loss is 20 where a token may not, 0 where it may
    steps = [TokenLosses(torch.ones(3), right[i], torch.full((3,), sure), settled[i]) for i in range(2)]

    halting = objective(steps, torch.ones(2), halt_delta).parts[1]

    assert halting.tolist() == pytest.approx([sure * row.count(0) for row in expected], abs=1e-6)
