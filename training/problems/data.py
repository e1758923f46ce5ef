r"""Load problems: from a file, from the hub by name, or synthetic.

Understands the columns of GSM8K (`question`, `answer` with `####`) and of NuminaMath and
MATH (`problem`, `solution` with `\boxed{}`), and with either the intermediate results
(`steps`). A bad row is reported with its file and line, counted and left out; a source
with no good row raises ConfigError.
"""

import hashlib
import json
import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
from tqdm import tqdm

from training import workers
from training.config import Replies
from training.problems.problem import Problem
from training.problems.synthetic import Split, parse_families, problems
from trm import extra
from trm.answers import boxed, convert_gsm8k, extract_boxed, gsm8k_equations, same
from trm.chat import SYSTEM_PROMPTS, ChatFormat, Example, Work
from trm.errors import ConfigError

logger = logging.getLogger(__name__)

HUB_DATASETS = {  # name -> (repository, configuration, {our split: theirs})
    "gsm8k": ("openai/gsm8k", "main", {"train": "train", "heldout": "test"}),
    "numina": ("AI-MO/NuminaMath-CoT", None, {"train": "train", "heldout": "test"}),
    "math": ("nlile/hendrycks-MATH-benchmark", None, {"train": "train", "heldout": "test"}),
}
WORK: Mapping[Replies, Work] = {"worked": "full", "equations": "equations", "answer": "none"}
MAX_REPORTED_ROWS = 10  # bad rows named one by one; the rest are only counted


def is_named(dataset: str) -> bool:
    """Whether it is a data set known by name, even where a file is called so."""
    return dataset in HUB_DATASETS or dataset.partition(":")[0] == "synthetic"


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
        raise ConfigError(
            f"{flag} {dataset}: no usable row; expected lines of JSON, each with question and answer, or with problem "
            "and solution"
        )
    return good


def encode_problem(problem: Problem, chat: ChatFormat, work: Work, step_targets: bool = False) -> Example:
    """The problem with the reply that shows so much work.

    With `step_targets` an answer at once also gets the replies that the intermediate results would be.
    """
    example = chat.encode_example(problem.question, problem.reply(work), work)
    results = problem.steps[:-1] if step_targets and work == "none" else ()
    return replace(example, source=problem.source, step_replies=tuple(_at_once(result, chat) for result in results))


@lru_cache(maxsize=100_000)
def _at_once(result: str, chat: ChatFormat) -> tuple[int, ...]:
    """The reply that says a result at once, whatever was asked, its end token included."""
    example = chat.encode_example("?", boxed(result), "none")
    return example.ids[example.label_start :]


def asked_work(rows: Sequence[Problem], replies: Sequence[Replies]) -> list[Work]:
    """How much work is asked for of the problems, and known, one way or another, most first."""
    asked = {work for p in rows for work in ([p.work] if p.work else [WORK[name] for name in replies]) if p.shows(work)}
    return [work for work in WORK.values() if work in asked]


def encode_problems(
    rows: Sequence[Problem],
    chat: ChatFormat,
    max_length: int,
    replies: Sequence[Replies] = ("worked",),
    step_targets: bool = False,
    kind: Literal["training", "validation"] = "training",
) -> list[Example]:
    """Examples of at most `max_length` tokens; longer ones are counted and dropped, never cut.

    Each problem gives an example for each of `replies`, or one where it has a `work` of its own. Problems without
    the equations, or with `step_targets` the results, that this needs are counted. Raises ConfigError where nothing
    is left. `kind` is what the messages call the rows.
    """
    instead = ", or --validation-problems 0" if kind == "validation" else ""
    asked = [(p, work) for p in rows for work in ([p.work] if p.work else [WORK[name] for name in replies])]
    shown = [(p, work) for p, work in asked if p.shows(work)]
    progress = tqdm(shown, desc=f"encoding {kind} rows", unit="row", delay=5, mininterval=5, disable=workers.rank() > 0)
    encoded = [encode_problem(p, chat, work, step_targets) for p, work in progress]
    if lacking := len(asked) - len(shown):
        logger.warning(
            "%d of %d %s problems have no equations, so no reply of equations alone", lacking, len(rows), kind
        )
    if not encoded:
        raise ConfigError(
            f"--replies {','.join(replies)}: no {kind} problem has equations (GSM8K's <<48/2=24>>, a list "
            f"of them, or synthetic problems); add worked or answer{instead}"
        )
    if step_targets:
        _warn_of_no_steps([p for p, work in asked if work == "none"], kind)
    kept = [example for example in encoded if len(example.ids) <= max_length]
    if len(kept) < len(encoded):
        logger.warning(
            "%d of %d %s rows are longer than --max-length %d and were dropped",
            len(encoded) - len(kept),
            len(encoded),
            kind,
            max_length,
        )
    if not kept:
        shortest = min(len(example.ids) for example in encoded)
        raise ConfigError(
            f"every {kind} row is longer than --max-length {max_length}; the shortest has {shortest} tokens; "
            f"raise it{instead}"
        )
    return kept


