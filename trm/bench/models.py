"""What is measured: a checkpoint, or an untrained decoder on a plain backbone or on random weights of a known shape.

An untrained decoder has the depth of `UNTRAINED`: 12 calls of its block for a token at effort 4. It takes its time but
changes no token, so it says what a trained one of that depth would cost, and nothing about how well it would do.
"""

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, Qwen2Config

from trm import bundled_model_path, checkpoint
from trm.bench.settings import SHAPES
from trm.config import BACKBONES
from trm.errors import ConfigError
from trm.model import TRMForCausalLM

UNTRAINED: Mapping[str, int] = {"n_latent": 2, "n_cycles": 1, "n_supervision": 4}


@contextmanager
def checkpoint_of(source: str | None, shape: str | None = None) -> Iterator[Path]:
    """A checkpoint directory: `source` itself, or one made for the time being. Without either, the bundled model's.

    A backbone stays where it is, only random weights are written: 2 bytes each, into the folder for temporary files.
    """
    if source is not None and shape is not None:
        raise ConfigError(f"--model {source} and --shape {shape} are two models; give only one of them")
    directory = checkpoint.locate(source) if source is not None else bundled_model_path()
    plain = checkpoint.read_json(directory / checkpoint.CONFIG_FILE).get("model_type") in BACKBONES
    if shape is None and not plain:
        yield directory
        return
    with tempfile.TemporaryDirectory(prefix="trm-bench-") as scratch:
        if shape is not None:
            directory, words = Path(scratch) / "random", bundled_model_path()
            write_random(shape, directory)
        else:
            words = directory
        made = Path(scratch) / "untrained"
        write_untrained(directory, made, checkpoint.read_tokenizer(words))
        yield made


def write_random(shape: str, directory: Path) -> None:
    """A backbone of a shape in `SHAPES`, with random weights in bfloat16."""
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(Qwen2Config(**SHAPES[shape]), dtype=torch.bfloat16).save_pretrained(directory)


def write_untrained(backbone: Path, directory: Path, tokenizer: Any) -> None:
    """A checkpoint of an untrained decoder on a backbone that is only named."""
    with torch.device("meta"):
        shape = AutoModelForCausalLM.from_config(checkpoint.read_backbone_config(backbone))
    model = TRMForCausalLM.from_backbone(shape, backbone_source=str(backbone.resolve()), **UNTRAINED)
    model.save_pretrained(directory, tokenizer)


def backbone_of(directory: Path) -> Path | str:
    """Where the backbone of a checkpoint directory lies."""
    return checkpoint.read_config(directory).backbone_source or directory / checkpoint.BACKBONE_DIR


def is_untrained(directory: Path) -> bool:
    """Whether the decoder of a checkpoint directory is as it was born: its steps change no token."""
    weights = checkpoint.read_tensors(directory / checkpoint.WEIGHTS_FILE)
    return not any(tensor.any() for name, tensor in weights.items() if name.endswith("o_proj.weight"))
