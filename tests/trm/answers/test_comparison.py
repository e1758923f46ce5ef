"""What counts as the same answer, what differs, and how an answer is shown."""

from decimal import Decimal
from fractions import Fraction
from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trm.answers import canonical, is_correct, key, normalize, same

NUMBERS = {
    # thousands
    r"1,234": 1234,
    r"1{,}234": 1234,
    r"1\,234": 1234,
    r"1,\!234": 1234,
    "1\u00a0234": 1234,
    "1\u202f234": 1234,
    "1\u2009234": 1234,
    "1 234": 1234,
    "1 234 567.5": Fraction(2469135, 2),
    r"1,234,567": 1234567,
    # money, percent, units, labels
    r"$18": 18,
    r"\$18.00": 18,
    r"\$1{,}234.50": Fraction(2469, 2),
    r"-\$5": -5,
    r"$-5": -5,
    "€5": 5,
    "5€": 5,
    "£5": 5,
    "5%": 5,
    r"25\%": 25,
    r"25\%\text{ off}": 25,
    "18 apples": 18,
    "18 apples.": 18,
    "18 dollars": 18,
    r"18\text{ apples}": 18,
    r"18\ \mathrm{km}": 18,
    r"18~\text{km}": 18,
    r"18\text{km}": 18,
    "18km": 18,
    "18 m": 18,
    r"18\,\text{cm}^2": 18,
    r"18\text{ cm}^{2}": 18,
    r"18\text{ cm²}": 18,
    r"18\text{ cm}^{\text{2}}": 18,
    "18 cm²": 18,
    "18 m/s^2": 18,
    r"60\text{ km/h}": 60,
    r"\$5/\text{hour}": 5,
    "60 miles per hour": 60,
    r"18^\circ": 18,
    r"18^{\circ}\text{C}": 18,
    "18°C": 18,
    "1/2 cup": Fraction(1, 2),
    "1/2 of a cup": Fraction(1, 2),
    "18 (eighteen)": 18,
    "x = 18": 18,
    "x=18": 18,
    "f(x) = 18": 18,
    "Total: 18": 18,
    r"\text{Answer: }x = 18": 18,
    "The answer is 18": 18,
    "approximately 18": 18,
    r"\approx 18": 18,
    r"x \approx 18": 18,
    "~18": 18,
    # wrapping
    r"\text{18}": 18,
    r"\textbf{18}": 18,
    r"\text{\textbf{18}}": 18,
    "$18$": 18,
    r"\(18\)": 18,
    r"\left(18\right)": 18,
    "(18)": 18,
    # spelling
    "18.": 18,
    "18.00": 18,
    ".5": Fraction(1, 2),
    "0.50": Fraction(1, 2),
    "007": 7,
    "+5": 5,
    "-0": 0,
    "\u22127": -7,
    "\u20137": -7,
    "\uff11\uff18": 18,  # full width
    "0.1": Fraction(1, 10),
    # fractions
    "3/4": Fraction(3, 4),
    "3 / 4": Fraction(3, 4),
    r"\frac{3}{4}": Fraction(3, 4),
    r"\\frac{3}{4}": Fraction(3, 4),
    r"\dfrac34": Fraction(3, 4),
    r"\frac12": Fraction(1, 2),
    r"\frac1{2}": Fraction(1, 2),
    r"\tfrac{1}{2}": Fraction(1, 2),
    r"-\frac{1}{2}": Fraction(-1, 2),
    r"\frac{-1}{2}": Fraction(-1, 2),
    r"\frac{1}{-2}": Fraction(-1, 2),
    r"\frac{1{,}000}{3}": Fraction(1000, 3),
    r"\frac{\text{3}}{4}": Fraction(3, 4),
    r"1\frac{1}{2}": Fraction(3, 2),
    r"-1\frac{1}{2}": Fraction(-3, 2),
    "1 1/2": Fraction(3, 2),
    "½": Fraction(1, 2),
    "1½ cups": Fraction(3, 2),
    # powers of ten
    r"1.5\times 10^3": 1500,
    "1.5 x 10^3": 1500,
    "1.5\u00d710³": 1500,
    r"2\cdot10^{-3}": Fraction(1, 500),
    "1e3": 1000,
    "1.5E-3": Fraction(3, 2000),
    "10^{2}": 100,
    "-10^2": -100,
    "10³": 1000,
    # numbers inside mathematics
    r"9 \times 2 = 18": 18,
    r"x = 9 + 9 = 18": 18,
    r"5! = 120": 120,
    r"\frac{36}{2} = 18 \text{ apples}": 18,
    r"11,\! 111,\! 100": 11111100,
    r"111, \! 111": 111111,
    r"12 \text{ gm}": 12,
    r"-(3/4)": Fraction(-3, 4),
    r"5 \div 2": Fraction(5, 2),
    r"2\frac12": Fraction(5, 2),
    "10^{-3}": Fraction(1, 1000),
    r"0.1\overline{6}": Fraction(1, 6),
    r".\overline{6}": Fraction(2, 3),
    "0.(3)": Fraction(1, 3),
    "2.(142857)": Fraction(15, 7),
    # dress
    "{18}": 18,
    "**18**": 18,
    "`18`": 18,
    r"\textcolor{blue}{18}": 18,
    r"{\color{red} 18}": 18,
    r"\mathbf{18}": 18,
    r"US\$18": 18,
    "18\\": 18,
    r"90\degree": 90,
    r"90^{\circ}": 90,
    "18\\\\": 18,
    "*18*": 18,
    '"18"': 18,
    "18\u200b": 18,
    "\ufeff18": 18,
    r"\Large 18": 18,
    "= 18": 18,
    r"\Rightarrow 18": 18,
    # units that are ones
    "18 in": 18,
    r"18 \text{ in}^2": 18,
    "18 sq. ft.": 18,
    "18¢": 18,
    "₩18": 18,
    "USD 18": 18,
    "Rs. 18": 18,
    "18 square feet": 18,
    "3 red apples": 3,
    "18 puppies": 18,
    "2 roots": 2,
    r"\text{Length of the third side} = 18": 18,
    "5 years older": 5,
    r"15\mbox{ cm}^2": 15,
    r"\mathbf{15\text{ cm}^2.}": 15,
}