def _warn_of_no_steps(rows: Sequence[Problem], kind: str) -> None:
    """Say how many of the problems have no intermediate results, and which are at odds with their equations."""
    without = [p for p in rows if not p.steps]
    if not without:
        return
    at_odds = [p.source for p in without if p.equations]
    named = ", ".join(at_odds[:MAX_REPORTED_ROWS]) + ", …" * (len(at_odds) > MAX_REPORTED_ROWS)
    logger.warning(
        "%d of %d %s problems have no steps and learn the answer at every supervision step%s",
        len(without),
        len(rows),
        kind,
        f"; the equations of {len(at_odds)} end in another result than the answer: {named}" if at_odds else "",
    )


def fingerprint(examples: Sequence[Example]) -> str:
    """First 16 hex digits of a SHA-256 over all token ids, label starts and targets of steps, in order."""
    digest = hashlib.sha256()
    for example in examples:
        numbers = [example.label_start, len(example.ids), *example.ids]
        for reply in example.step_replies:
            numbers += [-len(reply), *reply]
        digest.update(np.array(numbers, dtype=np.int64).tobytes())
    return digest.hexdigest()[:16]


def _file_rows(path: Path, flag: str) -> Iterator[tuple[str, Any]]:
    if not os.path.isfile(path):  # False, not an error, for a name that no file can have
        if os.path.exists(path):
            raise ConfigError(f"{flag} {path}: is no file; give a file with lines of JSON")
        known = ", ".join((*HUB_DATASETS, "synthetic"))
        raise ConfigError(f"{flag} {path}: no such file, and not one of {known}")
    try:
        with path.open(encoding="utf-8-sig", errors="surrogateescape") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield f"{path}:{number}", line.strip()
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
            row.encode()
            row = json.loads(row)
        except UnicodeEncodeError:
            raise ValueError("not text in UTF-8") from None
        except (json.JSONDecodeError, RecursionError) as error:
            raise ValueError(f"not JSON: {error}") from None
    if not isinstance(row, Mapping):
        raise ValueError(f"not an object but {type(row).__name__}")
    if "question" not in row and "problem" not in row:
        raise ValueError(f"neither question nor problem is among its columns {list(row)}")
    names = ("question", "answer") if "question" in row else ("problem", "solution")
    for name in names:
        value = row.get(name)
        if not isinstance(value, str) or not value.strip():
            raise ValueError(f"{name} is missing, empty or no text")
        value.encode()  # half a surrogate pair is a UnicodeEncodeError, which is a ValueError
    question, solution = (row[name] for name in names)
    equations: tuple[str, ...] = ()
    if extract_boxed(solution) is None:  # else a #### is a heading
        if "####" not in solution:
            raise ValueError(rf"{names[1]} gives its result neither as #### 72 nor as \boxed{{72}}")
        equations = gsm8k_equations(solution)
        solution = convert_gsm8k(solution, keep_annotations)
    if row.get("equations") not in (None, []):
        equations = _texts(row["equations"], "equations")
        for equation in equations:
            if not _is_equation(equation):
                raise ValueError(f"equations holds {equation!r}, which says nothing is equal")
    work = row.get("work")
    if not (work is None or (isinstance(work, str) and work in SYSTEM_PROMPTS)):
        raise ValueError(f"work is {work!r}, not one of {', '.join(SYSTEM_PROMPTS)}")
    if work == "equations" and not equations:
        equations = _own_equations(solution)
    problem = Problem(question, solution, source, equations, work=work)
    if row.get("steps") in (None, []):
        steps = tuple(equation.rpartition("=")[2].strip() for equation in equations)
        return replace(problem, steps=steps) if _lead_to(steps, problem.answer) else problem
    steps = _texts(row["steps"], "steps")
    if not _lead_to(steps, problem.answer):
        raise ValueError(f"the last of its steps is {steps[-1]!r}, the answer is {problem.answer!r}")
    return replace(problem, steps=steps)


def _own_equations(solution: str) -> tuple[str, ...]:
    """The lines of a reply that are equations, up to its box."""
    lines = solution.rpartition(r"\boxed")[0].splitlines()
    return tuple(line.strip() for line in lines if _is_equation(line))


def _is_equation(text: str) -> bool:
    return all(side.strip() for side in text.partition("=")[::2])


def _texts(value: Any, name: str) -> tuple[str, ...]:
    """A column of a row that is a list of texts or whole numbers. Raises ValueError where it is none."""
    if not isinstance(value, list):
        raise ValueError(f"{name} is no list")
    for entry in value:
        if not isinstance(entry, str | int) or isinstance(entry, bool) or not str(entry).strip():
            raise ValueError(f"{name} holds {entry!r}, which is neither text nor a whole number")
    texts = tuple(str(entry).strip() for entry in value)
    for text in texts:
        text.encode()  # as above
    return texts


def _lead_to(steps: Sequence[str], answer: str) -> bool:
    return bool(steps) and same(steps[-1], answer)
