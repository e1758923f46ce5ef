"""Which device a command runs on, and what it is good at."""

import torch

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
