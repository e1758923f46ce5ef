"""Loading a model to decode with it: one definition for servers, benchmarks and evaluation."""

import torch

from trm import bundled_model_path
from trm.device import lay_out_for_decoding, use_device
from trm.errors import ConfigError
from trm.model import TRMForCausalLM


def load_for_decoding(
    source: str | None,
    *,
    device: str = "auto",
    dtype: str = "auto",
    quantize: str | None = None,
    num_threads: int | None = None,
) -> TRMForCausalLM:
    """The model of a checkpoint directory or hub id, by default the bundled one, ready for an engine.

    dtype "auto" is bfloat16 on cuda, float32 on a CPU. Raises CheckpointError and ConfigError.
    """
    if quantize is not None:
        raise ConfigError(f"--quantize {quantize}: weights cannot be quantised yet; leave it out")
    device = use_device(device, num_threads)
    chosen = {"auto": torch.bfloat16 if device == "cuda" else torch.float32}.get(dtype, dtype)
    model = TRMForCausalLM.from_pretrained(source or str(bundled_model_path()), dtype=chosen, device_map=device)
    lay_out_for_decoding(model)
    return model
