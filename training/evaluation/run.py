"""Carry an evaluation through: problems, candidates, answers, report."""

import logging
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

from tqdm import tqdm

from training.config import EvalSettings
from training.evaluation.algebra import Judge
from training.evaluation.answers import Answers, Place
from training.evaluation.candidates import MODEL_NAME, Candidate, Role, Run, fingerprint, load, read_chat
from training.evaluation.decoding import answer_problems, encode_prompts, fingerprint_problems, keys
from training.evaluation.report import REPORT_FILE, build_report, write_report
from training.evaluation.teacher_forced import measure, summarize
from training.problems.data import encode_problem, load_problems
from training.problems.problem import Problem
from trm import TRMConfig, bundled_model_path, checkpoint, extra
from trm.device import use_device
from trm.errors import ConfigError
from trm.loading import choose_dtype

logger = logging.getLogger(__name__)

BACKBONE = "backbone"  # as a baseline: the model itself at effort 0
MAX_SOLUTIONS = 1000  # read for the teacher-forced part; more tokens would not change its curves
SETTINGS_FILE = "settings.json"
ANSWERS_FILE = "answers.jsonl"


def evaluate_model(settings: EvalSettings) -> dict[str, Any]:
    """The report. With `settings.report` it also lies there, with a table, every answer and pictures.

    The teacher-forced part is measured only where there is a report directory. An evaluation that is interrupted
    says what it has kept there, and goes on when it is run again. Raises ConfigError for settings that do not fit.
    """
    if settings.report is not None:
        extra.require("matplotlib", "--report")
    device = use_device(settings.device, settings.num_threads)
    directory = checkpoint.locate(settings.model or bundled_model_path())
    config = checkpoint.read_config(directory)
    problems = load_problems(settings.dataset, split="heldout", seed=settings.seed, num_problems=settings.limit)
    problems = [replace(p, work=settings.work or p.work) for p in problems[: settings.limit]]
    if len(problems) < settings.limit:
        logger.info(
            "%s has only %d problems; --limit %d takes all of them", settings.dataset, len(problems), settings.limit
        )
    learned = config.work or ()
    if unknown := {problem.work or "full" for problem in problems}.difference(learned):
        logger.warning(
            "replies of --work %s are asked for, and this model learned those of %s",
            ", ".join(sorted(unknown)),
            ", ".join(learned),
        )
    dtype = choose_dtype(settings.dtype, None, device, lambda: config.backbone_config)
    candidates = choose_candidates(settings, directory, config)
    for candidate in candidates:  # who has no room for a reply costs nobody the answers before it
        encode_prompts(candidate.name, *read_chat(candidate.directory), problems, settings.max_tokens)
    wanted = [key for candidate in candidates for run in candidate.runs for key in keys(run, len(problems))]

    with Answers(_place(settings), wanted, _asked(settings, candidates, problems, dtype)) as answers:
        progress: tqdm[NoReturn]
        with tqdm(total=len(wanted), initial=len(answers.by_key), unit="answer") as progress, Judge() as judge:
            for candidate in candidates:
                if all(key in answers.by_key for run in candidate.runs for key in keys(run, len(problems))):
                    continue
                model, chat = load(candidate.directory, device, dtype)
                answer_problems(
                    candidate,
                    model,
                    chat,
                    problems,
                    answers,
                    progress,
                    judge.judged,
                    seed=settings.seed,
                    max_tokens=settings.max_tokens,
                    max_rows=settings.max_rows,
                )
        deepest = max(run.effort for run in candidates[0].runs)
        solutions = None if settings.report is None else _read_solutions(directory, device, dtype, problems, deepest)
    operations = [len(problem.steps) for problem in problems]
    about = {
        "model": settings.model or "bundled",
        "dataset": settings.dataset,
        "seed": settings.seed,
        "n": len(problems),
        "dtype": dtype,
        "trained_effort": config.n_supervision,
    }
    report = about | build_report(candidates, answers.by_key, operations, config.n_supervision) | (solutions or {})
    if settings.report is not None:
        from training.evaluation.pictures import draw  # with matplotlib, of the extra `train`

        write_report(settings.report, report)
        draw(settings.report, report)
    return report


