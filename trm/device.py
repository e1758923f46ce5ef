"""Which device a command runs on, and what it is good at."""

import torch
from torch import nn

from trm.errors import ConfigError


def use_device(device: str, num_threads: int | None = None) -> str:
    """Resolve "auto" to "cuda" where there is one, else "cpu", and set the number of CPU threads if one is given.

    Raises ConfigError for a device that is not there.
    """
    if num_threads is not None:
        torch.set_num_threads(num_threads)
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: torch finds no CUDA device; use --device cpu")
    return device


def has_fast_bfloat16(device: str) -> bool:
    """Whether bfloat16 matrix products are native there."""
    if device == "cuda":
        return bool(torch.cuda.is_bf16_supported())
    return bool(torch.cpu._is_avx512_bf16_supported())


def lay_out_for_decoding(model: nn.Module) -> None:
    """On a CPU, copy all weights out of their files, those of linear layers by columns: read faster by 4 to 32 rows.

    What is loaded in the precision of its file is a window into that file: one that is overwritten would change what
    is decoded, one that is cut short would end the process.

    Measured on a CPU with MKL: up to 1.8 times as fast at 8 to 20 rows, never slower. Embeddings, and heads
    tied to them, stay as they are. Not for training: sums come out in another order.
    """
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    columns = {id(module.weight) for module in model.modules() if isinstance(module, nn.Linear)} - embeddings
    for parameter in model.parameters():
        if parameter.device.type == "cpu" and id(parameter) in columns:
            parameter.data = parameter.data.t().clone(memory_format=torch.contiguous_format).t()
        elif parameter.device.type == "cpu":
            parameter.data = parameter.data.clone()
