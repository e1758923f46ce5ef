"""The training commands: parse, build, call. Nothing runs at import."""

import json
import logging
from pathlib import Path
from typing import Any

import torch

from training.config import EvalSettings, PretrainSettings, TrainSettings
from trm.errors import CheckpointError, ConfigError
from trm.settings import configure_logging, run_command

logger = logging.getLogger(__name__)

FREE_ON_RESUME = {"config", "resume", "output_dir", "max_steps", "epochs", "save_steps", "device", "num_threads"}


def train() -> None:
    """Entry point of `trm-train`."""
    run_command(_train, TrainSettings.command)


def evaluate() -> None:
    """Entry point of `trm-eval`."""
    run_command(_evaluate, EvalSettings.command)


def pretrain() -> None:
    """Entry point of `trm-pretrain`."""
    run_command(_pretrain, PretrainSettings.command)


def resumed_settings(settings: TrainSettings, checkpoint_dir: Path) -> TrainSettings:
    """The settings that a checkpoint was trained with, and the few that may differ now.

    The run goes on in the checkpoint's own run directory unless another is asked for.
    Raises ConfigError for a setting given now that contradicts the run.
    """
    from trm.checkpoint import read_json

    stored = read_json(checkpoint_dir / "training_state.json").get("settings")
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


def _train() -> None:
    settings = TrainSettings.from_command_line()
    configure_logging()
    from training.data import encode_problems, load_problems
    from training.trainer import Trainer
    from trm import TRMForCausalLM, bundled_model_path, checkpoint
    from trm.chat import ChatFormat

    if settings.resume is not None:
        settings = resumed_settings(settings, settings.resume)
    if settings.dataset is None:
        raise ConfigError("--dataset is needed: gsm8k, numina, math, synthetic or a JSON-lines file")
    device = use_device(settings.device, settings.num_threads)
    run_dir = settings.output_dir
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        (run_dir / ".writable").touch()
        (run_dir / ".writable").unlink()
    except OSError as error:
        raise ConfigError(f"--output-dir {run_dir}: cannot write there: {error.strerror}") from error

    source = settings.backbone or str(bundled_model_path())
    chat = ChatFormat(checkpoint.read_tokenizer(source, settings.backbone_revision), settings.normalize_text)
    problems = load_problems(settings.dataset, split="train", seed=settings.seed, num_problems=settings.num_problems)
    examples = encode_problems(problems, chat, settings.max_length)
    backbone = checkpoint.read_backbone(source, settings.backbone_revision)
    torch.manual_seed(settings.seed)
    model = TRMForCausalLM.from_backbone(
        backbone,
        **_model_settings(settings),
        **checkpoint.backbone_record(source, settings.backbone_revision, backbone),
    )
    trainer = Trainer(settings, model, chat, examples, device)
    if settings.resume is not None:
        trainer.load(settings.resume)
    decoder_size = sum(p.numel() for p in trainer.parameters.values())
    logger.info(
        "%d examples, %d optimiser steps, %.2fM trained parameters on %s",
        len(examples),
        trainer.total_steps,
        decoder_size / 1e6,
        device,
    )
    checkpoint.write_json(run_dir / "run.json", _run_record(settings, trainer))
    print(trainer.run(run_dir))  # noqa: T201 - the command's result


def _evaluate() -> None:
    settings = EvalSettings.from_command_line()
    configure_logging()
    from training.evaluate import evaluate_model

    device = use_device(settings.device, settings.num_threads)
    report = evaluate_model(settings, device)
    if settings.report is not None:
        settings.report.mkdir(parents=True, exist_ok=True)
        (settings.report / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report))  # noqa: T201 - the command's result


def _pretrain() -> None:
    settings = PretrainSettings.from_command_line()
    configure_logging()
    from training.pretrain import pretrain as run

    run(settings, use_device(settings.device, settings.num_threads))


def use_device(device: str, num_threads: int | None) -> str:
    """Resolve "auto", and set the number of CPU threads. Raises ConfigError for a device that is not there."""
    if num_threads is not None:
        torch.set_num_threads(num_threads)
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: torch finds no CUDA device; use --device cpu")
    return device


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


def _run_record(settings: TrainSettings, trainer: Any) -> dict[str, Any]:
    """What `run.json` keeps: settings, versions, sizes."""
    import transformers

    import trm

    return {
        "settings": settings.model_dump(mode="json"),
        "versions": {"qwen-trm": trm.__version__, "torch": torch.__version__, "transformers": transformers.__version__},
        "num_examples": len(trainer.examples),
        "total_steps": trainer.total_steps,
        "trained_parameters": sum(p.numel() for p in trainer.parameters.values()),
    }