@pytest.mark.parametrize(("answer", "number"), NUMBERS.items(), ids=ascii)
def test_numbers_are_exact(answer, number):
    assert normalize(answer) == number
    assert isinstance(normalize(answer), Fraction)
    assert is_correct(rf"So \boxed{{{answer}}}.", canonical(answer))
    assert not is_correct(rf"So \boxed{{{answer}}}.", str(Fraction(number) + 1))


TEXTS = {
    # no number at all
    "A": "A",
    "(A)": "A",
    r"\text{Monday}": "Monday",
    r"\textbf{ Monday  morning }.": "Monday morning",
    "\uff2d\uff4f\uff4e": "\uff2d\uff4f\uff4e",
    "two": "two",
    r"\sqrt{2}": r"\sqrt{2}",
    r"\dfrac{\pi}{2}": r"\dfrac{\pi}{2}",
    # more than one number
    "7:30": "7:30",
    "7:30  PM": "7:30 PM",
    "18:00": "18:00",
    "3:4": "3:4",
    "3 and 4": "3 and 4",
    "5, 6": "5, 6",
    "1, 234": "1, 234",
    "(1,234)": "(1,234)",
    "3-4": "3-4",
    "5 ft 3 in": "5 ft 3 in",
    "1/2/2024": "1/2/2024",
    r"2\times 3": r"2\times 3",
    # not plainly a number, or not plainly one
    "1,23": "1,23",
    "12,34,567": "12,34,567",
    "0,123": "0,123",
    "1,234 567": "1,234 567",
    "12 34": "12 34",
    "1 234 5": "1 234 5",
    "1.2.3": "1.2.3",
    "--5": "--5",
    "1/0": "1/0",
    r"\frac{1}{0}": r"\frac{1}{0}",
    "1 5/2": "1 5/2",
    # one number, which the rest changes
    "3x": "3x",
    "3xy": "3xy",
    "5m": "5m",
    r"5\pi": r"5\pi",
    r"5\\pi": r"5\\pi",
    "5!": "5!",
    "5²": "5²",
    "2^{10}": "2^{10}",
    "101₂": "101₂",
    "2 million": "2 million",
    "3 and a half": "3 and a half",
    "5 less than x": "5 less than x",
    "18th": "18th",
    "x >= 5": "x >= 5",
    r"\pm 5": r"\pm 5",
    "at least 5": "at least 5",
    r"$\mathbb{R}$": r"\mathbb{R}",
    r"\begin{pmatrix} 1 \\ -2 \end{pmatrix}": r"\begin{pmatrix} 1 \\ -2 \end{pmatrix}",
    r"**x + 1**.": "x + 1",
    "6abc": "6abc",
    r"3 \sin x": r"3 \sin x",
    "3 sevenths": "3 sevenths",
    "2 millions": "2 millions",
    "5 below zero": "5 below zero",
    "3 out of four": "3 out of four",
    "12 m^2 n": "12 m^2 n",
    "18 wugs": "18 wugs",
    "5 lakh": "5 lakh",
    "2 score": "2 score",
    "5 gross": "5 gross",
    "5 double apples": "5 double apples",
    "3 root": "3 root",
    "3 cube": "3 cube",
    # a preface that says something else
    "not x = 5": "not x = 5",
    "it is false that x = 5": "it is false that x = 5",
    "not equal to: 5": "not equal to: 5",
    "one less than: 5": "one less than: 5",
    "at least: 5": "at least: 5",
    "Negative: 5": "Negative: 5",
    "Twice: 5": "Twice: 5",
    "half is 5": "half is 5",
    "two thirds of x = 5": "two thirds of x = 5",
    "the number doubled is 10": "the number doubled is 10",
    r"9 \times 2 = 19": r"9 \times 2 = 19",
    "3 : 4": "3 : 4",
    # too large to write out
    "10^{999999999}": "10^{999999999}",
    "1e-999999999999": "1e-999999999999",
    "1e400": "1e400",
}


