"""The answers of an evaluation, kept as they come, so that one that was interrupted can go on.

A report directory holds `settings.json`, what was asked, and `answers.jsonl`, one answer a line in the order
in which they were finished. Raises ConfigError for a directory that belongs to another evaluation.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

from training.directories import require_writable
from trm import checkpoint
from trm.errors import CheckpointError, ConfigError

SETTINGS_FILE = "settings.json"
ANSWERS_FILE = "answers.jsonl"
REPORT_FILE = "report.json"


class Key(NamedTuple):
    """Which answer: whose, at which effort, to which problem (from 0), which sample of it (None: greedy)."""

    candidate: str
    effort: int
    problem: int
    sample: int | None


@dataclass(frozen=True)
class Answer:
    """One finished reply. steps: supervision steps over all its tokens. elapsed_s: time since the answer before it."""

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

    @property
    def key(self) -> Key:
        return Key(self.candidate, self.effort, self.problem, self.sample)


class Answers:
    """Finished answers by key; with a directory, those that lie in it and every new one goes there too.

    `asked` maps each setting that decides an answer to its value: a directory with others is refused.
    """

    def __init__(self, directory: Path | None, asked: Mapping[str, Any]) -> None:
        self.by_key: dict[Key, Answer] = {}
        self._file: Any = None
        if directory is None:
            return
        require_writable(directory, "--report")
        path = directory / ANSWERS_FILE
        if (directory / SETTINGS_FILE).exists():
            _require_same(directory, asked)
            if path.exists():
                self._read(path)
        elif (directory / REPORT_FILE).exists():
            raise ConfigError(f"--report {directory}: holds another {REPORT_FILE}; choose another directory")
        else:
            checkpoint.write_json(directory / SETTINGS_FILE, asked)
        self._file = path.open("a", encoding="utf-8")

    def add(self, answer: Answer) -> None:
        """Keep one; it is on its way to the disk when this returns."""
        self.by_key[answer.key] = answer
        if self._file is not None:
            self._file.write(json.dumps(asdict(answer), ensure_ascii=False) + "\n")
            self._file.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._file is not None:
            self._file.close()

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


def _require_same(directory: Path, asked: Mapping[str, Any]) -> None:
    stored = checkpoint.read_json(directory / SETTINGS_FILE)
    others = [
        f"--{name.replace('_', '-')} ({stored.get(name)}, now {value})"
        for name, value in asked.items()
        if stored.get(name) != value
    ]
    if others:
        raise ConfigError(
            f"--report {directory}: holds an evaluation with another {', '.join(others)}; "
            "choose another directory, or the settings it was begun with"
        )
