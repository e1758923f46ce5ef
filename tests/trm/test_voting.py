"""The majority vote, and when it is over before its end."""

from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trm.voting import Ballot, ballot, decided, majority


def cast(answer: str | None) -> Ballot | None:
    """The ballot of a sample with this in its box, or without one."""
    return None if answer is None else ballot(rf"\boxed{{{answer}}}")


@pytest.mark.parametrize(
    ("text", "vote"), [(r"so \boxed{1,000.0}", "1000"), (r"\boxed{\mathbb{R}}", r"\mathbb{R}")], ids=str
)
def test_a_ballot_is_the_canonical_answer(text, vote):
    assert ballot(text).answer == vote
    assert ballot(text).key == ballot(rf"\boxed{{{vote}}}").key


@pytest.mark.parametrize("text", ["no box", r"\boxed{7", r"\boxed{\,}", r"\boxed{.}", r"\boxed{\text{ }}"])
def test_without_a_box_there_is_no_ballot(text):
    assert ballot(text) is None


@given(
    st.lists(st.sampled_from([*" .,;~$1", r"\,", r"\quad", r"\text{", "{", "}", "**", "`"]), max_size=8).map("".join)
)
def test_nobody_votes_for_nothing(inside):
    vote = ballot(rf"\boxed{{{inside}}}")

    assert vote is None or vote.answer


def test_ties_go_to_the_earliest_sample_and_blanks_do_not_vote():
    assert majority([*map(cast, [None, "2", "1", "1", None, "2"])]) == ("2", {"2": 2, "1": 2}, 1, 2 / 6)
    assert majority([None, None]) == (None, {}, 0, 0)


def test_spellings_of_one_answer_are_one_vote_told_as_first_written():
    ballots = [*map(cast, (r"\mathbb{R}", "(1, 2)", r"$\left(1,2\right)$", "(2,1)"))]

    assert majority(ballots) == ("(1, 2)", {"(1, 2)": 2, r"\mathbb{R}": 1, "(2,1)": 1}, 1, 0.5)
    assert decided(dict(enumerate(ballots[:3])), 4) is False
    assert decided({0: cast("(1,2)"), 1: cast(r"(1,\,2)")}, 3)


@pytest.mark.parametrize(
    ("ballots", "n", "over"),
    [
        ({}, 1, False),
        ({0: None}, 1, True),
        ({0: "1"}, 2, True),  # a tie would be the first sample's
        ({1: "1"}, 2, False),
        ({0: "1", 1: "2"}, 3, False),
        ({0: "1", 2: "1"}, 4, True),
        ({1: "1", 2: "1"}, 4, False),
        ({0: None, 1: None}, 3, False),
        ({0: "1", 1: "1", 2: "2"}, 4, True),
        ({0: "2", 1: "1", 2: "1"}, 4, False),
        ({0: r"\,", 1: r"\,"}, 5, False),  # a box that holds a blank
        ({0: r"\,", 1: r"\,", 2: "1"}, 4, True),
    ],
    ids=str,
)
def test_examples(ballots, n, over):
    assert decided({index: cast(answer) for index, answer in ballots.items()}, n) == over


@st.composite
def votes_in_progress(draw):
    """Up to 7 ballots, up to 3 of them outstanding."""
    ballots = draw(st.lists(st.sampled_from(["1", "2", "3", None]), min_size=1, max_size=7))
    outstanding = draw(st.sets(st.integers(0, len(ballots) - 1), max_size=3))
    return {index: cast(one) for index, one in enumerate(ballots) if index not in outstanding}, len(ballots)


@settings(deadline=None)
@given(votes_in_progress())
def test_a_vote_is_decided_exactly_if_every_way_of_ending_gives_the_same_answer(vote):
    ballots, n = vote
    outstanding = [index for index in range(n) if index not in ballots]
    answers = set()
    for ends in product(["1", "2", "3", "new", "other", None], repeat=len(outstanding)):
        complete = ballots | dict(zip(outstanding, map(cast, ends), strict=True))
        answers.add(majority([complete[index] for index in range(n)]).answer)

    assert decided(ballots, n) == (len(answers) == 1)
