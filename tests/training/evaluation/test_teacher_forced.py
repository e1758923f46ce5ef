"""The teacher-forced part: against the model's own forward, and by hand."""

from typing import Any

import pytest
import torch

from tests.conftest import make_model
from training.evaluation.teacher_forced import Measured, calibration, halting_trade_off, loss_per_step, measure
from trm.chat import ChatFormat


def test_loss_per_step_is_that_of_forward(chat: ChatFormat, tokenizer: Any, kv_source: str) -> None:
    model = make_model(sizes={"vocab_size": len(tokenizer)}, kv_source=kv_source)
    examples = [chat.encode_example("One and one?", r"\boxed{2}"), chat.encode_example("Why?", r"So 1+1=2. \boxed{2}")]

    rows = loss_per_step(measure(model, chat, examples, 4))

    counts = [len(example.ids) - example.label_start for example in examples]
    for step, row in enumerate(rows):
        total = 0.0
        for example, count in zip(examples, counts, strict=True):
            ids = torch.tensor([example.ids])
            labels = ids.masked_fill(torch.arange(len(example.ids)) < example.label_start, -100)
            total += model(ids, labels=labels, n_supervision=step).loss.item() * count
        assert row["loss"] == pytest.approx(total / sum(counts), rel=2e-5)
        assert row["interval"][0] < row["loss"] < row["interval"][1]
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4]


@pytest.fixture
def measured() -> Measured:
    """Three labels over two steps; the first is right at once, the second from step 2 on, the third never."""
    right = torch.tensor([[False, False, False], [True, False, False], [True, True, False]])
    return Measured(
        problem=torch.tensor([0, 0, 1]),
        loss=torch.zeros(3, 3),
        token=torch.tensor([[9, 9, 9], [1, 9, 5], [1, 2, 6]]),
        right=right,
        halt=torch.tensor([[0.97, 0.55, 0.91], [0.99, 0.95, 0.03]]),
        moved=torch.tensor([[0.5, 0.5, 0.0], [0.0, 0.2, 0.5]]),
    )


def test_halting_trade_off(measured: Measured) -> None:
    rules = halting_trade_off(measured, 2)

    head = {row["threshold"]: row for row in rules["head"]}
    assert (head[0.5]["mean_steps"], head[0.5]["agreement"], head[0.5]["token_accuracy"]) == (1, 1 / 3, 1 / 3)
    assert head[0.9]["mean_steps"] == pytest.approx(4 / 3)  # the second goes on, and is put right
    assert (head[0.9]["agreement"], head[0.9]["token_accuracy"]) == (2 / 3, 2 / 3)
    assert (head[0.98]["mean_steps"], head[0.98]["agreement"]) == (2, 1)  # too strict for all of them
    movement = {row["tolerance"]: row for row in rules["movement"]}
    assert movement[0.1]["mean_steps"] == pytest.approx(5 / 3)
    assert [(row["steps"], row["mean_steps"], row["agreement"]) for row in rules["fixed"]] == [(1, 1, 1 / 3), (2, 2, 1)]


def test_calibration(measured: Measured) -> None:
    result = calibration(measured, 2)

    assert [(row["tokens"], row["observed"]) for row in result["bins"]] == [(1, 0), (1, 0), (4, 3 / 4)]
    assert result["bins"][-1]["predicted"] == pytest.approx((0.97 + 0.91 + 0.99 + 0.95) / 4)
    assert result["error"] == pytest.approx((0.03 + 0.55 + 4 * (0.955 - 0.75)) / 6)
