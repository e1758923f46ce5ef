"""Build a training run from its settings and carry it through: data, backbone, model, trainer."""

import logging
from pathlib import Path
from typing import Any

import torch
import transformers

import trm
from training.config import TrainSettings
from training.data import encode_problems, load_problems
from training.trainer import STATE_JSON, Trainer
from trm import TRMForCausalLM, bundled_model_path, checkpoint
from trm.chat import ChatFormat
from trm.device import use_device
from trm.errors import CheckpointError, ConfigError

logger = logging.getLogger(__name__)

FREE_ON_RESUME = {"config", "resume", "output_dir", "max_steps", "epochs", "save_steps", "device", "num_threads"}


def train(settings: TrainSettings) -> Path:
    """Train, or go on training, to the end; returns the last checkpoint."""
    if settings.resume is not None:
        settings = resumed_settings(settings, settings.resume)
    if settings.dataset is None:
        raise ConfigError("--dataset is needed: gsm8k, numina, math, synthetic or a JSON-lines file")
    device = use_device(settings.device, settings.num_threads)
    run_dir = settings.output_dir
    require_writable(run_dir)

    source, revision = settings.backbone or str(bundled_model_path()), settings.backbone_revision
    chat = ChatFormat(checkpoint.read_tokenizer(source, revision), settings.normalize_text)
    problems = load_problems(
        settings.dataset,
        split="train",
        seed=settings.seed,
        num_problems=settings.num_problems,
        keep_annotations=settings.keep_annotations,
    )
    examples = encode_problems(problems, chat, settings.max_length)
    backbone = checkpoint.read_backbone(source, revision)
    record = checkpoint.backbone_record(source, revision, backbone)
    torch.manual_seed(settings.seed)
    model = TRMForCausalLM.from_backbone(backbone, eos_token_id=chat.end_id, **_model_settings(settings), **record)
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
        "settings": settings.model_dump(mode="json"),
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
    stored = checkpoint.read_json(checkpoint_dir / STATE_JSON).get("settings")
    if not isinstance(stored, dict):
        raise CheckpointError(f"{checkpoint_dir}: holds no training state to resume from")
    given = {
        name: value for name, value in settings.model_dump(mode="json").items() if name in settings.model_fields_set
    }
    for name, value in given.items():
        if name not in FREE_ON_RESUME and stored.get(name) != value:
            flag = f"--{name.replace('_', '-')}"
            raise ConfigError(
                f"{flag} {value}: the run to resume has {stored.get(name)}; leave {flag} out, or start a new run"
            )
    merged = stored | {name: value for name, value in given.items() if name in FREE_ON_RESUME}
    merged |= {
        "resume": str(checkpoint_dir),
        "output_dir": given.get("output_dir", str(checkpoint_dir.resolve().parent)),
    }
    return TrainSettings.model_validate(merged)


def require_writable(run_dir: Path) -> None:
    """Raise ConfigError unless files can be made in the run directory, before any work is done."""
    probe = run_dir / ".writable"
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ConfigError(f"--output-dir {run_dir}: cannot write there: {error.strerror}") from error


def _model_settings(settings: TrainSettings) -> dict[str, Any]:
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
