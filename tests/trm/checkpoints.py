"""Loading a checkpoint, and what lies in its directory."""

from pathlib import Path

import torch

from tests.trm.conftest import some_prompt
from trm import TRMForCausalLM
from trm.checkpoint import BACKBONE_DIR, WEIGHTS_FILE

BACKBONE_WEIGHTS = f"{BACKBONE_DIR}/{WEIGHTS_FILE}"
IDS = torch.tensor([some_prompt(12)])


def load(directory: Path) -> TRMForCausalLM:
    return TRMForCausalLM.from_pretrained(directory)


def files(directory: Path) -> dict[str, bytes]:
    """Everything below a directory."""
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}
