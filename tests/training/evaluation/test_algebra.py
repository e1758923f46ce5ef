"""Verdicts: what is settled without algebra, what algebra settles, and that nothing can hang it."""

import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from training.evaluation.algebra import Algebra, Judge, count_verdicts
from training.evaluation.answers import Answer
from training.evaluation.symbolic import equal


@pytest.fixture(scope="module")
def judge() -> Iterator[Judge]:
    with Judge() as one:
        yield one


@pytest.mark.parametrize(
    ("reply", "gold", "verdict"),
    [
        (r"\boxed{18}", "18", (True, "number")),
        (r"\boxed{17}", "18", (False, "number")),
        ("18", "18", (False, "no box")),
        (r"\boxed{Monday}", r"\text{monday}", (True, "text")),
        (r"\boxed{Monday}", "18", (False, "text")),
        (r"\boxed{3 wugs}", "3", (False, "text")),
        (r"\boxed{(1, 2)}", "(1,2)", (True, "structure")),
        (r"\boxed{(x+1)^2}", "x^2+2x+1", (True, "algebra")),
        (r"\boxed{(x+1)^2}", "x^2+2x-1", (False, "algebra")),
    ],
)
def test_a_verdict_says_where_it_comes_from(judge: Judge, reply: str, gold: str, verdict: tuple[bool, str]) -> None:
    assert judge.judge(reply, gold) == verdict


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("x+1", "1+x"),
        (r"\frac{\sqrt3}{2}", r"\frac{3}{2\sqrt{3}}"),
        (r"\sqrt{12}", r"2\sqrt3"),
        (r"\frac{x}{5}+\frac{3}{5}", r"\frac{x+3}{5}"),
        ("(x-2)(x+2)", "x^2-4"),
        (r"\cos^2 t", r"1-\sin^2 t"),
        (r"\sin(90^\circ - t)", r"\cos t"),
        (r"\log_3 81", "4"),
        ("i(1-2i)", "2+i"),
        (r"(\sqrt8, x+x)", r"(2\sqrt2, 2x)"),
        (r"\{\sqrt{18}, a+a\}", r"\{2a, 3\sqrt2\}"),
        (r"[\sqrt4, \sqrt8)", r"[2, 2\sqrt{2})"),
        (r"1 \le |t| \le 3", r"t \in [-3,-1] \cup [1,3]"),
        ("[1,2] \\cup [2,3]", "1 \\le u \\le 3"),
        ("2x = 6y + 4", "x - 3y - 2 = 0"),
        ("-x > -2", "x < 2"),
        (r"\begin{pmatrix} x+x \\ 3 \end{pmatrix}", r"\begin{pmatrix} 2x \\ 3 \end{pmatrix}"),
        (r"2\begin{pmatrix} 1 \\ 3 \end{pmatrix}", r"\begin{pmatrix} 2 \\ 6 \end{pmatrix}"),
        (r"\sum_{k=1}^{n} a_k b_k", r"\sum_{k=1}^{n} b_k a_k"),
        (r"\frac{1}{1004!}", r"\frac{1004}{1004 \cdot 1004!}"),
        ("|x-5|", "|5-x|"),
        (r"\sqrt{(x-5)^2}", "|x-5|"),
        (r"\max(x, 5)", r"\max(5, x)"),
        (r"\sqrt{x+1} \cdot \sqrt{x+1}", "x+1"),
        (r"\frac{1}{\sqrt{x}+1}", r"\frac{\sqrt{x}-1}{x-1}"),
        (r"\sec x", r"\frac{1}{\cos x}"),
        (r"\csc t", r"\frac{1}{\sin t}"),
        ("e^{x+1}", r"e \cdot e^x"),
        ("(x+1)^{30} (x-1)^{30}", "(x^2-1)^{30}"),
        (r"\log 100", "2"),
        (r"\log e^2", "2"),
        (r"\log 8 / \log 2", "3"),
        (r"\log 4", r"2\log 2"),
        (r"\log 100", r"\log_{10} 100"),
        ("(A) (x+1)^2", "x^2+2x+1"),
        ("(A) (x+1)^2", "(A) x^2+2x+1"),
        (r"x = \sqrt8, y = 3", r"2\sqrt2, 3"),
        ("x > 1 or x < -1", r"(-\infty, -1) \cup (1, \infty)"),
        ("x > 1 and x < 3", "1 < x < 3"),
        ("2x > 2, x < 3", "(1, 3)"),
        ("x = 1 or x > 2", r"\{1\} \cup (2, \infty)"),
        ("x < 1 or x >= 1", r"\mathbb{R}"),
        (r"(-\infty, \infty)", r"\mathbb{R}"),
        ("2x > 2 and y < 3", "y < 3 and x > 1"),
        (r"\sin^{-1} \frac12", r"\frac{\pi}{6}"),
        (r"\cot^{-1} 1", r"\frac{\pi}{4}"),
        (r"\sqrt8, \sqrt8, 3", r"2\sqrt2, 3, 2\sqrt2"),
        ("(n+1)!", "(n+1) n!"),
        (r"10^{500} (\sqrt2 + \sqrt3)", r"10^{500} \sqrt{5 + 2\sqrt6}"),
    ],
)
def test_equal_by_algebra(one: str, other: str) -> None:
    assert equal(one, other)
    assert equal(other, one)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("x+1", "x+2"),
        ("|x|", "x"),
        (r"\sqrt{x^2}", "x"),
        ("N+1", "n+1"),
        (r"3.14", r"\pi"),
        (r"0.333", r"\frac13"),
        ("[0, x+1)", "[0, 1+x]"),
        ("(3, 2)", "[3, 2)"),
        (r"[-\infty, 2)", r"(-\infty, 2)"),
        ("(x, y)", "(y, x)"),
        ("y = 2x", "Y = 2x"),
        ("x + y = 3", "3"),
        ("x > 1 or x < 3", "1 < x < 3"),
        ("x > 1 and x < -1", r"(-\infty, -1) \cup (1, \infty)"),
        ("x > 1 or y < -1", r"(-\infty, -1) \cup (1, \infty)"),
        (r"\{1\}, \{2\}", r"\{1, 2\}"),
        ("x < 2", "-x < -2"),
        ("f(2) < f(1)", "f(3) < f(1)"),
        (r"\frac{1}{1004!}", r"\frac{2}{1004!}"),
        (r"2\sum_{k=1}^{n} k", r"\sum_{k=1}^{n} k^2"),
        (r"k\sum_{k=1}^{n} 2", r"2\sum_{k=1}^{n} k"),
        ("the cat sat", "sat the cat"),
        ("e^x", "e^x + 1"),
        ("x^{30}", "x^{30} + 10^{-20}"),
        ("|x-5|", "5-x"),
        ("|x+10|", "x+10"),
        ("|x+5000|", "x+5000"),
        (r"|xy|", "xy"),
        (r"\sqrt{(x-5)^2}", "5-x"),
        (r"\sqrt{(x+9000)^2}", "x+9000"),
        (r"\sqrt{x^2 + 18000x + 9000^2}", "x+9000"),
        (r"\max(x, 5)", "5"),
        (r"\min(x, 7000)", "x"),
        (r"\lfloor x \rfloor", r"\lfloor x + 0.0001 \rfloor"),
        (r"\lceil x \rceil", r"\lfloor x \rfloor + 1"),
        (r"\log 100", r"\ln 100"),
        (r"\log x", r"\ln x"),
        (r"\log x", r"\log_e x"),
        ("(A) (x+1)^2", "(B) x^2+2x+1"),
        ("(A) x+x = 2", "(B) 2x = 2"),
        (r"x = \sqrt8, y = 3", r"3, 2\sqrt2"),
        ("", "."),
        ("2, 2, 3", "2, 3, 3"),
        ("2^{2023}-1", "2^{2023}"),
        ("2^{20000}-1", "2^{20000}"),
        ("10^{9000} + x", "10^{9000} + x + 1"),
        (r"10^{500} (\sqrt2 - 1)", r"10^{500} \sqrt2 - 10^{500} + 1"),
        (r"\sqrt8, \sqrt8, 3", r"2\sqrt2, 3, 3"),
        ("0 < x, y < 1", "0 < y, x < 1"),
        (r"A \subset B", r"B \subset A"),
        (r"f \circ g", r"g \circ f"),
        (r"\forall x \exists y", r"\exists x \forall y"),
        (r"\neg p", r"p \neg"),
        (r"\sin^{-1} x", r"\frac{1}{\sin x}"),
    ],
)
def test_different_by_algebra(one: str, other: str) -> None:
    assert not equal(one, other)
    assert not equal(other, one)