def choose_candidates(settings: EvalSettings, directory: Path, config: TRMConfig) -> list[Candidate]:
    """Who answers, at which efforts: the model first, then another baseline if there is one, then the controls."""
    trained = config.n_supervision
    efforts = set(settings.effort or (0, 1, trained))
    if settings.baseline == BACKBONE:
        efforts.add(0)
    if settings.control:
        efforts.add(trained)
    runs = [Run(MODEL_NAME, effort) for effort in sorted(efforts)]
    if settings.samples > 1:
        runs.append(Run(MODEL_NAME, trained, settings.samples))
    candidates = [Candidate("model", MODEL_NAME, directory, tuple(runs))]
    others: list[tuple[Role, str]] = [("control", control) for control in settings.control]
    if settings.baseline not in (None, BACKBONE):
        others.insert(0, ("baseline", settings.baseline))
    paths = [Path(os.path.abspath(source)) for _, source in others]
    for (role, source), path in zip(others, paths, strict=True):
        if paths.count(path) > 1:
            raise ConfigError(f"--{role} {source}: is given twice; name it once")
        name = _name(path, paths)
        place = checkpoint.locate(source)
        checkpoint.read_tokenizer(place)  # what does not load costs nobody the answers before it
        if checkpoint.is_recursive(place):
            effort = checkpoint.read_config(place).n_supervision if role == "control" else 0
        else:
            checkpoint.read_backbone_config(place)
            effort = 0
        candidates.append(Candidate(role, name, place, (Run(name, effort),)))
    return candidates


def _name(path: Path, paths: Sequence[Path]) -> str:
    """As many of its last parts as tell a path from the others, and from the model."""
    for parts in range(1, len(path.parts)):
        name = "/".join(path.parts[-parts:])
        if name != MODEL_NAME and [other.parts[-parts:] for other in paths].count(path.parts[-parts:]) == 1:
            return name
    return str(path)


def _place(settings: EvalSettings) -> Place | None:
    directory = settings.report
    if directory is None:
        return None
    return Place(
        settings.command,
        f"--report {directory}",
        directory / SETTINGS_FILE,
        directory / ANSWERS_FILE,
        directory / REPORT_FILE,
    )


def _asked(
    settings: EvalSettings, candidates: Sequence[Candidate], problems: Sequence[Problem], dtype: str
) -> dict[str, Any]:
    """Everything that decides the answers, by the name of its setting; models and data by what they hold."""
    weights = {
        role: ", ".join(f"{c.name} {fingerprint(c.directory)}" for c in candidates if c.role == role) or "none"
        for role in ("model", "baseline", "control")
    }
    return weights | {
        "limit": settings.limit,
        "seed": settings.seed,
        "effort": [run.effort for run in candidates[0].runs if not run.samples],
        "samples": settings.samples,
        "max_tokens": settings.max_tokens,
        "work": settings.work,
        "dtype": dtype,
        "dataset": fingerprint_problems(problems),
    }


def _read_solutions(
    directory: Path, device: str, dtype: str, problems: Sequence[Problem], effort: int
) -> dict[str, Any]:
    """The teacher-forced part of the report, on the first problems, at least as deep as `effort` and as trained."""
    model, chat = load(directory, device, dtype)
    asked = [(problem, problem.work or "full") for problem in problems[:MAX_SOLUTIONS]]
    examples = [encode_problem(problem, chat, work) for problem, work in asked if problem.shows(work)]
    if not examples:
        logger.warning("no problem has equations, so the teacher-forced part is left out")
        return {}
    return summarize(measure(model, chat, examples, max(effort, model.config.n_supervision)), model.config)
