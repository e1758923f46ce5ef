"""Build a training run from its settings and carry it through: data, backbone, model, trainer."""

import logging
from collections.abc import Collection
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import transformers
from pydantic import ValidationError

import trm
from training import checkpoints, workers
from training.checkpoints import FREE_ON_RESUME, RUN_JSON, STATE_JSON
from training.config import TrainSettings
from training.problems.data import encode_problems, load_problems
from training.stopping import stop_on_signals
from training.trainer import Trainer, fingerprint
from training.validation import split_problems
from trm import TRMForCausalLM, bundled_model_path, checkpoint
from trm.chat import ChatFormat
from trm.device import use_device
from trm.errors import CheckpointError, ConfigError

logger = logging.getLogger(__name__)

MOVABLE = ("dataset", "validation", "backbone")  # settings that may name a file or directory


def train(settings: TrainSettings) -> Path:
    """Train, or go on training, to the end or to SIGTERM or Ctrl-C; returns the last checkpoint."""
    settings = _with_absolute_paths(settings)
    given = settings.model_fields_set
    if settings.resume is not None:
        settings = resumed_settings(settings, checkpoints.find(settings.resume))
    if settings.dataset is None:
        raise ConfigError("--dataset is needed: gsm8k, numina, math, synthetic or a JSON-lines file")
    run_dir = settings.output_dir
    if settings.resume is None and checkpoints.checkpoints(run_dir):
        raise ConfigError(f"--output-dir {run_dir}: holds a run already; --resume {run_dir}, or choose another")
    device = use_device(settings.device, settings.num_threads)
    if settings.backbone_dtype == "auto":  # settled once: a run resumed elsewhere keeps it
        settings = settings.model_copy(update={"backbone_dtype": "bfloat16" if device == "cuda" else "float32"})
    workers.start(device)
    if workers.rank() > 0:
        return _train(settings, given, device)
    require_writable(run_dir)
    with checkpoints.claim(run_dir):
        checkpoints.clear_leftovers(run_dir)
        return _train(settings, given, device)


def _train(settings: TrainSettings, given: Collection[str], device: str) -> Path:
    """The run itself, in a directory that is ours; `given` names the settings that this start was given."""
    run_dir = settings.output_dir
    source, revision = backbone_source(settings)
    if settings.resume is not None:  # what the run has used all along: a copy, or one commit of the hub
        copied = (settings.resume / checkpoint.BACKBONE_DIR).is_dir()
        if copied and "backbone" not in given:
            source, revision = str(settings.resume), None
        elif not copied:
            revision = checkpoint.read_config(settings.resume).backbone_revision
        _require_files(settings, [name for name in MOVABLE if name != "backbone" or not copied])
    trainer = build_trainer(settings, source, revision, device)
    if workers.rank() == 0:
        checkpoints.require_space(run_dir, trainer.checkpoint_bytes(), settings.keep_last)
    trainer.keep_states(settings.cache_dir or run_dir / "cache")
    if settings.resume is not None:
        trainer.load(settings.resume)
    if workers.rank() > 0:
        with stop_on_signals() as stop:
            return trainer.run(run_dir, stop)
    if settings.resume is not None:
        _warn_of_later(run_dir, trainer.step)
    summary = _summary(trainer)
    logger.info(
        "%d examples (%d labels), %d for validation, %d optimiser steps, %.2fM trained parameters, "
        "on %s, bfloat16 products %s",
        summary["num_examples"],
        summary["num_labels"],
        summary["num_validation_examples"],
        trainer.total_steps,
        summary["trained_parameters"] / 1e6,
        device,
        "on" if trainer.autocast else "off",
    )
    before = checkpoint.read_json(run_dir / RUN_JSON) if settings.resume and (run_dir / RUN_JSON).exists() else {}
    checkpoint.write_json(run_dir / RUN_JSON, before | summary)
    try:
        with stop_on_signals() as stop:
            last = trainer.run(run_dir, stop)
    except OSError as error:
        raise CheckpointError(
            f"{error.filename or run_dir}: cannot be written: {error.strerror}; checkpoints are unharmed: "
            f"make room, then go on with trm-train --resume {run_dir}"
        ) from error
    _report_end(trainer, checkpoint.read_json(run_dir / RUN_JSON), run_dir)
    return last


def backbone_source(settings: TrainSettings) -> tuple[str, str | None]:
    """Directory or hub id, and revision, of a new run's backbone: the bundled one unless another is named."""
    return settings.backbone or str(bundled_model_path()), settings.backbone_revision