@pytest.mark.parametrize("answer", ["10^{10^{10}}", "9^{9^{9}}"])
def test_what_takes_forever_is_given_up_and_the_next_question_answered(answer: str) -> None:
    algebra = Algebra(seconds=2)
    try:
        assert algebra.ask(("algebra", "x+x", "2x", "")) is True
        begin = time.monotonic()
        assert algebra.ask(("algebra", answer, "x", "")) is None
        assert time.monotonic() - begin < 10
        assert algebra.ask(("algebra", "x+x", "2x", "")) is True
    finally:
        algebra.close()


def test_a_process_that_ended_between_two_questions_is_started_again() -> None:
    algebra = Algebra()
    try:
        for _ in range(2):
            assert algebra.ask(("algebra", "x+x", "2x", "")) is True
            assert algebra._process is not None
            algebra._process.kill()
            algebra._process.wait()
        algebra.ask(("algebra", "x+x", "2x", ""))
        assert algebra._process is not None
        algebra._process.kill()  # perhaps noticed only when it is written to
        assert algebra.ask(("algebra", "x+x", "2x", "")) in (True, None)
        assert algebra.ask(("algebra", "x+x", "2x", "")) is True
    finally:
        algebra.close()


def test_a_process_that_does_not_start_is_said_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "sympy.py").write_text("raise ImportError('no sympy here')\n")
    monkeypatch.setenv("PYTHONPATH", ":".join([str(tmp_path), *sys.path]))
    with Judge() as judge:
        verdicts = [judge.judge(rf"\boxed{{x+{number}}}", "x+x") for number in range(3)]
        assert judge.judged(_answer(r"\boxed{x + 1}")).right

    assert verdicts == [(False, "structure")] * 3
    assert [record.message for record in caplog.records] == [
        "no algebra (is sympy installed?): what comparison finds different counts as wrong"
    ]


