"""Which device a command runs on."""

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
