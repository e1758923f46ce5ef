"""Training on a backbone in a GGUF file gives what its directory gives, and is resumed, evaluated, begun with."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.gguf_files import byte_level, write_gguf
from training.config import EvalSettings, TrainSettings
from training.evaluation.run import evaluate_model
from training.run import train
from trm import checkpoint
from trm.errors import ConfigError

pytest.importorskip("gguf", reason="needs the extra gguf")

Settings = Callable[..., TrainSettings]


@pytest.fixture
def file(tmp_path: Path, backbone_dir: Path, tokenizer: Any) -> Path:
    """The backbone of the other tests, tokenizer included."""
    model = AutoModelForCausalLM.from_pretrained(backbone_dir)
    return write_gguf(tmp_path / "model.gguf", model, tokenizer=byte_level(tokenizer, "qwen2"))


def decoder_of(directory: Path) -> dict[str, torch.Tensor]:
    return checkpoint.read_tensors(directory / checkpoint.WEIGHTS_FILE)


def test_the_decoder_is_the_one_that_the_directory_gives(
    file: Path, settings: Settings, backbone_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = train(settings(output_dir=tmp_path / "first", max_steps=2))
    monkeypatch.chdir(file.parent)

    last = train(settings(backbone=file.name, output_dir=tmp_path / "second", max_steps=2))

    config = checkpoint.read_config(last)
    assert config.backbone_source == str(file)
    assert config.backbone_fingerprint == checkpoint.fingerprint(checkpoint.read_backbone(backbone_dir))
    assert not (last / checkpoint.BACKBONE_DIR).exists()
    assert all(torch.equal(tensor, decoder_of(expected)[name]) for name, tensor in decoder_of(last).items())
    assert checkpoint.read_tokenizer(last).chat_template == checkpoint.read_tokenizer(backbone_dir).chat_template


def test_a_run_goes_on_to_the_same_bits_also_where_the_file_has_moved(
    file: Path, settings: Settings, tmp_path: Path
) -> None:
    whole = train(settings(backbone=str(file), output_dir=tmp_path / "whole", max_steps=2))
    half = train(settings(backbone=str(file), output_dir=tmp_path / "half", max_steps=2, save_steps=1))
    shutil.rmtree(half)
    moved = file.rename(tmp_path / "sha256-0123")  # as Ollama names them

    with pytest.raises(ConfigError, match=r"model\.gguf: the run to resume was started with it, and it is gone"):
        train(TrainSettings(resume=tmp_path / "half", num_threads=1))
    last = train(TrainSettings(resume=tmp_path / "half", backbone=str(moved), num_threads=1))

    assert checkpoint.read_config(last).backbone_source == str(moved)
    assert all(torch.equal(tensor, decoder_of(whole)[name]) for name, tensor in decoder_of(last).items())


def test_a_new_run_begins_with_the_decoder_and_evaluation_reads_it(
    file: Path, settings: Settings, tmp_path: Path
) -> None:
    first = train(settings(backbone=str(file), output_dir=tmp_path / "first", max_steps=1))
    begun = TrainSettings(
        init_from=first,
        output_dir=tmp_path / "second",
        max_steps=1,
        dataset="synthetic:easy",
        num_problems=24,
        num_threads=1,
    )

    last = train(begun)
    found = evaluate_model(
        EvalSettings(model=str(last), dataset="synthetic:easy", limit=2, effort=[0, 1], max_tokens=4, num_threads=1)
    )

    assert checkpoint.read_config(last).backbone_source == str(file)
    assert found["model"]