@pytest.mark.parametrize(("answer", "text"), TEXTS.items(), ids=ascii)
def test_anything_else_stays_text(answer, text):
    assert normalize(answer) == text
    assert canonical(answer) == text
    assert is_correct(rf"\boxed{{{answer}}}", answer)


@pytest.mark.parametrize(
    ("answer", "shown"),
    [
        ("18.00", "18"),
        ("-0", "0"),
        ("-0.0", "0"),
        ("1,234.50", "1234.5"),
        (r"\frac{3}{4}", "0.75"),
        ("-1/8", "-0.125"),
        ("1/3", "1/3"),
        ("-2/6", "-1/3"),
        ("7/14", "0.5"),
        ("1/40", "0.025"),
        ("0.1", "0.1"),
        ("1e-20", "0.00000000000000000001"),
        ("12345678901234567890.12345678901234567890", "12345678901234567890.1234567890123456789"),
        ("10^{30}", "1" + "0" * 30),
    ],
)
def test_canonical_has_one_spelling_per_number(answer, shown):
    assert canonical(answer) == shown


@pytest.mark.parametrize(
    ("reply", "gold", "correct"),
    [
        (r"\boxed{72}", "It is so.\n#### 72", True),
        (r"\boxed{72.0}", "72", True),
        (r"\boxed{1234}", "#### 1,234", True),
        (r"\boxed{\$5}", "#### $5", True),
        (r"\boxed{73}", "72 and more\n#### 72", False),
        (r"\boxed{5} no, \boxed{72}", "5", False),
        (r"\boxed{7:30 PM}", "7:30 pm", True),
        (r"\boxed{7:30}", "7", False),
        (r"\boxed{72", "72", False),
        ("72", "72", False),
        ("72", "", False),
        (r"\boxed{3x}", "3", False),
        (r"\boxed{18 wugs}", "18", False),
        (r"\boxed{18}", r"so it is \boxed{18}.", True),
        (r"\boxed{18}", r"\boxed{17}", False),
        (r"\boxed{\frac{1}{2}}", Fraction(1, 2), True),
        (r"\boxed{0.5}", Decimal("0.50"), True),
        (r"\boxed{1{,}000}", Decimal("1E+3"), True),
        (r"\boxed{-3}", -3, True),
        (r"\boxed{3}", -3, False),
    ],
)
def test_is_correct_grades_the_box_alone(reply, gold, correct):
    assert is_correct(reply, gold) is correct


