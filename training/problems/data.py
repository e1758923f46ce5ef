r"""Load problems: from a file, from the hub by name, or synthetic.

Understands the columns of GSM8K (`question`, `answer` with `####`) and of NuminaMath and
MATH (`problem`, `solution` with `\boxed{}`). A bad row is reported with its file and
line, counted and left out; a source with no good row raises ConfigError.
"""

import hashlib
import json
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from training.problems.problem import Problem
from training.problems.synthetic import Split, parse_families, problems
from trm import extra
from trm.answers import convert_gsm8k, extract_boxed
from trm.chat import ChatFormat, Example
from trm.errors import ConfigError

logger = logging.getLogger(__name__)

HUB_DATASETS = {  # name -> (repository, configuration, {our split: theirs})
    "gsm8k": ("openai/gsm8k", "main", {"train": "train", "heldout": "test"}),
    "numina": ("AI-MO/NuminaMath-CoT", None, {"train": "train", "heldout": "test"}),
    "math": ("nlile/hendrycks-MATH-benchmark", None, {"train": "train", "heldout": "test"}),
}
MAX_REPORTED_ROWS = 10  # bad rows named one by one; the rest are only counted


def load_problems(
    dataset: str,
    *,
    split: Split,
    seed: int,
    num_problems: int = 20_000,
    keep_annotations: bool = False,
    flag: str = "--dataset",
) -> list[Problem]:
    """Problems of `gsm8k`, `numina`, `math`, `synthetic[:FAMILY,…]` or a JSON-lines file.

    `num_problems` and `seed` say how many synthetic problems to draw and which; `keep_annotations`
    leaves GSM8K's `<<48/2=24>>` in the solutions; errors name `flag`. Raises ConfigError for an unknown
    name, a missing file, or a source without one good row.
    """
    name, _, families = dataset.partition(":")
    if name == "synthetic":
        return list(problems(parse_families(families), split, seed, num_problems))
    rows = _hub_rows(name, split, flag) if dataset in HUB_DATASETS else _file_rows(Path(dataset), flag)
    good: list[Problem] = []
    bad = 0
    for source, row in rows:
        try:
            good.append(_problem(row, source, keep_annotations))
        except ValueError as error:
            bad += 1
            if bad <= MAX_REPORTED_ROWS:
                logger.warning("%s: %s; row left out", source, error)
    if bad:
        logger.warning("%s: %d of %d rows left out", dataset, bad, bad + len(good))
    if not good:
        raise ConfigError(f"{flag} {dataset}: no usable row; expected question and answer, or problem and solution")
    return good


def encode_problems(rows: Sequence[Problem], chat: ChatFormat, max_length: int) -> list[Example]:
    """Examples of at most `max_length` tokens; longer ones are counted and dropped, never cut.

    Raises ConfigError where nothing is left.
    """
    encoded = [replace(chat.encode_example(p.question, p.solution), source=p.source) for p in rows]
    kept = [example for example in encoded if len(example.ids) <= max_length]
    if len(kept) < len(encoded):
        logger.warning(
            "%d of %d rows are longer than --max-length %d and were dropped",
            len(encoded) - len(kept),
            len(encoded),
            max_length,
        )
    if not kept:
        shortest = min(len(example.ids) for example in encoded)
        raise ConfigError(f"every row is longer than --max-length {max_length}; the shortest has {shortest} tokens")
    return kept


def fingerprint(examples: Sequence[Example]) -> str:
    """First 16 hex digits of a SHA-256 over all token ids and label starts, in order."""
    digest = hashlib.sha256()
    for example in examples:
        digest.update(np.array([example.label_start, len(example.ids), *example.ids], dtype=np.int64).tobytes())
    return digest.hexdigest()[:16]


def _file_rows(path: Path, flag: str) -> Iterator[tuple[str, Any]]:
    if not path.is_file():
        known = ", ".join((*HUB_DATASETS, "synthetic"))
        raise ConfigError(f"{flag} {path}: no such file, and not one of {known}")
    try:
        with path.open(encoding="utf-8", errors="surrogateescape") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield f"{path}:{number}", line
    except OSError as error:
        raise ConfigError(f"{flag} {path}: cannot be read: {error.strerror}") from error


def _hub_rows(name: str, split: Split, flag: str) -> Iterable[tuple[str, Any]]:
    extra.require("datasets", f"{flag} {name}")
    from datasets import load_dataset  # heavy

    repository, configuration, splits = HUB_DATASETS[name]
    try:
        table = load_dataset(repository, configuration, split=splits[split])  # rows, never code  # nosec B615
    except Exception as error:  # the library raises many kinds: network, missing files, its own
        raise ConfigError(f"{flag} {name}: cannot load {repository}: {error}") from error
    return ((f"{repository}:{number}", row) for number, row in enumerate(table, start=1))


def _problem(row: Any, source: str, keep_annotations: bool) -> Problem:
    """One row as a problem. Raises ValueError that says what is wrong with it."""
    if isinstance(row, str):
        try:
            row = json.loads(row)
        except (json.JSONDecodeError, RecursionError) as error:
            raise ValueError(f"not JSON: {error}") from None
    if not isinstance(row, Mapping):
        raise ValueError(f"not an object but {type(row).__name__}")
    names = ("question", "answer") if "question" in row else ("problem", "solution")
    for name in names:
        value = row.get(name)
        if not isinstance(value, str) or not value.strip():
            raise ValueError(f"{name} is missing, empty or no text")
        value.encode()  # half a surrogate pair is a UnicodeEncodeError, which is a ValueError
    question, solution = (row[name] for name in names)
    if extract_boxed(solution) is None:  # else a #### is a heading
        if "####" not in solution:
            raise ValueError(r"the solution has neither #### nor a \boxed{} answer")
        solution = convert_gsm8k(solution, keep_annotations)
    return Problem(question, solution, source)
