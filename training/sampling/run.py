"""Carry a sampling through: problems, replies, rows.

Three files: `--output` holds the rows; `.json` beside it what decided them; `.replies` every reply as it was
finished, right or wrong. The rows follow from the replies. So a command that was interrupted goes on with the
replies that it lacks and ends in the same rows, no finished reply is lost, and what selects them may change.
"""

from pathlib import Path
from typing import Any, NoReturn

from tqdm import tqdm

import trm
from training.config import SampleSettings
from training.evaluation.answers import Answers, Place
from training.evaluation.candidates import MODEL_NAME, Candidate, Run, fingerprint, load
from training.evaluation.decoding import decoding, fingerprint_problems, keys
from training.problems.data import load_problems
from training.sampling.solutions import Solutions, Tally
from trm import bundled_model_path, checkpoint
from trm.device import use_device
from trm.errors import ConfigError
from trm.loading import choose_dtype

NUM_SYNTHETIC = 20_000  # problems that are drawn where --limit says nothing
DECIDING = ("samples", "temperature", "top_p", "max_tokens", "seed", "quantize")  # what the replies are
SELECTING = ("keep", "keep_solved")  # which of them are kept


def sample(settings: SampleSettings) -> str:
    """Write the rows, or go on writing them; returns a summary. Raises ConfigError for settings that do not fit."""
    device = use_device(settings.device, settings.num_threads)
    directory = checkpoint.locate(settings.model or bundled_model_path())
    trained, backbone_config = _describe(directory)
    if settings.effort and not trained:
        raise ConfigError(f"--effort {settings.effort}: {settings.model} is a plain model, which takes 0 only")
    effort = trained if settings.effort is None else settings.effort
    dtype = choose_dtype(settings.dtype, settings.quantize, device, lambda: backbone_config)
    problems = load_problems(
        settings.dataset, split="train", seed=settings.seed, num_problems=settings.limit or NUM_SYNTHETIC
    )[: settings.limit]
    run = Run(MODEL_NAME, effort, settings.samples, settings.temperature, settings.top_p)
    wanted = keys(run, len(problems))
    model_id = fingerprint(directory)
    asked = {name: getattr(settings, name) for name in DECIDING}
    asked |= {"model": model_id, "dataset": fingerprint_problems(problems), "limit": len(problems)}
    asked |= {"effort": effort, "device": device, "dtype": dtype}
    about = {"version": trm.__version__, "model_name": settings.model or "bundled", "dataset_name": settings.dataset}
    about |= {name: getattr(settings, name) for name in SELECTING}

    progress: tqdm[NoReturn]
    with (
        Answers(_place(settings), wanted, asked, about) as answers,
        Solutions(settings, model_id, problems, wanted) as solutions,
        tqdm(total=len(problems), initial=solutions.write(answers.by_key), unit="problem") as progress,
    ):
        tally = solutions.tally
        if missing := [key for key in wanted if key not in answers.by_key]:
            candidate = Candidate("model", MODEL_NAME, directory, (run,))
            model, chat = load(directory, device, dtype, settings.quantize)
            sizes = {"seed": settings.seed, "max_tokens": settings.max_tokens, "max_rows": settings.max_rows}
            with decoding(candidate, model, chat, problems, **sizes) as decode:
                for answer in decode(run, missing):
                    answers.add(answer)
                    if written := solutions.write(answers.by_key):
                        progress.set_postfix(right=_share(tally), kept=tally.kept, refresh=False)
                        progress.update(written)
    return _summary(settings, tally)


def _describe(directory: Path) -> tuple[int, Any]:
    """The trained effort of a model, 0 for a plain one, and its backbone's configuration."""
    if not checkpoint.is_recursive(directory):
        return 0, checkpoint.read_backbone_config(directory)
    config = checkpoint.read_config(directory)
    return config.n_supervision, config.backbone_config


def _place(settings: SampleSettings) -> Place:
    output = settings.output
    if output.is_dir():
        raise ConfigError(f"--output {output}: is a directory; name a file in it")
    return Place(settings.command, f"--output {output}", Path(f"{output}.json"), Path(f"{output}.replies"), output)


def _share(tally: Tally) -> str:
    return f"{tally.right / tally.replies:.1%}"


def _summary(settings: SampleSettings, tally: Tally) -> str:
    left_out = "" if settings.keep_solved else ", left out"
    always = "" if settings.samples == 1 else f", {tally.always} by every reply{left_out}"
    cut = f", {tally.cut} cut off at --max-tokens {settings.max_tokens}" if tally.cut else ""
    return (
        f"{tally.problems} problems: {tally.solved} solved{always}\n"
        f"{tally.replies} replies: {tally.right} right ({_share(tally)}){cut}, {tally.kept} kept in {settings.output}\n"
        f"{tally.tokens} tokens, {tally.tokens / tally.seconds:.0f} a second"
    )
