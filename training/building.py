"""Build a trainer from a run's settings: data, backbone, model, and the decoder that it begins with."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from training.config import TrainSettings
from training.problems.data import asked_work, encode_problems, load_problems
from training.trainer import Trainer
from training.validation import split_problems
from trm import TRMForCausalLM, bundled_model_path, checkpoint
from trm.chat import ChatFormat, Example
from trm.errors import ConfigError
from trm.loading import best_dtype

logger = logging.getLogger(__name__)

MODEL_SETTINGS = (
    "n_latent",
    "n_cycles",
    "n_supervision",
    "n_layers",
    "expansion",
    "max_supervision",
    "kv_source",
    "context_layers",
    "normalize_text",
)
SHAPE_SETTINGS = {"n_layers", "expansion", "kv_source", "context_layers", "train_lm_head"}  # that the weights decide


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
    kinds = settings.replies, settings.step_targets
    examples = encode_problems(problems, chat, settings.max_length, *kinds)
    validation = encode_problems(held_out, chat, settings.max_length, *kinds, kind="validation") if held_out else []
    if settings.step_targets:
        _require_step_targets(examples, settings)
    if settings.backbone_dtype == "auto":  # settled once: a run resumed elsewhere keeps it
        wide = device == "cpu" and settings.autocast == "off"
        dtype = "float32" if wide else best_dtype(checkpoint.read_backbone_config(source, revision), device)
        settings = settings.model_copy(update={"backbone_dtype": dtype})
    backbone = checkpoint.read_backbone(source, revision, getattr(torch, settings.backbone_dtype))
    record = checkpoint.backbone_record(source, revision, backbone)
    torch.manual_seed(settings.seed)
    about = model_settings(settings) | record | {"work": asked_work(problems, settings.replies)}
    model = TRMForCausalLM.from_backbone(backbone, eos_token_id=chat.end_id, **about)
    if settings.init_from is not None and settings.resume is None:
        _begin_with(model, settings.init_from)
    return Trainer(settings, model, chat, examples, device, validation)


def _begin_with(model: TRMForCausalLM, source: Path) -> None:
    """Give the model the decoder of a checkpoint, which must stand on the same backbone."""
    wanted, found = checkpoint.read_config(source).backbone_fingerprint, model.config.backbone_fingerprint
    if wanted != found:
        raise ConfigError(
            f"--init-from {source}: its decoder was trained on a backbone with fingerprint {wanted}, "
            f"and {model.config.backbone_source} has {found} now; get that revision, and if it was trained in another "
            f"--backbone-dtype than {str(model.backbone.dtype).removeprefix('torch.')}, give that"
        )
    weights = checkpoint.read_tensors(source / checkpoint.WEIGHTS_FILE)
    model.load_trained({name: tensor.float() for name, tensor in weights.items()}, str(source))


def _require_step_targets(examples: Sequence[Example], settings: TrainSettings) -> None:
    """Raise ConfigError where no example has intermediate results; warn where some have more than there are steps."""
    results = [1 + len(example.step_replies) for example in examples]
    if max(results) == 1:
        raise ConfigError(
            f"--step-targets: no reply is the answer alone of a problem with known intermediate results "
            f"(--replies {','.join(settings.replies)}, --dataset {settings.dataset}); "
            "add answer to --replies, and take data with steps or annotations"
        )
    if too_many := sum(count > settings.n_supervision for count in results):
        logger.warning(
            "%d of %d examples have more results than --n-supervision %d, up to %d: their answer is never a target",
            too_many,
            len(examples),
            settings.n_supervision,
            max(results),
        )


def settings_from(settings: TrainSettings, source: Path) -> TrainSettings:
    """The settings of a run that begins with the decoder of the checkpoint `source`: its backbone and its model.

    What `settings` were given stands, as far as the weights fit. Raises ConfigError where they do not.
    """
    config, given = checkpoint.read_config(source), settings.model_fields_set
    if "backbone" in given:
        raise ConfigError(f"--init-from {source}: a decoder belongs to its backbone; leave out --backbone")
    copied = (source / checkpoint.BACKBONE_DIR).is_dir()
    stored = {name: getattr(config, name) for name in MODEL_SETTINGS}
    stored |= {"context_layers": config.context_layers or [], "train_lm_head": config.own_lm_head}
    for name in SHAPE_SETTINGS & given:
        if getattr(settings, name) != stored[name]:
            flag = f"--{name.replace('_', '-')}"
            raise ConfigError(
                f"{flag} {getattr(settings, name)}: the decoder of --init-from {source} has {stored[name]}"
            )
    if "n_supervision" in given:
        del stored["max_supervision"]  # it grows with the depth
    values = stored | {name: getattr(settings, name) for name in given} | {"init_from": source.resolve()}
    values |= {"backbone": str(source.resolve()) if copied else config.backbone_source}
    return TrainSettings(**values | {"backbone_revision": None if copied else config.backbone_revision})


def backbone_source(settings: TrainSettings) -> tuple[str, str | None]:
    """Directory, hub id or file, and revision, of a new run's backbone: the bundled one unless another is named."""
    return settings.backbone or str(bundled_model_path()), settings.backbone_revision


def model_settings(settings: TrainSettings) -> dict[str, Any]:
    """The fields of TRMConfig that a run's settings decide."""
    return {name: getattr(settings, name) for name in MODEL_SETTINGS} | {"own_lm_head": settings.train_lm_head}
