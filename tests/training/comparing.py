"""Bitwise comparison of checkpoints."""

from pathlib import Path

import torch
from safetensors.torch import load_file

from training.checkpoints import STATE_TENSORS
from trm import checkpoint


def differing_tensors(ours: Path, theirs: Path) -> list[str]:
    """Names of the tensors, in weights, masters, optimiser and carried states, that are not bitwise equal."""
    wrong = []
    for file in (checkpoint.WEIGHTS_FILE, STATE_TENSORS):
        one, other = load_file(ours / file), load_file(theirs / file)
        names = one.keys() | other.keys()
        wrong += [n for n in sorted(names) if n not in one or n not in other or not torch.equal(one[n], other[n])]
    return wrong
