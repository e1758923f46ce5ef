"""Load a model for decoding: on its device, in its type, with its linear layers packed.

And further decoders, on the backbone of one that was loaded before.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from trm import bundled_model_path, checkpoint
from trm.backbone import Backbone
from trm.chat import ChatFormat
from trm.config import TRMConfig
from trm.device import has_fast_bfloat16, lay_out_by_columns, own_memory, use_device
from trm.errors import CheckpointError, ConfigError
from trm.linear import pack, pack_fp8
from trm.model import TRMForCausalLM

LARGE = 15_000_000  # weights of a backbone from which on bfloat16 was faster than float32, at 1, 8 and 32 rows
BEHAVIOUR = ("model_type", "hidden_act", "rms_norm_eps", "rope_parameters", "layer_types", "sliding_window")
"""What a backbone computes beside its weights, by the names in its configuration."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
QUANTIZED = {"int8": "cpu", "fp8": "cuda"}
"""On which device the backbone's linear layers can be of which type of 8 bits."""


def load_for_decoding(
    source: str | Path | None,
    *,
    device: str = "auto",
    dtype: str = "auto",
    quantize: str | None = None,
    num_threads: int | None = None,
    keep_head: bool = False,
) -> TRMForCausalLM:
    """A checkpoint, None for the bundled one, ready for `trm.engine`; it can no longer be trained or saved.

    dtype: "float32", "bfloat16", or "auto": bfloat16 where the device computes it natively and the model is large
    enough to gain by it. quantize: "int8" on a CPU or "fp8" on a GPU, for the backbone's linear layers; the recursion
    stays in bfloat16.
    keep_head: keep the backbone's head for decoders beside this one, even if this one has its own.
    Raises CheckpointError, and ConfigError for what this device cannot do.
    """
    place = use_device(device, num_threads)
    source = source or bundled_model_path()
    chosen = choose_dtype(
        dtype, quantize, place, lambda: checkpoint.read_config(checkpoint.locate(source)).backbone_config
    )
    model = TRMForCausalLM.from_pretrained(source, dtype=DTYPES[chosen], device_map=place)
    directory = checkpoint.locate(source)
    model.backbone.identity = checkpoint.backbone_identity(directory, model.config)
    model.stored = checkpoint.stored(directory, model.config, model.backbone.identity)
    return prepare_for_decoding(model, quantize, keep_head)


def load_beside(source: str | Path, first: TRMForCausalLM, chat: ChatFormat) -> tuple[TRMForCausalLM, ChatFormat]:
    """The decoder of another checkpoint on the backbone of `first`, which was loaded for decoding, and its prompts.

    `chat`: that of `first`, whose tokenizer they share. Of the checkpoint's own backbone nothing stays in memory.
    Raises CheckpointError, also where the checkpoint stands on another backbone or has another tokenizer.
    """
    directory = checkpoint.locate(source)
    config = checkpoint.read_config(directory)
    backbone, identity = first.backbone, checkpoint.backbone_identity(directory, config)
    if identity is None or backbone.identity is None:
        whose = f"{directory}: its {checkpoint.CONFIG_FILE}" if identity is None else "the served model"
        raise CheckpointError(f"{whose} records no fingerprint of its backbone; save it again with this version")
    if identity != backbone.identity:
        raise CheckpointError(
            f"{directory}: was trained on a backbone with fingerprint {identity}, "
            f"but the served one has {backbone.identity}; serve it with a backbone of its own"
        )
    checkpoint.check_structure(directory, config, backbone)
    _check_behaviour(directory, config, backbone.config)
    if not config.own_lm_head and isinstance(backbone.lm_head, nn.Identity):
        raise CheckpointError(
            f"{directory}: needs the backbone's head, which was left out since the served model has its own; "
            "name the decoder when the server starts"
        )
    _check_tokenizer(directory, chat.tokenizer)
    model = TRMForCausalLM(config, backbone)
    model.load_trained(checkpoint.read_decoder(directory), str(directory))
    model.stored = checkpoint.stored(directory, config, identity)
    parts = [part.to(first.device, first.decoder.dtype) for part in (model.decoder, model.lm_head) if part is not None]
    _lay_out(model, parts)
    return model.eval(), ChatFormat(chat.tokenizer, config.normalize_text)


