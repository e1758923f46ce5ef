"""A tiny backbone on disk, with the repository's tokenizer: what a training run stands on."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from training.config import TrainSettings


@pytest.fixture(scope="session")
def backbone_dir(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    """A directory laid out as the hub's: configuration, safetensors, tokenizer."""
    directory = tmp_path_factory.mktemp("backbone")
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        initializer_range=0.2,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    Qwen2ForCausalLM(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture
def settings(backbone_dir: Path, tmp_path: Path) -> Callable[..., TrainSettings]:
    """Settings of a run that takes a second; keyword arguments replace any of them."""

    def make(**changes: Any) -> TrainSettings:
        small: dict[str, Any] = {
            "dataset": "synthetic:easy",
            "num_problems": 24,
            "backbone": str(backbone_dir),
            "output_dir": tmp_path / "run",
            "batch_size": 4,
            "n_latent": 2,
            "n_cycles": 2,
            "n_supervision": 3,
            "lr": 1e-2,
            "save_steps": 1000,
            "validation_problems": 4,
            "num_threads": 1,
        }
        return TrainSettings(**(small | changes))

    return make


@pytest.fixture
def jsonl(tmp_path: Path) -> Callable[..., Path]:
    """Write rows, given as objects or raw lines, to a JSON-lines file."""

    def write(*rows: Any) -> Path:
        path = tmp_path / "rows.jsonl"
        path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
        return path

    return write