def test_the_question_says_what_it_wants_counted():
    question = "How many blue wugs are in the box?"

    assert is_correct(r"\boxed{18 wugs}", "18", question)
    assert is_correct(r"\boxed{18 blue wugs}", "18", question)
    assert not is_correct(r"\boxed{18 zorps}", "18", question)
    assert not is_correct(r"\boxed{18 sevenths}", "18", "How many sevenths?")


@pytest.mark.parametrize("gold", [18.0, None, True, b"18", ["18"]], ids=repr)
def test_a_gold_of_another_type_is_refused(gold):
    with pytest.raises(TypeError, match=f"not {type(gold).__name__}"):
        is_correct(r"\boxed{18}", gold)


ONE_VOTE = [  # groups of spellings; between two groups everything differs
    ["(1, 2)", "(1,2)", r"\left(1,2\right)", r"\left( 1 , \, 2 \right)", r"$(1,\!2)$", "(x, y) = (1, 2)"],
    ["(2,1)", "( 2, 1 )"],
    ["(1,2]", r"\left(1, 2\right]", r"x \in (1,2]"],
    ["[1,2]", r"x\in[1,2]", r"[\tfrac22, 2]"],
    [r"\{1, 2\}", "1, 2", "2,1", r"2 \text{ and } 1", "1 or 2", r"\{2,1\}", "x = 1, 2", "x=2 or x=1"],
    ["1, 2, 3", r"3, 1, \text{ and } 2", "1; 2; 3", r"\{3,2,1\}"],
    ["x = 1, y = 3", r"y=3 \text{ and } x=1"],
    ["x = 3, y = 1"],
    ["(1,2), (3,4)", r"(3,4)\text{ and }(1,2)"],
    ["(1,2), (4,3)"],
    [r"\sqrt2", r"\sqrt{2}", r"\sqrt 2", "√2", "sqrt(2)", "{\\sqrt{2}}", "2^{1/2}"],
    [r"\sqrt3 / 2", r"\frac{\sqrt{3}}{2}", r"\dfrac{\sqrt3}2", r"\frac12\sqrt3", r"\tfrac{1}{2} \cdot \sqrt{3}"],
    [r"\frac{2\pi}{3}", r"2\pi/3", r"\frac23\pi", "2π/3", r"\frac{2}{3} \times \pi", r"\frac{2\pi}{3}\text{ cm}"],
    [r"-\frac{x}{2}", r"\frac{-x}{2}", r"-\frac12 x", r"\frac{x}{-2}"],
    ["x+1", "1+x", r"x\,+\,1", r"\mathrm{x}+1", r"\left(x+1\right)", "y = x + 1"],
    ["x-1", "-1+x"],
    ["2x", r"2\cdot x", r"2 \times x", "2*x", "2 x"],
    ["x^{10}", "x^10", "x**10", "x¹⁰"],
    ["x^2y", r"x^{2} y"],
    ["x^{2y}"],
    [r"\begin{pmatrix} 1 \\ -2 \end{pmatrix}", r"\begin{bmatrix}1\\-2\end{bmatrix}"],
    [r"\begin{pmatrix} 1 \\ 3 \end{pmatrix}", r"\left(\begin{array}{c} 1 \\ 3 \end{array}\right)"],
    [r"\log_2 128", r"\log_{2}{128}", r"\log_2(128)"],
    [r"\begin{pmatrix} 1 & -2 \end{pmatrix}"],
    [r"\begin{pmatrix} -2 \\ 1 \end{pmatrix}"],
    ["(1 -2)", "-1"],
    ["N", r"\text{N}", "$N$"],
    ["n"],
    ["A", "(A)", r"\textbf{(A)}\ 18", "A. 18", "A) 18", r"\text{(A) } 18"],
    ["a"],
    [r"\Delta", "Δ"],
    [r"\delta", "δ"],
    [r"\mathbb{R}", "ℝ", r"x \in \mathbb{R}"],
    ["R"],
    ["AB"],
    ["ab"],
    [r"(-\infty, 2) \cup (3, \infty)", r"(3,+\infty)\cup(-\infty,2)", "(-∞,2) ∪ (3,∞)"],
    [r"(-\infty, 2] \cup (3, \infty)"],
    ["x > 5", "5 < x", r"x \gt 5"],
    [r"x \ge 5", "5 <= x", r"x \geqslant 5"],
    ["x < 5"],
    [r"1 \pm \sqrt{2}", r"1+\sqrt2, 1-\sqrt2", r"\{1-\sqrt{2}, \sqrt2 + 1\}", r"x = 1\pm\sqrt{2}"],
    ["3 : 4", "3:4", r"3\colon 4", r"A : B = 3 : 4"],
    ["4 : 3"],
    ["7:30 PM", r"7:30\text{ p.m.}", "7:30 pm"],
    ["101_2", "101_{2}", "101₂", r"101_{\text{2}}"],
    ["101_3"],
    ["101"],
    ["Monday", r"\text{Monday}", "monday", "**Monday**."],
    ["18", "18 apples", r"\{18\}", r"6 \cdot 3", r"3^2 \cdot 2", r"\binom{18}{1}"],
    ["18x"],
    ["18 million"],
    [r"\sin 30^\circ", r"\sin\frac{\pi}{6}", r"\sin(30\degree)"],
    [r"\sin 30"],
    [r"3\sin x", r"3 \sin(x)", "3 sin x"],
    [r"\sin 3x"],
    ["f(2)", r"f\left( 2 \right)"],
    ["2f"],
    ["f(x+1)", "f(1 + x)"],
    ["6abc", "6 a b c"],
    ["3 sevenths", r"3 \text{ sevenths}"],
    ["5 below zero"],
    ["3 out of four"],
    ["12 m^2 n", "12m^2n"],
    [r"9 \times 2 = 19"],
    ["x + y = 19", "19 = x+y"],
    [r"\{x \mid x > 0\}", r"\{ x : x > 0 \}"],
    ["|x|", r"\lvert x\rvert", r"\left| x \right|"],
    ["No", "no", r"\text{No}"],
    [r"\sqrt.25", "0.5"],
    [r"\frac1.5"],
    [r"\frac1e5"],
    ["0.1(6)"],
    ["2^3^2"],
    ["64", "(2^3)^2"],
    ["3\\pi"],
    [r"\pi = 2\pi = 3\pi"],
    [r"x = 2\pi = 5"],
    [r"\sqrt{2} = \sqrt{3} = 5"],
    [r"2\sqrt{2}", r"x = \sqrt{8} = 2\sqrt{2}"],
    [r"\emptyset", r"\{\}"],
    [r"\{\emptyset\}"],
    [r"\{\{7\}\}"],
    [r"\{\{7\}, \{8\}\}"],
    [r"\{\{7, 8\}\}"],
    [r"(7, \{8\})"],
    ["(7, 8)"],
    ["6 boys and 7 boys", "6, 7", "7 boys, 6 boys"],
    ["3 girls, 4 boys", "4 boys and 3 girls", "boys: 4, girls: 3"],
    ["4 girls, 3 boys"],
    ["length: 3, width: 4", "width = 4 m; length = 3 m", "The width is 4 and the length is 3"],
    ["length: 4, width: 3"],
    ["3 m, 4 cm", r"4\text{ cm}, 3\text{ m}"],
    ["3 cm, 4 m"],
    ["x < 1 or x > 2", "x > 2 or x < 1", r"x < 1 \lor 2 < x", "x < 1, x > 2"],
    ["x < 1 and x > 2", r"(x < 1) \wedge (x > 2)"],
    ["x < 1 and x > 2 or x = 5"],
    ["x < 1 or x > 2 and x = 5"],
    [r"p \land q", r"q \wedge p", "p ∧ q"],
    [r"p \lor q", "p ∨ q", "p, q", "p and q"],
    [r"\{x \mid x > 1 \text{ and } x < 2\}"],
    [r"\{x \mid x > 1 \text{ or } x < 2\}"],
    ["2, 2, 3", "2, 3 and 2", "2 cm, 2 cm, 3 cm"],
    ["2, 3, 3"],
    [r"\{2, 3\}", r"\{2, 3, 3\}", "2, 3", r"3 \text{ and } 2", "x=2 or x=3", r"x=2 \text{ or } x=3"],
    ["[0,1]", r"x \in [0,1]", r"\left[0,\;1\right]"],
    ["(5, 6), (7, 8)", "(7, 8), (5, 6), (5, 6)"],
    [r"\{5\}, \{6\}", r"\{6\}, \{5\}"],
    [r"5 \approx 100"],
    [r"2 + 2 \approx 5"],
    [r"\pi \approx 100"],
    [r"\pi", r"\pi \approx 3.14"],
    ["12", r"12 \pm 0", "-(-12)"],
    [r"\{8 \pm 1, -2\}", r"x = \{8 \pm 1, -2\}", r"8 \pm 1, -2", "7, 9, -2"],
    [r"x \equiv 3 \pmod{7}", r"x \equiv 3 \pmod 7", "x ≡ 3 (mod 7)", r"x ≡ 3\ (\text{mod } 7)", r"x \equiv 3\bmod7"],
    [r"x \equiv 4 \pmod{7}"],
    [r"x \equiv 3 \pmod{8}"],
    [r"10 \pmod 7"],
    [r"x \neq 2", r"x \not= 2", r"x \not = 2", "2 ≠ x"],
    [r"a \not\in S", r"a \notin S", "a ∉ S"],
    [r"a \not> b"],
    [r"P \iff Q", r"P \Leftrightarrow Q", "P ⇔ Q"],
    [r"\sin^{-1} x", r"\sin^{-1}(x)", r"\arcsin x", r"\sin^{-1}{x}"],
    [r"(\sin x)^{-1}"],
    [r"\sinh^{-1} x"],
    [r"f \circ g"],
    [r"g \circ f"],
    ["f g"],
    ["f'(t) + 1", r"f^\prime(t) + 1", r"1 + f^{\prime}(t)"],
    ["f^{-1}(t) + 1", "1 + f^{-1}(t)"],
    ["f(t) + 1"],
    [r"f^{-1}(x) = 9x", r"f^{-1}(x)=9 x", "9x"],
    ["m!!"],
    ["(m!)!"],
    ["3!!"],
    [r"\frac{10!}{7!3!} + z", r"\frac{10!}{7!\,3!} + z", "120 + z"],
    [r"x_{\max} + y", r"x_{\text{max}} + y", r"y + x_{max}"],
    ["5, 6, 7, ...", r"5, 6, 7, \ldots", "5, 6, 7, …", r"5, 6, 7, \dots."],
    ["5, 6, 7", "5, 6, 7."],
    ["3.14...", r"3.14\ldots"],
    [r"\frac{9\pi}{4}", r"{\color{red}\frac{9\pi}{4}}", r"\frac{9\pi}{4}.\!", r"{\frac{9\pi}{4}.\!\quad}"],
    ["y = 1 or x > 2", "x > 2 or y = 1"],
    ["1 or x > 2", "x = 1 or x > 2"],
    ["y = 1 and x > 2"],
]  # fmt: skip


