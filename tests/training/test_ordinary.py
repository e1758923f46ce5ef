"""An ordinary model in training: what it learns, and by which gradients, in one process and in two."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import make_backbone
from tests.training.shares import RIGHT, TESTS, make_shares
from tests.training.together import in_two_processes
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


@pytest.mark.slow
def test_each_of_two_processes_has_the_gradients_of_one(tmp_path: Path, chat: Any) -> None:
    alone = make_shares(chat)
    assert alone["accuracy"] == len(RIGHT) / len(TESTS)

    in_two_processes("tests.training.shares", str(tmp_path))

    for rank in range(2):
        torch.testing.assert_close(load_file(tmp_path / f"{rank}.safetensors"), alone, rtol=1e-4, atol=1e-6)
