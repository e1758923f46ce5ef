"""Carry a training run through: claim its directory, build or resume its trainer, train, say how it ended."""

import logging
from collections.abc import Collection
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import transformers

import trm
from training import checkpoints, workers
from training.building import backbone_source, build_trainer, settings_from
from training.checkpoints import RUN_JSON
from training.config import TrainSettings
from training.problems.data import fingerprint
from training.resuming import resumed_backbone, resumed_settings, with_absolute_paths
from training.stopping import stop_on_signals
from training.trainer import Trainer
from trm import checkpoint, extra
from trm.device import use_device
from trm.errors import CheckpointError, ConfigError

logger = logging.getLogger(__name__)


def train(settings: TrainSettings) -> Path:
    """Train, or go on training, to the end or to SIGTERM or Ctrl-C; returns the last checkpoint."""
    extra.require("tensorboard", "training")
    settings = with_absolute_paths(settings)
    given = settings.model_fields_set
    if settings.resume is not None:
        settings = resumed_settings(settings, settings.resume)
    elif settings.init_from is not None:
        settings = settings_from(settings, checkpoint.locate(settings.init_from))
    if settings.dataset is None:
        raise ConfigError("--dataset is needed: gsm8k, numina, math, synthetic or a JSON-lines file")
    run_dir = settings.output_dir
    if settings.resume is None and checkpoints.checkpoints(run_dir):
        raise ConfigError(
            f"--output-dir {run_dir}: holds a run already; go on with --resume {run_dir}, or choose another"
        )
    device = use_device(settings.device, settings.num_threads)
    workers.start(device)
    with checkpoints.claim(run_dir) if workers.rank() == 0 else nullcontext():
        return _train(settings, given, device)


def _train(settings: TrainSettings, given: Collection[str], device: str) -> Path:
    """The run itself, in a directory that is ours; `given` names the settings that this start was given."""
    run_dir = settings.output_dir
    source, revision = backbone_source(settings)
    if settings.resume is not None:
        source, revision = resumed_backbone(settings, settings.resume, given, source, revision)
    trainer = build_trainer(settings, source, revision, device)
    place = Path(source)
    if settings.resume is None and "backbone" in given and place.is_dir() and checkpoint.is_recursive(place):
        logger.info("--backbone %s: nothing of its decoder is taken; --init-from would begin with that", source)
    if workers.rank() == 0:
        checkpoints.require_space(run_dir, trainer.checkpoint_bytes(), settings.keep_last)
    trainer.keep_states(settings.cache_dir or run_dir / "cache")
    if settings.resume is not None:
        trainer.load(settings.resume)
    if workers.rank() > 0:
        with stop_on_signals() as stop:
            return trainer.run(run_dir, stop)
    if settings.resume is not None:
        checkpoints.warn_of_later(run_dir, trainer.step)
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
    if settings.max_steps is not None and settings.max_steps > trainer.total_steps:
        logger.warning(
            "--max-steps %d: the run ends after %d, with the data; raise --epochs to go on",
            settings.max_steps,
            trainer.total_steps,
        )
    if (vocabulary := trainer.feed.vocabulary) is not None:
        logger.info(
            "the training loss is over %d of %d tokens, those of the replies; the validation loss over all",
            *(len(part) for part in vocabulary),
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


def _summary(trainer: Trainer) -> dict[str, Any]:
    """What run.json says of a run before its first step."""
    versions = {"qwen-trm": trm.__version__, "torch": torch.__version__, "transformers": transformers.__version__}
    examples = trainer.feed.examples
    return {
        "settings": trainer.settings.model_dump(mode="json", exclude={"config", "resume"}),
        "versions": versions,
        "num_examples": len(examples),
        "num_labels": sum(len(example.ids) - example.label_start for example in examples),
        "num_validation_examples": len(trainer.validation),
        "data_fingerprint": trainer.data_fingerprint,
        "validation_fingerprint": fingerprint(trainer.validation),
        "backbone_fingerprint": trainer.backbone_fingerprint,
        "total_steps": trainer.total_steps,
        "trained_parameters": sum(p.numel() for p in trainer.weights.parameters.values()),
    }


def _report_end(trainer: Trainer, record: dict[str, Any], run_dir: Path) -> None:
    """How far it came, which checkpoint is best, and how to go on."""
    if best := record["best"]:
        logger.info("lowest validation loss: %.4g, of checkpoint-%d", best["loss"], best["step"])
    duration = timedelta(seconds=round(record["wall_s"]))
    if trainer.step == trainer.total_steps:
        logger.info("finished at step %d after %s", trainer.step, duration)
    else:
        logger.info("stopped at step %d of %d after %s", trainer.step, trainer.total_steps, duration)
        logger.info("go on with: trm-train --resume %s", run_dir)