def test_too_little_memory_gives_up() -> None:
    """No room beyond what the libraries themselves take: millions of digits do not fit."""
    algebra = Algebra(seconds=60, max_bytes=1024**2)
    begin = time.monotonic()
    try:
        assert algebra.ask(("algebra", "(10^{6})!", "x", "")) is None
        assert time.monotonic() - begin < 50
    finally:
        algebra.close()


def test_ctrl_c_is_not_for_the_process_that_does_algebra() -> None:
    """A terminal sends it to the whole group, and the other process would say so with a traceback."""
    algebra = Algebra()
    try:
        assert algebra.ask(("algebra", "x+x", "2x", "")) is True
        assert algebra._process is not None
        assert os.getpgid(algebra._process.pid) != os.getpgid(0)
    finally:
        algebra.close()


def test_math_verify_is_a_control_where_it_is_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "math_verify.py").write_text(
        "def parse(text): return text.strip('$')\ndef verify(a, b): return a in b\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", ":".join([str(tmp_path), *sys.path]))
    with Judge() as with_control:
        judged = [with_control.judged(_answer(reply)) for reply in (r"\boxed{x + 1}", r"\boxed{1 + x}", "none")]

    assert [answer.math_verify for answer in judged] == [True, False, False]
    assert [answer.right for answer in judged] == [True, True, False]
    assert count_verdicts(judged) == {"structure": 2, "no box": 1}


def _answer(reply: str) -> Answer:
    return Answer("model", 1, 0, None, "here", "Which?", "x + 1", reply, False, "stop", 1, 1, 0.1)