@pytest.mark.parametrize("spellings", ONE_VOTE, ids=lambda group: ascii(group[0]))
def test_spellings_of_one_answer_are_one_vote(spellings):
    assert {key(spelling) for spelling in spellings} == {key(spellings[0])}
    for spelling in spellings:
        assert same(spelling, spellings[0])
        assert same(spellings[0], spelling)
        assert key(canonical(spelling)) == key(spelling)


def test_different_stays_different():
    for one, other in combinations([group[0] for group in ONE_VOTE], 2):
        assert key(one) != key(other), (one, other)
        assert not same(one, other), (one, other)


ALIKE = [  # two answers that can be read as one, but for a vote are two
    (r"\textbf{(A)}\ 18", "18"),
    ("A. 18", "18"),
    ("(A) -18", "-18"),
    (r"\textbf{(A)}\ -18", "-18"),
    ("(A) |x|", "|x|"),
    ("(A) (3)", "3"),
    (r"9\text{ a.m.}", "9"),
    ("5 m", "5m"),
    ("1,234,567", "1, 234, 567"),
    ("x = 1, y = 2", "1, 2"),
    ("3 boys, 4 girls", "3, 4"),
    ("length: 3, width: 4", "3 and 4"),
    ("x > 1, x < 2", "x > 1 and x < 2"),
    ("7:30 PM", "7:30"),
    ("0 < x \\le 1", "(0, 1]"),
    ("x > 5", r"(5, \infty)"),
    (r"\frac{22}{7} \approx 3.14", "3.14"),
]

