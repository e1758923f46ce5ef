"""Which replies are kept, and the rows that they become: in the data set's order, whatever the order of finishing."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

from training.config import SampleSettings
from training.directories import JsonLines
from training.evaluation.answers import Answer, Key
from training.evaluation.decoding import noise_seed
from training.problems.problem import Problem
from training.sampling.equations import equations, results
from trm.answers import extract_boxed, same


@dataclass
class Tally:
    """Sums over the problems that are written. always: those that every one of several replies solves.

    right: replies; cut: those that were as long as replies may be.
    """

    problems: int = 0
    solved: int = 0
    always: int = 0
    replies: int = 0
    right: int = 0
    cut: int = 0
    kept: int = 0
    tokens: int = 0
    seconds: float = 0.0


class Solutions:
    """Writes the rows of a problem once all its replies are there and all problems before it are written."""

    def __init__(
        self, settings: SampleSettings, model: str, problems: Sequence[Problem], wanted: Sequence[Key]
    ) -> None:
        self.tally = Tally()
        self._settings = settings
        self._model = model
        self._problems = problems
        self._wanted = wanted
        self._file = JsonLines(settings.output, "w")

    def write(self, answers: Mapping[Key, Answer]) -> int:
        """Write what can be written now; returns how many problems that were."""
        before, samples = self.tally.problems, self._settings.samples
        while (index := self.tally.problems) < len(self._problems):
            keys = self._wanted[index * samples : (index + 1) * samples]
            found = [answers[key] for key in keys if key in answers]
            if len(found) < samples:
                break
            kept = select(found, self._settings.keep, self._settings.keep_solved)
            self._file.write(self._row(self._problems[index], answer) for answer in kept)
            self._count(found, kept)
        return self.tally.problems - before

    def _row(self, problem: Problem, answer: Answer) -> dict[str, Any]:
        """A row as `trm-train` reads it, and where it comes from."""
        derivation, boxed = equations(answer.reply), extract_boxed(answer.reply) or ""
        steps: dict[str, Sequence[str]] = {}
        if (own := results(derivation, boxed)) is not None:
            steps = {"equations": derivation, "steps": own}
        elif problem.steps and same(problem.steps[-1], boxed):
            steps = {"steps": problem.steps}
        return {
            "question": problem.question,
            "answer": answer.reply.strip(),
            **steps,
            **({} if problem.work is None else {"work": problem.work}),
            "source": problem.source,
            "model": self._model,
            "seed": noise_seed(self._settings.seed, answer.problem),
            "sample": answer.sample,
            "tokens": answer.tokens,
        }

    def _count(self, found: Sequence[Answer], kept: Sequence[Answer]) -> None:
        tally, right = self.tally, sum(map(is_right, found))
        tally.problems += 1
        tally.solved += right > 0
        tally.always += right == len(found) > 1
        tally.replies += len(found)
        tally.right += right
        tally.cut += sum(answer.finish_reason == "length" for answer in found)
        tally.kept += len(kept)
        tally.tokens += sum(answer.tokens for answer in found)
        tally.seconds += sum(answer.elapsed_s for answer in found)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._file.close()


def is_right(answer: Answer) -> bool:
    """Whether a reply has the right answer and came to its end."""
    return answer.right and answer.finish_reason == "stop"


def select(found: Sequence[Answer], keep: int, keep_solved: bool) -> list[Answer]:
    """At most `keep` right replies to one problem, the first of each derivation; none where all of several are right.

    A derivation is known by its equations, or by its words where there are none. One reply says nothing about always.
    """
    right = [answer for answer in found if is_right(answer)]
    if len(right) == len(found) > 1 and not keep_solved:
        return []
    first: dict[Sequence[str], Answer] = {}
    for answer in right:
        first.setdefault(equations(answer.reply) or tuple(answer.reply.split()), answer)
    return list(first.values())[:keep]
