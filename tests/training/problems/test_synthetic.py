"""Generated problems: right answers, two splits that never meet, the same for the same seed."""

import re
import zlib
from fractions import Fraction

import pytest

from training.problems import sentences, synthetic
from training.problems.sentences import Bank
from training.problems.synthetic import (
    FAMILIES,
    GROUPS_OF_FAMILIES,
    WRITTEN,
    _belongs,
    make_problem,
    parse_families,
    problems,
)
from trm.answers import is_correct
from trm.errors import ConfigError

EVERYTHING = tuple(FAMILIES)


@pytest.mark.parametrize("split", ["train", "heldout"])
@pytest.mark.parametrize("family", WRITTEN)
def test_every_line_of_a_solution_is_true(family: str, split: synthetic.Split) -> None:
    for problem in problems([family], split, seed=3, count=60):
        *steps, boxed = problem.solution.split("\n")
        for step in steps:
            left, right = step.split("=")
            a, operator, b = re.fullmatch(r"(\d+)([-+*/])(\d+)", left).groups()  # type: ignore[union-attr]
            value = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__}.get(operator, Fraction)(int(a), int(b))
            assert value == int(right)
            assert int(right) >= 0
        assert boxed == rf"\boxed{{{steps[-1].split('=')[1]}}}"
        assert is_correct(problem.solution, problem.answer)
        assert not re.search(r"[{}\[\]|#]", problem.question), "markup is left over"
        assert "  " not in problem.question
        assert problem.question[0].isupper()


@pytest.mark.parametrize("family", FAMILIES)
def test_every_problem_knows_its_equations_and_their_results(family: str) -> None:
    for problem in problems([family], "heldout", seed=3, count=40):
        assert problem.solution == "\n".join([*problem.equations, rf"\boxed{{{problem.answer}}}"])
        assert problem.steps == tuple(equation.split("=")[1] for equation in problem.equations)
        assert problem.steps[-1] == problem.answer


def test_mental_problems_are_those_of_other_families_asked_for_the_answer_alone() -> None:
    mental = list(problems(["mental"], "train", seed=3, count=400))

    assert {problem.work for problem in mental} == {"none"}
    assert {problem.source for problem in mental} == {"mental"}
    assert {len(problem.steps) for problem in mental} >= {1, 2, 3, 4}
    assert {problem.work for problem in problems(WRITTEN, "train", seed=3, count=100)} == {None}


def test_problems_are_the_ones_they_were() -> None:
    """Seeds name them in tests and in measurements that were made."""
    drawn = repr([(p.question, p.solution, p.source) for p in problems(WRITTEN, "heldout", seed=3, count=500)])

    assert zlib.crc32(drawn.encode()) == 3539689724


def test_mental_problems_share_the_numbers_of_their_family(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is held out with its steps written is not trained on without them."""
    asked: list[str] = []
    monkeypatch.setattr(synthetic, "_belongs", lambda split, family, key: not asked.append(family))
    for index in range(40):
        make_problem(["mental"], "train", 3, index)

    assert len(asked) == 40
    assert set(asked) <= set(WRITTEN)


def test_the_same_arguments_give_the_same_problem_and_others_another() -> None:
    def draw(**changes: object) -> str:
        arguments = {"families": EVERYTHING, "split": "train", "seed": 1, "index": 5}
        return make_problem(**(arguments | changes)).question  # type: ignore[arg-type]

    assert draw() == draw()
    assert len({draw(), draw(seed=2), draw(index=6), draw(split="heldout")}) == 4


def test_splits_share_no_question() -> None:
    train = {p.question for p in problems(EVERYTHING, "train", seed=0, count=4000)}
    heldout = {p.question for p in problems(EVERYTHING, "heldout", seed=0, count=1000)}

    assert not train & heldout
    assert len(heldout) > 980


def test_every_heldout_problem_holds_a_sentence_that_training_never_uses(monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[str] = []
    original = synthetic.Draw.say

    def say(draw: synthetic.Draw, bank: Bank, **words: str | int) -> str:
        state = draw.rng.getstate()
        kept = draw.split == "heldout" and bool(bank.heldout) and draw.rng.random() < 0.5
        used.append("heldout" if kept else "seen")
        draw.rng.setstate(state)
        return original(draw, bank, **words)

    monkeypatch.setattr(synthetic.Draw, "say", say)
    for index in range(200):
        used.clear()
        make_problem(EVERYTHING, "heldout", 0, index)
        assert "heldout" in used
        used.clear()
        make_problem(EVERYTHING, "train", 0, index)
        assert set(used) == {"seen"}


def test_sentences_of_a_bank_are_in_one_split_only() -> None:
    banks = [value for value in vars(sentences).values() if isinstance(value, Bank)]

    assert len(banks) > 30
    for bank in banks:
        assert not set(bank.seen) & set(bank.heldout)


def test_heldout_sentences_use_no_word_that_training_does_not_know() -> None:
    banks = [value for value in vars(sentences).values() if isinstance(value, Bank)]
    known = {word for bank in banks for text in bank.seen for word in re.findall(r"[a-z]+", text.lower())}
    new = {word for bank in banks for text in bank.heldout for word in re.findall(r"[a-z]+", text.lower())}

    assert new - known == set()


def test_number_combinations_belong_to_one_split() -> None:
    keys = [("have", (a, b)) for a in range(2, 60) for b in range(2, 60)]
    heldout = [key for key in keys if _belongs("heldout", *key)]

    assert all(_belongs("train", *key) != _belongs("heldout", *key) for key in keys)
    assert 0.1 < len(heldout) / len(keys) < 0.15


def test_groups_of_families() -> None:
    assert parse_families("") == WRITTEN == GROUPS_OF_FAMILIES["all"]
    assert parse_families("easy") == GROUPS_OF_FAMILIES["easy"]
    assert parse_families("have,easy").count("have") == 2  # named twice, drawn twice as often
    assert parse_families("easy*2,mental*3") == (*GROUPS_OF_FAMILIES["easy"] * 2, "mental", "mental", "mental")
    assert set(GROUPS_OF_FAMILIES["easy"]) == {"have", "buy", "give", "lose", "groups", "share", "price"}
    easy = [p.solution.count("\n") for p in problems(parse_families("easy"), "heldout", seed=0, count=500)]
    assert set(easy) == {1, 2}  # one or two steps


@pytest.mark.parametrize("weight", ["", "0", "-1", "1.5", "two", "1000", "٣" * 5000])
def test_a_weight_that_is_none_is_refused(weight):
    with pytest.raises(ConfigError, match="a whole number from 1 to 999"):
        parse_families(f"easy,mental*{weight}")
