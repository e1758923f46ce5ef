"""Build a training run from its settings and carry it through: data, backbone, model, trainer."""

import logging
from pathlib import Path
from typing import Any

import torch
import transformers
from pydantic import ValidationError

import trm
from training.config import TrainSettings
from training.data import encode_problems, load_problems
from training.trainer import STATE_JSON, Trainer, read_state
from trm import TRMForCausalLM, bundled_model_path, checkpoint
from trm.chat import ChatFormat
from trm.device import use_device
from trm.errors import CheckpointError, ConfigError

logger = logging.getLogger(__name__)

FREE_ON_RESUME = {"output_dir", "max_steps", "epochs", "save_steps", "lr", "max_grad_norm", "device", "num_threads"}


def train(settings: TrainSettings) -> Path:
    """Train, or go on training, to the end; returns the last checkpoint."""
    settings = _with_absolute_paths(settings)
    if settings.resume is not None:
        settings = resumed_settings(settings, settings.resume)
    device = use_device(settings.device, settings.num_threads)
    if settings.backbone_dtype == "auto":  # settled once: a run resumed elsewhere keeps it
        settings = settings.model_copy(update={"backbone_dtype": "bfloat16" if device == "cuda" else "float32"})
    if settings.dataset is None:
        raise ConfigError("--dataset is needed: gsm8k, numina, math, synthetic or a JSON-lines file")
    run_dir = settings.output_dir
    if settings.resume is None and ((run_dir / "run.json").exists() or any(run_dir.glob("checkpoint-*"))):
        raise ConfigError(
            f"--output-dir {run_dir}: holds a run already; --resume one of its checkpoints, or choose another"
        )
    require_writable(run_dir)

    source, revision = settings.backbone or str(bundled_model_path()), settings.backbone_revision
    if settings.resume is not None:  # what the run has used all along: a copy, or one commit of the hub
        copied = (settings.resume / checkpoint.BACKBONE_DIR).is_dir()
        revision = None if copied else checkpoint.read_config(settings.resume).backbone_revision
        source = str(settings.resume) if copied else source
    chat = ChatFormat(checkpoint.read_tokenizer(source, revision), settings.normalize_text)
    problems = load_problems(
        settings.dataset,
        split="train",
        seed=settings.seed,
        num_problems=settings.num_problems,
        keep_annotations=settings.keep_annotations,
    )
    examples = encode_problems(problems, chat, settings.max_length)
    backbone = checkpoint.read_backbone(source, revision, getattr(torch, settings.backbone_dtype))
    record = checkpoint.backbone_record(source, revision, backbone)
    torch.manual_seed(settings.seed)
    model = TRMForCausalLM.from_backbone(backbone, eos_token_id=chat.end_id, **model_settings(settings), **record)
    trainer = Trainer(settings, model, chat, examples, device)
    if settings.resume is not None:
        trainer.load(settings.resume)
    trained = sum(p.numel() for p in trainer.parameters.values())
    logger.info(
        "%d examples, %d optimiser steps, %.2fM trained parameters, on %s, bfloat16 products %s",
        len(examples),
        trainer.total_steps,
        trained / 1e6,
        device,
        "on" if trainer.autocast else "off",
    )
    versions = {"qwen-trm": trm.__version__, "torch": torch.__version__, "transformers": transformers.__version__}
    run_record = {
        "settings": settings.model_dump(mode="json", exclude={"config", "resume"}),
        "versions": versions,
        "num_examples": len(examples),
        "data_fingerprint": trainer.data_fingerprint,
        "total_steps": trainer.total_steps,
        "trained_parameters": trained,
    }
    checkpoint.write_json(run_dir / "run.json", run_record)
    return trainer.run(run_dir)


def resumed_settings(settings: TrainSettings, checkpoint_dir: Path) -> TrainSettings:
    """The settings that a checkpoint was trained with, and the few that may differ now.

    The run goes on in the checkpoint's own run directory unless another is asked for.
    Raises ConfigError for a setting given now that contradicts the run.
    """
    stored = read_state(checkpoint_dir)["settings"]
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
    given = {"dataset": settings.dataset, "backbone": settings.backbone}
    absolute = {name: str(Path(value).resolve()) for name, value in given.items() if value and Path(value).exists()}
    return settings.model_copy(update=absolute)


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
