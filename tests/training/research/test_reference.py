"""The fast trainer against the plain loop: equal losses, update after update."""

from collections.abc import Callable
from typing import Any

import pytest

from tests.training.test_trainer import make_trainer
from training.batches import collate
from training.config import TrainSettings
from training.research.reference import random_order, train_plainly


@pytest.mark.parametrize(
    "changes",
    [
        {"kv_source": "context"},
        {"kv_source": "state"},
        {"dataset": "synthetic:easy,mental", "replies": ["worked", "answer"], "step_targets": True, "num_problems": 12},
    ],
    ids=["context", "state", "step targets"],
)
def test_the_trainer_gives_the_losses_of_the_plain_loop(
    settings: Callable[..., TrainSettings], tmp_path, changes: dict[str, Any]
) -> None:
    fast = make_trainer(settings(cache_states="memory", step_weights="linear", autocast="off", **changes))
    plain = make_trainer(fast.settings)
    fast.keep_states(tmp_path)
    order = [indices for group in range(6) for indices in fast.feed.batches_of(group)]
    batches = (collate([plain.feed.examples[i] for i in indices], 0) for indices in order)

    expected = list(train_plainly(plain.model, batches, plain.settings, plain.total_steps, plain.weights.warmup_steps))
    losses = [fast.train_step()["losses"] for _ in order]

    assert losses[0][-1] - losses[-1][-1] > 0.1  # it learns: the updates are compared as well
    for ours, theirs in zip(losses, expected, strict=True):
        assert ours == pytest.approx(theirs, rel=2e-3)


def test_random_order_covers_every_example_once() -> None:
    order = random_order(10, 4, seed=0)

    assert [len(indices) for indices in order] == [4, 4, 2]
    flat = [index for indices in order for index in indices]
    assert sorted(flat) == list(range(10)) != flat