ALSO_NAMED = [  # names of one thing, or of two that may be one
    ("y = 2x", "f(x) = 2x"),
    (r"m\angle A = 30^\circ", r"\angle A = 30"),
    ("|AB| = 5", "AB = 5"),
    ("S = 5", "S_{ABC} = 5"),
]


@pytest.mark.parametrize(("one", "other"), ALSO_NAMED, ids=ascii)
def test_names_that_do_not_contradict(one, other):
    assert same(one, other)
    assert same(other, one)


@pytest.mark.parametrize(("one", "other"), ALIKE, ids=ascii)
def test_grading_reads_an_answer_in_every_way_it_can_be_meant(one, other):
    assert same(one, other)
    assert same(other, one)
    assert key(one) != key(other)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("(A) 18", "(B) 18"),
        ("(A)-5", "-5"),
        ("(A) 18", "(A) 20"),
        ("(A) 18", "B"),
        ("x = 5", "y = 5"),
        ("x < 5", "y < 5"),
        ("(x, y) = (1, 2)", "(y, x) = (1, 2)"),
        ("f(x) = x^2", "g(x) = x^2"),
        ("f(2) = 3", "f(3) = 3"),
        ("f(x) = 2x", "f'(x) = 2x"),
        ("f(x) = 2x", "f^{-1}(x) = 2x"),
        (r"P(A) = \frac12", r"P(B) = \frac12"),
        ("AB = 5", "CD = 5"),
        (r"\angle A = 30^\circ", r"\angle B = 30^\circ"),
        ("S_n = n^2", "a_n = n^2"),
        ("x = 2, y = -5", "y = 2, y = -5"),
        ("(x-3)(x+8)", "(x-3](x+8)"),
        ("f(x)", "f[x)"),
        ("x : y = 3 : 4", "y : x = 3 : 4"),
        ("f(2) < f(1)", "f(3) < f(1)"),
        ("x = 1, y = 2", "x = 2, y = 1"),
        (r"9\text{ a.m.}", r"9\text{ p.m.}"),
        ("1234", "1, 234"),
        ("(1,234)", "1234"),
        ("5m", "5"),
        ("0 < x < 1", "(0, 1]"),
        (r"\{1, 2\}", "(1, 2)"),
        ("2, 3", "2, 3, 4"),
        ("3 boys, 4 girls", "4, 3"),
        ("3, 4", "length: 4, width: 3"),
        ("x > 1, x < 2", "x > 1, x < 3"),
        ("2^{10}", "1023"),
        (r"\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}", r"\begin{pmatrix} 1 & 3 \\ 2 & 4 \end{pmatrix}"),
        (r"\frac{1}{2^{1000}}", r"\frac{1}{2^{1001}}"),
    ],
    ids=ascii,
)
def test_what_could_be_confused(one, other):
    assert not same(one, other)
    assert not same(other, one)