def _check_behaviour(directory: Path, config: TRMConfig, served: Any) -> None:
    """Raise CheckpointError unless a checkpoint's backbone computes as the served one does, whose weights it has."""
    copy = directory / checkpoint.BACKBONE_DIR
    own = checkpoint.read_backbone_config(copy) if copy.is_dir() else config.backbone_config
    for name in BEHAVIOUR:
        ours, theirs = getattr(own, name, None), getattr(served, name, None)
        if ours != theirs:
            raise CheckpointError(
                f"{directory}: {name} of its backbone is {ours}, and {theirs} of the served one; serve it by itself"
            )


def _check_tokenizer(directory: Path, served: Any) -> None:
    """Raise CheckpointError unless a checkpoint's tokenizer and chat template are those that are served."""
    own = checkpoint.read_tokenizer(directory)
    for what, ours, theirs in (
        ("tokenizer", own.backend_tokenizer.to_str(), served.backend_tokenizer.to_str()),
        ("chat template", own.chat_template, served.chat_template),
        ("end token", own.eos_token_id, served.eos_token_id),
    ):
        if ours != theirs:
            raise CheckpointError(f"{directory}: its {what} is not that of the served model; serve it by itself")


def choose_dtype(dtype: str, quantize: str | None, device: str, read_backbone_config: Callable[[], Any]) -> str:
    """One of `DTYPES` for what was asked for; see `load_for_decoding`. The configuration is read for "auto" only."""
    if quantize not in (None, *QUANTIZED) or dtype not in ("auto", *DTYPES):
        known = f"there are auto, {', '.join(DTYPES)}, and {', '.join(QUANTIZED)}"
        raise ConfigError(f"--dtype {dtype} --quantize {quantize}: {known}")
    if quantize is not None and device != QUANTIZED[quantize]:
        raise ConfigError(f"--quantize {quantize}: only on {QUANTIZED[quantize]} so far; leave it out on {device}")
    if quantize is not None and dtype == "float32":
        raise ConfigError(f"--quantize {quantize}: the rest is bfloat16 then; leave --dtype float32 out")
    if quantize is not None:
        return "bfloat16"
    return best_dtype(read_backbone_config(), device) if dtype == "auto" else dtype


def best_dtype(backbone_config: Any, device: str) -> str:
    """The type that decodes fastest on a device."""
    if device == "cuda":
        return "bfloat16"
    with torch.device("meta"):
        weights = sum(weight.numel() for weight in Backbone(backbone_config).parameters())
    return "bfloat16" if has_fast_bfloat16(device) and weights >= LARGE else "float32"


def prepare_for_decoding(model: TRMForCausalLM, quantize: str | None = None, keep_head: bool = False) -> TRMForCausalLM:
    """Give a loaded model the layout that its device decodes fastest from; see `load_for_decoding`."""
    short = model.backbone.dtype == model.decoder.dtype == torch.bfloat16
    if quantize is not None and not (short and model.device.type == QUANTIZED[quantize]):
        raise ConfigError(f"--quantize {quantize}: needs a model in bfloat16 on {QUANTIZED[quantize]}")
    if model.device.type == "cpu" and model.lm_head is not None and not keep_head:
        model.backbone.lm_head = nn.Identity()  # nobody reads it
    if quantize == "fp8":
        pack_fp8(model.backbone)
    _lay_out(model, [model], quantize)
    return model


def _lay_out(model: TRMForCausalLM, parts: Sequence[nn.Module], quantize: str | None = None) -> None:
    """Give parts of a model on a CPU the layout that is read fastest, in memory of their own."""
    if model.device.type != "cpu":
        return
    if model.backbone.dtype == model.decoder.dtype == torch.bfloat16:
        model.exact = pack(model, model.backbone if quantize == "int8" else None)  # what is packed stays as it is
    else:
        for part in parts:
            lay_out_by_columns(part)
    for part in parts:
        own_memory(part)
