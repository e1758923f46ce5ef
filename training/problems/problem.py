"""What training and evaluation read: one question with its worked solution."""

from dataclasses import dataclass

from trm.answers import extract_boxed


@dataclass(frozen=True)
class Problem:
    """`solution` ends in its boxed answer; `source` says where the row came from (file:line or family)."""

    question: str
    solution: str
    source: str

    @property
    def answer(self) -> str:
        """The inside of the solution's box."""
        return extract_boxed(self.solution) or ""