# Properties. Respellings of answers of every kind that change no meaning; pieces that rules could trip over.

GOLDS = [
    "18", "-3", r"\frac{3}{4}", "0.25", "1{,}234", r"\sqrt{2}", r"\frac{\sqrt{3}}{2}", r"\frac{2\pi}{3}", "(1,2)",
    r"(-\infty,3]", r"\{1,2,3\}", "x+1", r"x^{2}+2x-1", r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", r"3\sqrt[3]{5}",
    "2,-5", r"90^\circ", r"[0,1)\cup(2,\infty)", r"\frac{x+1}{x-1}", r"5\text{ cm}^2", r"\text{Monday}", "N", "3:4",
    r"1\pm\sqrt{5}", "x>2", r"(\frac{1}{2},-1)", r"\sin x", r"a_{1}+b", r"|x|", r"\log_{2}3",
]  # fmt: skip
RESPELLINGS = {
    "blanks": lambda text: (
        text.replace("+", " + ").replace(",", ", ").replace("(", "( ") if "{,}" not in text else text
    ),
    "thin": lambda text: text.replace("+", r"\,+\;").replace("-", r"\!-") if not text.startswith("-") else text,
    "dfrac": lambda text: text.replace(r"\frac", r"\dfrac"),
    "tfrac": lambda text: text.replace(r"\frac", r"\tfrac"),
    "short": lambda text: text.replace(r"\sqrt{2}", r"\sqrt2").replace(r"\frac{1}{2}", r"\frac12"),
    "left": lambda text: text.replace("(", r"\left(").replace(")", r"\right)") if "\\(" not in text else text,
    "bmatrix": lambda text: text.replace("pmatrix", "bmatrix"),
    "font": lambda text: text.replace(r"\text{", r"\mathrm{"),
    "degree": lambda text: text.replace(r"^\circ", r"^{\circ}"),
    "dollars": lambda text: f"${text}$",
    "parentheses": lambda text: rf"\({text}\)",
    "braces": lambda text: f"{{{text}}}",
    "bold": lambda text: f"**{text}**",
    "colour": lambda text: rf"\textcolor{{blue}}{{{text}}}",
    "boldface": lambda text: rf"\mathbf{{{text}}}",
    "style": lambda text: rf"\displaystyle {text}",
    "stop": lambda text: f"{text}.",
    "lines": lambda text: f"\n{text}\n",
}


