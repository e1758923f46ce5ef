"""What training and evaluation read: one question with its worked solution."""

import re
from dataclasses import dataclass

from trm.answers import boxed, extract_boxed
from trm.chat import Work

_GROUPED = re.compile(r"[-+$]*\d{1,3}(,\d{3})+(\.\d+)?")  # 1,200


@dataclass(frozen=True)
class Problem:
    """`solution` ends in its boxed answer; `source` says where the row came from (file:line or family).

    `equations` ("48/2=24") lead to the answer, as far as they are known; `steps` are the intermediate results, of which
    the last is the answer, or nothing where they are not known. A problem with a `work` of its own is always asked so.
    """

    question: str
    solution: str
    source: str
    equations: tuple[str, ...] = ()
    steps: tuple[str, ...] = ()
    work: Work | None = None

    @property
    def answer(self) -> str:
        """The inside of the solution's box."""
        return extract_boxed(self.solution) or ""

    def shows(self, work: Work) -> bool:
        """Whether so much work is known."""
        return work != "equations" or bool(self.equations)

    def reply(self, work: Work) -> str:
        """The right reply that shows so much work.

        In short ones the answer is written as in equations, 1200 and not 1,200: its digits stand where those of the
        results before it do.
        """
        if work == "full":
            return self.solution
        answer = self.answer.replace(",", "") if _GROUPED.fullmatch(self.answer) else self.answer
        return "\n".join([*(self.equations if work == "equations" else ()), boxed(answer)])
