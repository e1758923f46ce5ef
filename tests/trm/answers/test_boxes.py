"""Boxes: which one speaks, and when there is none."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trm.answers import Boxed, extract_boxed, find_boxed, is_correct


@pytest.mark.parametrize(
    ("reply", "inside"),
    [
        (r"So \boxed{18}.", "18"),
        (r"\boxed{5} no wait, \boxed{7}", "7"),
        (r"\boxed{18} and \boxed{}", "18"),
        (r"\boxed{18} and \boxed{ }", "18"),
        (r"\boxed{18} and \boxed{\,}", "18"),
        (r"\boxed{18} and \boxed{~\quad \ }", "18"),
        (r"\boxed{18} and then \boxed{1", "18"),
        (r"\boxed{18 and then \boxed{7}", "7"),
        (r"\\boxed{18}", "18"),
        (r"\\\boxed{18}", "18"),
        (r"\boxed {18}", "18"),
        ("\\boxed\n{ 18 }", "18"),
        (r"\fbox{18}", "18"),
        (r"\boxed{\frac{3}{4}}", r"\frac{3}{4}"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{\}}", r"\}"),
        (r"\boxed{a \\{b} c}", r"a \\{b} c"),
        (r"\boxed{\boxed{5}}", "5"),
        (r"\boxed{\boxed{5}", "5"),
        (r"\boxed{x = \boxed{5} m}", "5"),
        (r"\boxed{5\boxed{}}", "5"),
        (r"} \boxed{5} }", "5"),
        (r"\boxed 18", "18"),
        (r"\boxed18", "18"),
        (r"$\boxed 18$.", "18"),
        (r"\boxed -1,234.5, as said", "-1,234.5"),
        (r"\boxed 3/4", "3/4"),
        (r"\boxed 7:30", "7:30"),
        (r"\boxed \$18", r"\$18"),
        (r"\boxed A.", "A"),
        (r"\boxed{18} goes in \boxed notation", "18"),
        (r"\boxed{18\}", "18"),  # a backslash too many
        (r"so \boxed{\frac{1}{2}\}$.", r"\frac{1}{2}"),
    ],
)
def test_last_nonempty_box_speaks(reply, inside):
    assert find_boxed(reply) == Boxed(inside, "boxed")
    assert extract_boxed(reply) == inside


@pytest.mark.parametrize(
    "reply",
    [r"\boxed{18", r"\boxed{", r"so \boxed", r"\boxed{\frac{1}{2}", r"\boxed{} \boxed{1", r"\boxed{\{1, 2\}"],
)
def test_cut_off_box_is_truncated(reply):
    assert find_boxed(reply) == Boxed(None, "truncated")


@pytest.mark.parametrize(
    "reply",
    [
        "",
        "The answer is 18.",
        "boxed{18}",
        "\boxed{18}",  # a backspace, not a backslash: the escape that Python makes of it
        "\fbox{18}",  # a form feed
        r"\boxed{}",
        r"\boxed{\boxed{}}",
        r"\boxedness{18}",
        r"put it in \boxed and stop",
        r"\boxed 18km",
        r"\boxed 1{,}234",
    ],
    ids=repr,
)
def test_no_box_is_missing(reply):
    assert find_boxed(reply) == Boxed(None, "missing")
    assert not is_correct(reply, "18")


@settings(deadline=None)
@given(
    before=st.text(),
    inside=st.text(alphabet="0123456789 +-*/=abc").filter(str.strip),
    after=st.text(alphabet="0123456789 abc."),
)
def test_whatever_surrounds_the_last_box(before, inside, after):
    assert extract_boxed(rf"{before} \boxed{{{inside}}} {after}") == inside.strip()
