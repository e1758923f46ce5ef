"""Answers that can be read in more than one way: which readings may meet, and golds of every size and type."""

from decimal import Decimal
from fractions import Fraction

import pytest

from trm.answers import is_correct, same


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("1,234", "1, 234"),
        ("100,100", "100, 100"),
        ("2,500,750", r"2, 500 \text{ and } 750"),
        ("3,250", "x = 3, y = 250"),
        ("x = 7, y = 7", "7, 7"),
        ("a = 4, b = 9", r"4 \text{ and } 9"),
    ],
)
def test_a_list_in_its_order(one, other):
    assert same(one, other)
    assert same(other, one)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("1,001", "1"),
        ("2,002", "2"),
        ("100,100", "100"),
        ("250,250,250", "250"),
        ("1,000", "0, 1"),
        ("1,000", "1, 0"),
        ("2,003", "3, 2"),
        ("2,003", "2, 3"),
        ("5,120", "120, 5"),
        ("1,234", "(1, 234)"),
        ("1,234 and 1,234", "1, 234"),
        ("x = 7, y = 7", "7"),
        ("x = 4, y = 9", "9, 4"),
        ("x = 4, y = 9", r"\{9, 4\}"),
        ("a = 4, b = 9, c = 4", "4, 9"),
    ],
)
def test_a_list_in_another_order_or_with_fewer_members(one, other):
    assert not same(one, other)
    assert not same(other, one)


def test_a_gold_with_separators_is_not_its_first_digits():
    for thousands in range(1, 100):
        for rest in (0, thousands, 100 + thousands):
            gold = f"#### {thousands},{rest:03}"
            assert is_correct(rf"\boxed{{{thousands * 1000 + rest}}}", gold)
            assert not is_correct(rf"\boxed{{{thousands}}}", gold)
            assert not is_correct(rf"\boxed{{{rest}}}", gold)


@pytest.mark.parametrize("blank", ["", " ", ".", "$", "and", ",", "$$", r"\,", "{}", r"\text{}", " " * 3000], ids=ascii)
@pytest.mark.parametrize(
    "other", ["", ".", "$", "and", r"\quad", "0", r"\emptyset", r"\{\}", "A", " " * 3000], ids=ascii
)
def test_nothing_is_right_where_either_says_nothing(blank, other):
    assert not is_correct(rf"\boxed{{{blank}}}", other)
    assert not is_correct(rf"\boxed{{{other}}}", blank)


def test_an_empty_set_is_an_answer():
    assert same(r"\{\}", r"\emptyset")


BIG = 10**5000


@pytest.mark.parametrize(
    ("gold", "written"),
    [
        (BIG, "1" + "0" * 5000),
        (-BIG, "-1" + "0" * 5000),
        (Fraction(10**4500, 3), "1" + "0" * 4500 + "/3"),
        (Fraction(-1, BIG), "-1/1" + "0" * 5000),
        (Decimal(BIG), "1" + "0" * 5000),
    ],
    ids=["int", "negative", "fraction", "denominator", "decimal"],
)
def test_a_gold_may_have_any_number_of_digits(gold, written):
    assert is_correct(rf"\boxed{{{written}}}", gold)
    assert not is_correct(r"\boxed{1}", gold)


def test_a_gold_of_another_type_is_refused_whatever_it_holds():
    with pytest.raises(TypeError, match="not list"):
        is_correct(r"\boxed{1}", [BIG])


@pytest.mark.parametrize("text", ["x³" * 900, "½" * 1999, "\ufdfa" * 500, "9" * 1999, "a " * 2000], ids=ascii)
def test_what_is_too_long_to_be_read_equals_itself(text):
    assert same(text, text)
    assert not same(text, text + "1")
    assert not same(text, "1")


@pytest.mark.parametrize(
    ("one", "other", "alike"),
    [
        (r"\frac{22}{7} \approx 3.14", "3.14", True),
        (r"\sqrt{10} \approx 3.16", "3.16", True),
        (r"\frac{200}{3} \approx 67", "67", True),
        (r"5 \approx 100", "100", False),
        (r"2 + 2 \approx 5", "5", False),
        (r"-8 \approx 8", "8", False),
        (r"0 \approx 1", "1", False),
    ],
)
def test_an_approximation_is_near(one, other, alike):
    assert same(one, other) is alike
    assert same(other, one) is alike
