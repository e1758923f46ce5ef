"""Judge replies: by comparison first (`trm.answers`), by algebra where that finds a difference it cannot be sure of.

Algebra runs in a child process that is killed when it takes too long or too much memory, and started again for the
next question. Where it cannot be started, that is said once, and comparison has the last word.
"""

import json
import logging
import select
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from fractions import Fraction
from importlib.util import find_spec
from types import TracebackType
from typing import Any, Literal, NamedTuple, Self

from training.evaluation.answers import Answer
from trm.answers import extract_boxed, is_correct, key
from trm.answers.tree import Node

By = Literal["no box", "number", "text", "structure", "algebra", "gave up"]
logger = logging.getLogger(__name__)

SECONDS = 5
MAX_BYTES = 2 * 1024**3
_START_SECONDS = 120  # sympy is a large library, and the machine may be busy


class Verdict(NamedTuple):
    """Whether a reply is right, and what said so. "gave up": algebra ran into a limit, so the reply counts as wrong."""

    right: bool
    by: By


class Judge:
    """Says which replies are right. Closing it ends the process that does the algebra."""

    def __init__(self) -> None:
        self._algebra = Algebra()
        self._known: dict[tuple[str, str, str, str], bool | None] = {}
        self._has_control = find_spec("math_verify") is not None

    def judge(self, reply: str, gold: str, question: str = "") -> Verdict:
        """By numbers, text or structure, and if those differ and text does not settle it, by algebra."""
        box = extract_boxed(reply)
        if box is None:
            return Verdict(False, "no box")
        right = is_correct(reply, gold, question)
        values = (key(box, question), key(gold, question))
        if all(isinstance(one, Fraction) for one in values):
            return Verdict(right, "number")
        if any(_has_text(one) for one in values):
            return Verdict(right, "text")
        if right:
            return Verdict(True, "structure")
        verdict = self._ask("algebra", box, gold, question)
        if verdict is None:
            return Verdict(False, "gave up" if self._algebra.starts else "structure")
        return Verdict(verdict, "algebra")

    def judged(self, answer: Answer) -> Answer:
        """An answer with its verdict, and Math-Verify's where that is installed."""
        box = extract_boxed(answer.reply)
        verdict = self.judge(answer.reply, answer.expected, answer.question)
        control = None
        if self._has_control:
            control = box is not None and self._ask("Math-Verify", box, answer.expected) is True
            control = control if self._algebra.starts else None
        return replace(answer, right=answer.right or verdict.right, judged_by=verdict.by, math_verify=control)

    def _ask(self, by: str, box: str, gold: str, question: str = "") -> bool | None:
        asked = (by, box, gold, question)
        if asked not in self._known:
            self._known[asked] = self._algebra.ask(asked)
        return self._known[asked]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._algebra.close()


def count_verdicts(answers: Iterable[Answer]) -> dict[str, int]:
    """How many verdicts came from where."""
    return dict(Counter(answer.judged_by for answer in answers if answer.judged_by is not None).most_common())


class Algebra:
    """The child process, started when it is first asked, and again after it ended. starts: False once it did not."""

    def __init__(self, seconds: int = SECONDS, max_bytes: int = MAX_BYTES) -> None:
        self.starts = True
        self._limits = (seconds, max_bytes)
        self._process: subprocess.Popen[str] | None = None

    def ask(self, question: Any) -> bool | None:
        """The verdict; None where a limit was reached, or the process ended or does not start."""
        if self._process is not None and self._process.poll() is not None:
            self.close()
        process = self._process or self._start()
        if process is None:
            return None
        assert process.stdin is not None
        try:
            process.stdin.write(json.dumps(question) + "\n")
            process.stdin.flush()
        except BrokenPipeError:
            self.close()
            return None
        verdict: bool | None = self._answer(process, self._limits[0])
        return verdict

    def _start(self) -> "subprocess.Popen[str] | None":
        """A process that is ready; None, and a warning, where it does not get there."""
        if not self.starts:
            return None
        seconds, max_bytes = self._limits
        command = [sys.executable, "-m", "training.evaluation.symbolic", str(seconds + 1), str(max_bytes)]
        self._process = subprocess.Popen(  # Ctrl-C is for us, who then end it
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
        )
        self.starts = self._answer(self._process, _START_SECONDS) is not None
        if not self.starts:
            logger.warning("no algebra (is sympy installed?): what comparison finds different counts as wrong")
        return self._process

    def _answer(self, process: "subprocess.Popen[str]", seconds: float) -> Any:
        """The next line, or None and no process any more."""
        assert process.stdout is not None
        readable, _, _ = select.select([process.stdout], [], [], seconds)
        line = process.stdout.readline() if readable else ""
        if line:
            return json.loads(line)
        self.close()
        return None

    def close(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None


def _has_text(tree: object) -> bool:
    return isinstance(tree, Node) and (tree.kind == "text" or any(map(_has_text, tree.parts)))
