r"""One spelling per equation, and only of equations."""

import time

import pytest

from training.sampling.equations import equations, holds, results


@pytest.mark.parametrize(
    "text",
    [
        "48/2=24",
        "48 / 2 = 24.",
        r"$48\div2=24$",
        r"\[ \$48 \div 2 = \$24.00 \]",
        r"\frac{48}{2} &= 24",
        "<<48/2=24>>24",
        "She sold 48/2 = <<48/2=24>>24 clips",
        "x = 48÷2 = 24",
        "**48 / 2 = 24**",
        "(48 / 2 = 24)",
        "1) 48/2=24",
        "- 48/2=24",
        "half of 48: 48/2=24, and again 48 / 2 = 24",
    ],
)
def test_spellings_of_one_equation(text: str) -> None:
    assert equations(text) == ("48/2=24",)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("5+3=8\n8*2=16", ["5+3=8", "8*2=16"]),
        ("5 + 3 = 8 and then 8 x 2 = 16", ["5+3=8", "8*2=16"]),
        ("3 × $1,200.50 = $3,601.50", ["3*1200.5=3601.5"]),
        ("1,200 + .5 = 1,200.5", ["1200+0.5=1200.5"]),
        ("5,6 + 1 = 7", ["6+1=7"]),
        ("20% * 50 = 10", ["20*50=10"]),
        ("2*(3+4) = 2*7 = 14", ["2*(3+4)=2*7=14"]),
        (r"\left(3 + 4\right) \times 2 = 14\text{ apples}", ["(3+4)*2=14"]),
        (r"\frac{5+3}{2} = 4", ["(5+3)/2=4"]),
        ("24 = 48/2", ["24=48/2"]),
        ("5 − 8 = -3", ["5-8=-3"]),
        ("is 8 9 - 1 = 8", ["9-1=8"]),
        ("5 + 3 =\n8", []),
        ("48 clips / 2 = 24", []),
        ("x = 5, and 5 = 5", []),
        ("4 * x = 8", []),
        (r"so \boxed{24}", []),
        ("", []),
    ],
)
def test_what_is_an_equation(text: str, found: list[str]) -> None:
    assert equations(text) == tuple(found)


@pytest.mark.parametrize("part", ["1+", "(", "( ", "1 ", "1=", "(1)", "<<", r"\frac{", "- ", "1 x"])
def test_a_reply_that_repeats_itself_takes_linear_time(part: str) -> None:
    began = time.process_time()

    equations(part * 30_000)

    assert time.process_time() - began < 2  # quadratic: minutes


def test_results_end_in_the_answer_or_are_none() -> None:
    assert results(("48/2=24", "48+24=72"), "72") == ["24", "72"]
    assert results(("48/2=24", "48+24=72"), "$72.00") == ["24", "72"]
    assert results(("48/2=24", "48+24=72"), "24") is None
    assert results(("24=48/2",), "24") == ["24"]
    assert results(("2*7=7+7", "7+7=14"), "14") is None
    assert results((), "24") is None


@pytest.mark.parametrize(
    "equation",
    ["48/2=24", "3=6/2", "2*(3+4)=2*7=14", "5-8=-3", "0.1+0.2=0.3", "2^3=8", "-(2+3)*2=-10", "10/3=3.33", "2/3=0.67",
     "2/3=0.66", "-2/3=-0.66", "1.5*2=3=3.0", "-14+-8+1=-21", "2*-3=-6", "5-(-3)=8"],
)  # fmt: skip
def test_what_holds(equation: str) -> None:
    assert holds(equation)
    assert results(("1+1=2", equation, "2*2=4"), "4")


@pytest.mark.parametrize(
    "equation",
    ["48/2=25", "20*50=10", "-5=10-5=5", "10-5=5=-5", "1/2*2=7", "10/3=3", "7/2=4", "2/3=0.68", "10/3=3.34", "1/0=1",
     "9^9^9^9=1", "(((9^-99)^99)^99)^99=1", "2^101=1", "2^(1/2)=1.41", "((1+2)*3=9", "1=1+1=1.9"],
)  # fmt: skip
def test_what_does_not_hold_gives_no_steps(equation: str) -> None:
    assert not holds(equation)
    assert results(("1+1=2", equation, "2*2=4"), "4") is None


@pytest.mark.parametrize("side", ["1+" * 30_000 + "1", "(" * 30_000 + "1" + ")" * 30_000, "9^9*" * 30_000 + "1"])
def test_an_endless_side_does_not_hold(side: str) -> None:
    assert not holds(f"{side}=2")


@pytest.mark.parametrize(
    "reply",
    ["20% of 50 is 20% * 50 = 10", "5 boxes * 2 * 3 = 30", "2x + 3 + 1 = 11", "48 clips - 24 + 3 = 27", "3 1/2 * 2 = 7",
     r"\frac{x}{2} + 3 \times 4 = 20"],
)  # fmt: skip
def test_half_an_equation_is_read_as_one_that_does_not_hold(reply: str) -> None:
    (equation,) = equations(reply)
    assert results((equation,), equation.rpartition("=")[2]) is None