def build_trainer(settings: TrainSettings, source: str, revision: str | None, device: str) -> Trainer:
    """A trainer at step 0, with the data that the settings name, on the backbone of `source`."""
    chat = ChatFormat(checkpoint.read_tokenizer(source, revision), settings.normalize_text)
    problems = load_problems(
        str(settings.dataset),
        split="train",
        seed=settings.seed,
        num_problems=settings.num_problems,
        keep_annotations=settings.keep_annotations,
    )
    problems, held_out = split_problems(settings, problems)
    examples = encode_problems(problems, chat, settings.max_length)
    validation = encode_problems(held_out, chat, settings.max_length) if held_out else []
    backbone = checkpoint.read_backbone(source, revision, getattr(torch, settings.backbone_dtype))
    record = checkpoint.backbone_record(source, revision, backbone)
    torch.manual_seed(settings.seed)
    model = TRMForCausalLM.from_backbone(backbone, eos_token_id=chat.end_id, **model_settings(settings), **record)
    trainer = Trainer(settings, model, chat, examples, device)
    trainer.validation = validation
    return trainer


def resumed_settings(settings: TrainSettings, checkpoint_dir: Path) -> TrainSettings:
    """The settings that a checkpoint was trained with, and the few that may differ now.

    The run goes on in the checkpoint's own run directory unless another is asked for.
    Raises ConfigError for a setting given now that contradicts the run.
    """
    stored = checkpoints.read_state(checkpoint_dir)["settings"]
    now = settings.model_dump(mode="json", exclude={"config", "resume"})
    given = {name: value for name, value in now.items() if name in settings.model_fields_set}
    for name, value in given.items():
        if name not in FREE_ON_RESUME and stored.get(name) != value:
            flag = f"--{name.replace('_', '-')}"
            raise ConfigError(
                f"{flag} {value}: the run to resume has {stored.get(name)}; leave {flag} out, or start a new run"
            )
    merged = {"output_dir": str(checkpoint_dir.resolve().parent)}
    merged = stored | merged | {name: value for name, value in given.items() if name in FREE_ON_RESUME}
    try:
        return TrainSettings(**merged, resume=checkpoint_dir)
    except ValidationError as error:
        raise CheckpointError(
            f"{checkpoint_dir / STATE_JSON}: settings that this program does not know: {error}"
        ) from error


def require_writable(directory: Path, flag: str = "--output-dir") -> None:
    """Make the directory that `flag` names. Raises ConfigError where no file can be made in it."""
    probe = directory / ".writable"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ConfigError(f"{flag} {directory}: cannot write there: {error.strerror}") from error


def _with_absolute_paths(settings: TrainSettings) -> TrainSettings:
    """Data and backbone named so that a resumed run finds them from any directory."""
    given = {name: getattr(settings, name) for name in MOVABLE}
    absolute = {name: str(Path(value).resolve()) for name, value in given.items() if value and Path(value).exists()}
    return settings.model_copy(update=absolute)


def _require_files(settings: TrainSettings, names: Collection[str]) -> None:
    """Raise ConfigError for a file of the run to resume that is gone."""
    for name in names:
        value = getattr(settings, name)
        if value and Path(value).is_absolute() and not Path(value).exists():
            raise ConfigError(
                f"--{name} {value}: the run to resume was started with it, and it is gone; "
                f"say with --{name} where it is now"
            )


def _warn_of_later(run_dir: Path, step: int) -> None:
    later = [path.name for path in checkpoints.checkpoints(run_dir) if checkpoints.step_of(path) > step]
    if later:
        logger.warning(
            "going on from step %d, but %s is there already: it stays until this run gets there, "
            "and --resume %s would take it",
            step,
            later[-1],
            run_dir,
        )


def _summary(trainer: Trainer) -> dict[str, Any]:
    """What run.json says of a run before its first step."""
    versions = {"qwen-trm": trm.__version__, "torch": torch.__version__, "transformers": transformers.__version__}
    return {
        "settings": trainer.settings.model_dump(mode="json", exclude={"config", "resume"}),
        "versions": versions,
        "num_examples": len(trainer.examples),
        "num_labels": sum(len(example.ids) - example.label_start for example in trainer.examples),
        "num_validation_examples": len(trainer.validation),
        "data_fingerprint": trainer.data_fingerprint,
        "validation_fingerprint": fingerprint(trainer.validation),
        "backbone_fingerprint": trainer.backbone_fingerprint,
        "total_steps": trainer.total_steps,
        "trained_parameters": sum(p.numel() for p in trainer.parameters.values()),
    }


def _report_end(trainer: Trainer, record: dict[str, Any], run_dir: Path) -> None:
    """The summary that is in run.json, and how to go on."""
    logger.info("%s:\n%s", run_dir / RUN_JSON, "\n".join(f"  {name}: {value}" for name, value in record.items()))
    duration = timedelta(seconds=round(record["wall_s"]))
    if trainer.step == trainer.total_steps:
        logger.info("finished at step %d after %s", trainer.step, duration)
    else:
        logger.info("stopped at step %d of %d after %s", trainer.step, trainer.total_steps, duration)
        logger.info("go on with: trm-train --resume %s", run_dir)


def model_settings(settings: TrainSettings) -> dict[str, Any]:
    """The fields of TRMConfig that a run's settings decide."""
    names = (
        "n_latent",
        "n_cycles",
        "n_supervision",
        "n_layers",
        "expansion",
        "max_supervision",
        "kv_source",
        "normalize_text",
    )
    return {name: getattr(settings, name) for name in names} | {"own_lm_head": settings.train_lm_head}
