"""The objective: which tokens may halt."""

import torch

from training.loss import halting_targets


def test_a_token_may_halt_where_it_is_right_or_no_deeper_step_helps() -> None:
    # Tokens: falling by enough, falling by too little, rising, falling much later, right at once.
    cross_entropy = torch.tensor([[1.0, 1.0, 1.0, 1.0, 1.0], [0.5, 0.99, 1.1, 1.2, 0.5], [0.4, 0.98, 1.2, 0.1, 0.4]])
    right = torch.zeros(3, 5, dtype=torch.bool)
    right[0, 4] = True

    targets = halting_targets(cross_entropy, right, delta=0.05)

    assert targets.int().tolist() == [[0, 1, 1, 0, 1], [0, 1, 1, 0, 0], [1, 1, 1, 1, 1]]
