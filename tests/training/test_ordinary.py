"""An ordinary model in training: what it learns, and by which gradients; and the same in two processes."""

from dataclasses import replace

import pytest
import torch

from tests.conftest import make_backbone
from training import ordinary
from training.batches import IGNORE_INDEX
from trm.chat import Example


@pytest.fixture(autouse=True)
def float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ordinary, "has_fast_bfloat16", lambda device: False)


def test_the_gradients_are_those_of_transformers_own_loss() -> None:
    ours, theirs = make_backbone(), make_backbone()
    examples = [Example(tuple(range(3, 12)), 5), Example(tuple(range(20, 26)), 2)]
    ids = torch.zeros(2, 9, dtype=torch.long)
    labels = torch.full_like(ids, IGNORE_INDEX)
    for row, example in enumerate(examples):
        ids[row, : len(example.ids)] = torch.tensor(example.ids)
        labels[row, example.label_start : len(example.ids)] = torch.tensor(example.ids[example.label_start :])

    loss = ordinary.add_gradients(ours, examples, pad_id=0)

    expected = theirs(ids, labels=labels).loss
    expected.backward()
    torch.testing.assert_close(loss, expected.detach())
    pairs = zip(ours.named_parameters(), theirs.parameters(), strict=True)
    for (name, own), their in pairs:
        torch.testing.assert_close(own.grad, their.grad, rtol=1e-4, atol=1e-6, msg=lambda text, n=name: f"{n}: {text}")


def test_the_answer_is_learned_whatever_the_steps_before_it() -> None:
    model = make_backbone()
    example = Example(tuple(range(3, 12)), 5, step_replies=((20, 21), (22, 23, 24, 25)))

    losses = [ordinary.add_gradients(model, [one], 0) for one in (example, replace(example, step_replies=()))]

    assert losses[0] == losses[1] > 0
