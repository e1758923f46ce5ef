"""Which device a command runs on."""

import torch

from trm.errors import ConfigError


def resolve_device(device: str) -> str:
    """ "cpu" or "cuda"; "auto" takes CUDA where there is one. Raises ConfigError for a device that is not there."""
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: torch finds no CUDA device; use --device cpu")
    return device
