"""Answers, kept as they come, so that a command that was interrupted can go on.

One file holds the settings, what was asked; another one answer a line, in the order in which they were finished.
Raises ConfigError for files that belong to another command, and CheckpointError where they cannot be written.
"""

import json
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

from training.directories import JsonLines, lock, require_writable, writing
from trm import checkpoint
from trm.errors import CheckpointError, ConfigError
from trm.settings import flag_of

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Place:
    """Where a command keeps its answers. `result` is what it makes of them; `flag` is how the user named it all."""

    command: str
    flag: str
    settings: Path
    answers: Path
    result: Path


class Key(NamedTuple):
    """Which answer: whose, at which effort, to which problem (from 0), which sample of it (None: greedy)."""

    candidate: str
    effort: int
    problem: int
    sample: int | None


@dataclass(frozen=True)
class Answer:
    """One finished reply. steps: supervision steps over all its tokens. elapsed_s: time since the answer before it.

    judged_by: what said whether it is right (`training.evaluation.algebra`); math_verify: what Math-Verify says. Both
    None where nobody was asked.
    """

    candidate: str
    effort: int
    problem: int
    sample: int | None
    source: str
    question: str
    expected: str
    reply: str
    right: bool
    finish_reason: str
    tokens: int
    steps: int
    elapsed_s: float
    judged_by: str | None = None
    math_verify: bool | None = None

    @property
    def key(self) -> Key:
        return Key(self.candidate, self.effort, self.problem, self.sample)


class Answers:
    """Finished answers by key, on the way to all that are `wanted`. With a place, those that lie there are among them,
    and every new one goes there too.

    `asked` maps each setting that decides the result to its value: a place with others is refused, unless nothing was
    made there yet. `about` is only noted beside them, as the last command has it. If interrupted, it says what is kept.
    """

    def __init__(
        self,
        place: Place | None,
        wanted: Sequence[Key],
        asked: Mapping[str, Any],
        about: Mapping[str, Any] | None = None,
    ) -> None:
        self.by_key: dict[Key, Answer] = {}
        self._place = place
        self._num_wanted = len(wanted)
        self._file: JsonLines | None = None
        if place is None:
            return
        require_writable(place.settings.parent, place.flag.split()[0])
        note = {**(about or {}), **asked}
        if not place.settings.exists():
            if found := [path.name for path in (place.result, place.answers) if path.exists()]:
                raise ConfigError(
                    f"{place.flag}: there is {' and '.join(found)} already, but no {place.settings.name} "
                    "to say how it was made; choose another place"
                )
            with writing(place.settings):
                checkpoint.write_json(place.settings, note)
        self._file = JsonLines(place.answers, "a")
        try:
            lock(self._file.file, place.flag, place.command)
            if not _is_untouched(place, asked):
                _require_same(place, asked)
            if checkpoint.read_json(place.settings) != note:
                with writing(place.settings):
                    checkpoint.write_json(place.settings, note)
            self._read(place.answers)
        except BaseException:
            self._file.close()
            raise
        if self.by_key:
            logger.info("%d of %d answers are there already", len(self.by_key), len(wanted))

    def add(self, answer: Answer) -> None:
        """Keep one; it is on its way to the disk when this returns."""
        self.by_key[answer.key] = answer
        if self._file is not None:
            self._file.write([asdict(answer)])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._file is not None:
            self._file.close()
        if kind is not None and issubclass(kind, (KeyboardInterrupt, SystemExit)):
            count, kept = len(self.by_key), "none is kept without --report"
            if self._place is not None:  # a signal may have come between the two halves of `add`
                count = self._place.answers.read_bytes().count(b"\n")
                kept = f"they are kept in {self._place.answers}, and the same command goes on from there"
            logger.warning("interrupted after %d of %d answers; %s", count, self._num_wanted, kept)

    def _read(self, path: Path) -> None:
        """Take in what is there; a last line that was cut off is removed."""
        content = path.read_bytes()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            os.truncate(path, whole)
        for number, line in enumerate(content[:whole].splitlines(), start=1):
            try:
                answer = Answer(**json.loads(line))
            except (ValueError, TypeError) as error:
                raise CheckpointError(f"{path}:{number}: not an answer: {error}; remove that line") from error
            self.by_key[answer.key] = answer


def _is_untouched(place: Place, asked: Mapping[str, Any]) -> bool:
    """Whether a command of ours has noted its settings there, and then made nothing of them."""
    made = any(path.exists() and path.stat().st_size for path in (place.answers, place.result))
    return not made and checkpoint.read_json(place.settings).keys() >= asked.keys()


def _require_same(place: Place, asked: Mapping[str, Any]) -> None:
    stored = checkpoint.read_json(place.settings)
    others = [
        f"{flag_of(name)} ({stored.get(name)}, now {value})"
        for name, value in asked.items()
        if stored.get(name) != value
    ]
    if others:
        raise ConfigError(
            f"{place.flag}: was begun with another {', '.join(others)}; "
            "choose another place, or the settings it was begun with"
        )