@settings(deadline=None, max_examples=300)
@given(st.sampled_from(GOLDS), st.lists(st.sampled_from(sorted(RESPELLINGS)), max_size=5, unique=True))
def test_respelling_keeps_the_answer(gold, names):
    spelling = gold
    for name in names:
        spelling = RESPELLINGS[name](spelling)

    assert key(spelling) == key(gold)
    assert is_correct(rf"\boxed{{{spelling}}}", gold)
    assert all(same(spelling, other) == (other == gold) for other in GOLDS)


@settings(deadline=None, max_examples=300)
@given(st.lists(st.integers(-9, 9), min_size=2, max_size=5), st.lists(st.integers(-9, 9), min_size=2, max_size=5))
def test_order_counts_in_tuples_and_not_in_sets(ours, theirs):
    one, other = ", ".join(map(str, ours)), ",".join(map(str, theirs))

    assert same(f"({one})", f"({other})") == (ours == theirs)
    assert same(rf"\{{{one}\}}", rf"\{{{other}\}}") == (set(ours) == set(theirs))


@settings(deadline=None)
@given(st.text(alphabet="abcdNM", min_size=1, max_size=3), st.text(alphabet="abcdNM", min_size=1, max_size=3))
def test_letters_are_themselves(one, other):
    assert same(one, other) == (one == other)


INTEGERS = st.integers(-(10**30), 10**30)


@settings(deadline=None)
@given(INTEGERS, st.integers(1, 10**9))
def test_fractions_survive_every_spelling(over, under):
    value = Fraction(over, under)

    exact = [f"{over}/{under}", rf"\frac{{{over}}}{{{under}}}", f"{over:,}/{under:,}", canonical(str(value))]
    for spelling in exact:
        assert normalize(spelling) == value
        assert is_correct(rf"\boxed{{{spelling}}}", str(value))
    assert not is_correct(rf"\boxed{{{over}/{under}}}", str(value + Fraction(1, 10**40)))


@settings(deadline=None)
@given(
    st.decimals(allow_nan=False, allow_infinity=False, places=6),
    st.sampled_from(["", " apples", r"\%", r"\text{ km}"]),
)
def test_decimals_survive_grouping_and_units(decimal, unit):
    plain = f"{decimal:f}"

    for comma in (",", "{,}", r"\,", " ", ""):
        spelling = f"{decimal:,f}".replace(",", comma)
        assert normalize(spelling + unit) == Fraction(decimal)
        assert is_correct(rf"\boxed{{{spelling}{unit}}}", plain)
