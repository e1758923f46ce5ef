"""Load a model for decoding: on its device, in its type, with its linear layers packed."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from trm import bundled_model_path, checkpoint
from trm.backbone import Backbone
from trm.device import has_fast_bfloat16, lay_out_by_columns, own_memory, use_device
from trm.errors import ConfigError
from trm.linear import pack
from trm.model import TRMForCausalLM

LARGE = 15_000_000  # weights of a backbone from which on bfloat16 was faster than float32, at 1, 8 and 32 rows
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def load_for_decoding(
    source: str | Path | None,
    *,
    device: str = "auto",
    dtype: str = "auto",
    quantize: str | None = None,
    num_threads: int | None = None,
) -> TRMForCausalLM:
    """A checkpoint, None for the bundled one, ready for `trm.engine`; it can no longer be trained or saved.

    dtype: "float32", "bfloat16", or "auto": bfloat16 where the device computes it natively and the model is large
    enough to gain by it. quantize: "int8" for the backbone's linear layers, on a CPU; the recursion stays in bfloat16.
    Raises CheckpointError, and ConfigError for what this device cannot do.
    """
    place = use_device(device, num_threads)
    source = source or bundled_model_path()
    chosen = choose_dtype(
        dtype, quantize, place, lambda: checkpoint.read_config(checkpoint.locate(source)).backbone_config
    )
    model = TRMForCausalLM.from_pretrained(source, dtype=DTYPES[chosen], device_map=place)
    return prepare_for_decoding(model, quantize)


def choose_dtype(dtype: str, quantize: str | None, device: str, read_backbone_config: Callable[[], Any]) -> str:
    """One of `DTYPES` for what was asked for; see `load_for_decoding`. The configuration is read for "auto" only."""
    if quantize not in (None, "int8") or dtype not in ("auto", *DTYPES):
        raise ConfigError(f"--dtype {dtype} --quantize {quantize}: there are auto, {', '.join(DTYPES)}, and int8")
    if quantize is not None and device != "cpu":
        raise ConfigError(f"--quantize {quantize}: only on a CPU so far; leave it out on {device}")
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


def prepare_for_decoding(model: TRMForCausalLM, quantize: str | None = None) -> TRMForCausalLM:
    """Give a loaded model the layout that its device decodes fastest from; see `load_for_decoding`."""
    short = model.backbone.dtype == model.decoder.dtype == torch.bfloat16
    if quantize is not None and not (short and model.device.type == "cpu"):
        raise ConfigError(f"--quantize {quantize}: needs a model in bfloat16 on a CPU")
    if model.device.type != "cpu":
        return model
    if model.lm_head is not None:
        model.backbone.lm_head = nn.Identity()  # nobody reads it
    if short:
        model.exact = pack(model, model.backbone if quantize == "int8" else None)
    else:
        lay_out_by_columns(model)
    own_memory(model)
    return model
