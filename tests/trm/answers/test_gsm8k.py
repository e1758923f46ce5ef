"""GSM8K's answers in our box: each row keeps its own, and no two that differ are the same."""

import json
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import pytest

from trm.answers import canonical, convert_gsm8k, extract_boxed, is_correct, normalize, same

GSM8K = Path(__file__).parents[4] / "shared" / "gsm8k"


@pytest.mark.parametrize("final", ["72", "1,234", "-5", "3.5", "$18", "1/2", "7:30"])
def test_convert_replaces_the_last_line_and_copies_the_answer_as_written(final):
    converted = convert_gsm8k(f"First.\nThen <<1+1=2>>2.\n#### {final}")

    assert converted == f"First.\nThen 2.\n\\boxed{{{final}}}"
    assert converted.count("\\") == 1  # the predecessor wrote a backspace, then two backslashes
    assert extract_boxed(converted) == final


def test_convert_keeps_annotations_on_request():
    answer = "48/2 = <<48/2=24>>24 clips.\n#### 24"

    assert convert_gsm8k(answer) == "48/2 = 24 clips.\n\\boxed{24}"
    assert convert_gsm8k(answer, keep_annotations=True) == "48/2 = <<48/2=24>>24 clips.\n\\boxed{24}"


@pytest.mark.parametrize("answer", ["a\r\n####72\r\n", "a\r\n#### 72", "a\r\n####  72  \n\n"], ids=repr)
def test_convert_does_not_care_about_the_space_around_the_answer(answer):
    assert convert_gsm8k(answer) == "a\r\n\\boxed{72}"


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ("no final answer", "has no '####'"),
        ("", "has no '####'"),
        ("so\n####", "needs one line after '####', got ''"),
        ("so\n#### <<1+1=2>> \n", "needs one line after '####', got ''"),
        ("so\n#### 72\nand more", r"needs one line after '####', got '72\\nand more'"),
    ],
)
def test_convert_says_what_is_wrong(answer, message):
    with pytest.raises(ValueError, match=message):
        convert_gsm8k(answer)


@pytest.fixture(scope="module")
def rows():
    files = sorted(GSM8K.glob("*.jsonl"))
    if not files:
        pytest.skip(f"{GSM8K} is not here")
    found = [json.loads(line) for file in files for line in file.read_text(encoding="utf-8").splitlines()]
    assert len(found) > 1000
    return found


def test_every_row_converts_to_its_own_answer_in_one_box(rows):
    for row in rows:
        answer, question = row["answer"], row["question"]
        converted = convert_gsm8k(answer)
        assert is_correct(converted, answer), answer
        assert is_correct(converted, answer, question), answer
        assert isinstance(normalize(extract_boxed(converted)), Fraction), answer
        assert converted.count(r"\boxed") == 1
        assert "####" not in converted
        assert "<<" not in converted


def test_no_two_golds_are_the_same(rows):
    distinct = sorted({canonical(row["answer"].rpartition("####")[2]) for row in rows}, key=Fraction)

    assert len(distinct) > 500
    for one, other in pairwise(distinct):
        assert not same(one, other)
        assert same(f"{int(one):,}" if one.isdigit() else one, one)
