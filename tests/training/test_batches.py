"""What stands where in a batch: the answer's labels, and those of the intermediate results before it."""

import pytest
import torch

from training.batches import IGNORE_INDEX, Batch, collate
from training.loss import settled_labels
from training.problems.data import encode_problem
from training.problems.problem import Problem
from trm.answers import boxed
from trm.chat import ChatFormat, Example


def answer_at_once(chat: ChatFormat, *results: str) -> Example:
    return encode_problem(Problem("Q?", boxed(results[-1]), "", steps=results), chat, "none", step_targets=True)


def read(chat: ChatFormat, batch: Batch, row: int) -> list[list[str]]:
    """The labels of each step at the places where the answer has one."""
    places = batch.labels[-1, row] != IGNORE_INDEX
    names = {IGNORE_INDEX: "-", chat.end_id: "end"}
    return [[names.get(i) or chat.decode([i]) for i in step[row, places].tolist()] for step in batch.labels]


@pytest.mark.parametrize(
    ("results", "expected"),
    [
        (["5"], [["\\boxed", "{", "5", "}", "end"]]),
        (["24", "72"], [["\\boxed", "{", "2", "4", "}", "end"], ["\\boxed", "{", "7", "2", "}", "end"]]),
        (["19", "5"], [["\\boxed", "{", "1", "9", "}"], ["\\boxed", "{", "5", "}", "end"]]),  # longer, so it is cut
        (["5", "19"], [["\\boxed", "{", "5", "}", "end", "-"], ["\\boxed", "{", "1", "9", "}", "end"]]),
        (
            ["7", "108", "9"],
            [["\\boxed", "{", "7", "}", "end"], ["\\boxed", "{", "1", "0", "8"], ["\\boxed", "{", "9", "}", "end"]],
        ),
    ],
    ids=str,
)
def test_each_step_learns_the_reply_that_its_result_would_be(
    chat: ChatFormat, results: list[str], expected: list[list[str]]
) -> None:
    batch = collate([answer_at_once(chat, *results)], pad_id=0)

    assert read(chat, batch, 0) == expected
    assert (batch.labels != IGNORE_INDEX).any(0).equal(batch.labels[-1] != IGNORE_INDEX)


def test_rows_with_fewer_results_learn_their_answer_in_the_steps_after(chat: ChatFormat) -> None:
    rows = [answer_at_once(chat, "1", "2", "3"), answer_at_once(chat, "4", "5"), chat.encode_example("Q?", "So 6.")]
    batch = collate(rows, pad_id=0)

    assert batch.labels.shape == (3, 3, batch.input_ids.shape[1])
    assert [step[2] for step in read(chat, batch, 0)] == ["1", "2", "3"]
    assert [step[2] for step in read(chat, batch, 1)] == ["4", "5", "5"]
    assert batch.labels[0, 2].equal(batch.labels[2, 2])
    assert batch.labels[1, 2].equal(batch.labels[2, 2])


@pytest.mark.parametrize(
    ("results", "settled"),
    [
        (["72"], ["111111"]),
        (["24", "72"], ["110011", "111111"]),
        (["19", "5"], ["11000", "11111"]),
        (["5", "19"], ["110000", "111111"]),
        (["12", "34", "32"], ["110011", "110011", "111111"]),  # the 3 of 34 is not yet the answer's
        (["12", "13"], ["111011", "111111"]),
        (["13", "13"], ["111111", "111111"]),
    ],
    ids=str,
)
def test_halting_waits_for_the_last_step_where_a_result_differs(
    chat: ChatFormat, results: list[str], settled: list[str]
) -> None:
    rows = [answer_at_once(chat, "8"), answer_at_once(chat, *results)]
    labels = collate(rows, pad_id=0).labels
    places = labels[-1] != IGNORE_INDEX

    found = settled_labels(labels[:, places], places.nonzero()[:, 0], num_rows=2)

    assert torch.equal(found[:, :5], torch.ones(len(labels), 5, dtype=torch.bool))  # the other row never waits
    assert ["".join(str(int(place)) for place in step[5:]) for step in found] == settled
