"""Whatever is broken in a checkpoint is a CheckpointError that names it."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.trm.checkpoints import BACKBONE_WEIGHTS, load
from tests.trm.conftest import edit_json
from trm import checkpoint
from trm.checkpoint import BACKBONE_DIR, CONFIG_FILE, TOKENIZER_FILE, WEIGHTS_FILE
from trm.errors import CheckpointError


def truncate(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def edit_tensors(path: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def edit_backbone_config(directory: Path, **changes: Any) -> None:
    content = json.loads((directory / CONFIG_FILE).read_text())
    edit_json(directory / CONFIG_FILE, backbone_config=content["backbone_config"] | changes)


def only_pickles(directory: Path) -> None:
    (directory / WEIGHTS_FILE).unlink()
    torch.save({}, directory / "pytorch_model.bin")


def only_backbone_pickles(directory: Path) -> None:
    weights = load_file(directory / BACKBONE_WEIGHTS)
    (directory / BACKBONE_WEIGHTS).unlink()
    torch.save(weights, directory / BACKBONE_DIR / "pytorch_model.bin")


def shard_backbone(directory: Path) -> list[Path]:
    backbone = checkpoint.read_backbone(directory / BACKBONE_DIR)
    (directory / BACKBONE_WEIGHTS).unlink()
    backbone.to_transformers().save_pretrained(directory / BACKBONE_DIR, max_shard_size="40KB")
    return sorted((directory / BACKBONE_DIR).glob("*.safetensors"))


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "weights-truncated": (lambda d: truncate(d / WEIGHTS_FILE), "model.safetensors: truncated or not safetensors"),
    "weights-empty": (lambda d: (d / WEIGHTS_FILE).write_bytes(b""), "model.safetensors: truncated"),
    "weights-garbage": (lambda d: (d / WEIGHTS_FILE).write_bytes(os.urandom(4096)), "model.safetensors: truncated"),
    "weights-pickled": (lambda d: torch.save({}, d / WEIGHTS_FILE), "model.safetensors: truncated or not safetensors"),
    "weights-missing": (lambda d: (d / WEIGHTS_FILE).unlink(), "model.safetensors: missing"),
    "weights-a-directory": (
        lambda d: ((d / WEIGHTS_FILE).unlink(), (d / WEIGHTS_FILE).mkdir()),
        "model.safetensors: truncated or not safetensors",
    ),
    "only-pickles": (only_pickles, "model.safetensors: missing"),
    "tensor-foreign": (
        lambda d: edit_tensors(d / WEIGHTS_FILE, lambda t: t.update(intruder=torch.zeros(1))),
        "checkpoint: tensor intruder in model.safetensors does not belong to this model",
    ),
    "tensor-of-the-backbone": (
        lambda d: edit_tensors(d / WEIGHTS_FILE, lambda t: t.update({"backbone.model.norm.weight": torch.ones(32)})),
        "tensor backbone.model.norm.weight in model.safetensors does not belong to this model",
    ),
    "tensor-missing": (
        lambda d: edit_tensors(d / WEIGHTS_FILE, lambda t: t.pop("decoder.halt_head.bias")),
        "tensor decoder.halt_head.bias is missing from model.safetensors",
    ),
    "tensor-misshapen": (
        lambda d: edit_tensors(d / WEIGHTS_FILE, lambda t: t.update({"decoder.halt_head.bias": torch.zeros(2)})),
        r"tensor decoder.halt_head.bias has shape \(2,\); config.json makes it \(1,\)",
    ),
    "tensor-not-finite": (
        lambda d: edit_tensors(d / WEIGHTS_FILE, lambda t: t["decoder.halt_head.bias"].fill_(float("nan"))),
        "model.safetensors: tensor decoder.halt_head.bias holds numbers that are not finite",
    ),
    "config-missing": (lambda d: (d / CONFIG_FILE).unlink(), "config.json: missing"),
    "config-empty": (lambda d: (d / CONFIG_FILE).write_text(""), "config.json: not readable as JSON"),
    "config-truncated": (lambda d: truncate(d / CONFIG_FILE), "config.json: not readable as JSON"),
    "config-not-json": (lambda d: (d / CONFIG_FILE).write_text("model: trm"), "config.json: not readable as JSON"),
    "config-not-utf8": (lambda d: (d / CONFIG_FILE).write_bytes(b'{"a": "\xff"}'), "config.json: not readable as JSON"),
    "config-nested-without-end": (
        lambda d: (d / CONFIG_FILE).write_text("[" * 100_000),
        "config.json: not readable as JSON",
    ),
    "config-a-list": (lambda d: (d / CONFIG_FILE).write_text("[1]"), "config.json: holds list, not an object"),
    "config-a-directory": (
        lambda d: ((d / CONFIG_FILE).unlink(), (d / CONFIG_FILE).mkdir()),
        "config.json: not readable as JSON",
    ),
    "config-of-another-model": (
        lambda d: edit_json(d / CONFIG_FILE, model_type="bert"),
        "config.json: model_type is 'bert', not 'trm'",
    ),
    "config-without-type": (lambda d: edit_json(d / CONFIG_FILE, model_type=...), "config.json: model_type is None"),
    "config-without-backbone": (lambda d: edit_json(d / CONFIG_FILE, backbone_config=...), "config.json"),
    "config-of-a-foreign-backbone": (
        lambda d: edit_backbone_config(d, model_type="mamba"),
        "config.json: backbone architecture 'mamba'.*qwen2, qwen3, llama",
    ),
    "config-backbone-a-word": (
        lambda d: edit_json(d / CONFIG_FILE, backbone_config="qwen2"),
        "config.json: not a usable configuration",
    ),
    "config-depth-a-word": (lambda d: edit_json(d / CONFIG_FILE, n_latent="six"), "config.json: .*n_latent"),
    "config-depth-zero": (lambda d: edit_json(d / CONFIG_FILE, n_cycles=0), "config.json: n_cycles is 0"),
    "config-depth-null": (lambda d: edit_json(d / CONFIG_FILE, n_supervision=None), "config.json: .*n_supervision"),
    "config-source-of-keys": (
        lambda d: edit_json(d / CONFIG_FILE, kv_source="none"),
        "config.json: kv_source is 'none'",
    ),
    "config-more-layers": (lambda d: edit_json(d / CONFIG_FILE, n_layers=2), "checkpoint: tensor decoder.layers.1"),
    "config-wider": (
        lambda d: edit_json(d / CONFIG_FILE, expansion=9.0),
        "checkpoint: tensor .* has shape .* config.json",
    ),
    "config-negative-width": (lambda d: edit_json(d / CONFIG_FILE, expansion=-4.0), "config.json: .*expansion"),
    "config-own-head-unwritten": (
        lambda d: edit_json(d / CONFIG_FILE, own_lm_head=True),
        "checkpoint: tensor lm_head.weight is missing",
    ),
    "config-another-width": (lambda d: edit_backbone_config(d, hidden_size=64), "config.json"),
    "config-another-vocabulary": (lambda d: edit_backbone_config(d, vocab_size=401), "config.json.*vocab_size"),
    "config-fewer-backbone-layers": (
        lambda d: edit_backbone_config(d, num_hidden_layers=1, layer_types=["full_attention"]),
        "config.json.*num_hidden_layers",
    ),
    "config-other-heads": (
        lambda d: edit_backbone_config(d, num_attention_heads=2, num_key_value_heads=1),
        "config.json.*num_attention_heads",
    ),
    "backbone-missing": (
        lambda d: shutil.rmtree(d / BACKBONE_DIR),
        "backbone: missing, and config.json names no backbone_source",
    ),
    "backbone-empty": (
        lambda d: (shutil.rmtree(d / BACKBONE_DIR), (d / BACKBONE_DIR).mkdir()),
        "backbone/config.json: missing",
    ),
    "backbone-truncated": (lambda d: truncate(d / BACKBONE_WEIGHTS), "backbone/model.safetensors: truncated"),
    "backbone-weights-missing": (lambda d: (d / BACKBONE_WEIGHTS).unlink(), "backbone: no .*safetensors file"),
    "backbone-pickled": (only_backbone_pickles, "backbone: no .*safetensors file; only safetensors weights are read"),
    "backbone-config-missing": (lambda d: (d / BACKBONE_DIR / CONFIG_FILE).unlink(), "backbone/config.json: missing"),
    "backbone-config-truncated": (
        lambda d: truncate(d / BACKBONE_DIR / CONFIG_FILE),
        "backbone/config.json: not readable",
    ),
    "backbone-of-another-kind": (
        lambda d: edit_json(d / BACKBONE_DIR / CONFIG_FILE, model_type="gpt2"),
        "backbone/config.json: backbone architecture 'gpt2' is not supported; supported: qwen2, qwen3, llama",
    ),
    "backbone-config-nonsense": (
        lambda d: edit_json(d / BACKBONE_DIR / CONFIG_FILE, num_attention_heads="many"),
        "backbone: the backbone does not load",
    ),
    "backbone-tensor-missing": (
        lambda d: edit_tensors(d / BACKBONE_WEIGHTS, lambda t: t.pop("model.norm.weight")),
        "backbone: 1 tensors are missing or misshapen, model.norm.weight first",
    ),
    "backbone-tensor-not-finite": (
        lambda d: edit_tensors(d / BACKBONE_WEIGHTS, lambda t: t["model.norm.weight"][3:4].fill_(float("inf"))),
        "backbone: tensor model.norm.weight holds numbers that are not finite",
    ),
    "backbone-tensor-misshapen": (
        lambda d: edit_tensors(d / BACKBONE_WEIGHTS, lambda t: t.update({"model.norm.weight": torch.ones(31)})),
        "backbone: 1 tensors are missing or misshapen, model.norm.weight first",
    ),
    "shard-missing": (lambda d: shard_backbone(d)[1].unlink(), "backbone/model-00002.*missing"),
    "shard-truncated": (lambda d: truncate(shard_backbone(d)[1]), "model-00002.*truncated"),
    "shard-index-truncated": (
        lambda d: (shard_backbone(d), truncate(d / BACKBONE_DIR / "model.safetensors.index.json")),
        "backbone/model.safetensors.index.json: not readable as JSON",
    ),
    "shard-index-of-nothing": (
        lambda d: (shard_backbone(d), (d / BACKBONE_DIR / "model.safetensors.index.json").write_text("{}")),
        "backbone/model.safetensors.index.json: has no weight_map",
    ),
    "backbone-quantized": (
        lambda d: edit_json(d / BACKBONE_DIR / CONFIG_FILE, quantization_config={"quant_method": "fp8"}),
        "backbone: the weights are quantized",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_named(damage, make_checkpoint):
    directory, _ = make_checkpoint()
    harm, message = DAMAGE[damage]
    harm(directory)

    with pytest.raises(CheckpointError, match=message):
        load(directory)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "nowhere: no such directory"),
        (lambda path: path.write_text("a file"), "nowhere: is a file; a model is a directory with config.json"),
        (lambda path: path.mkdir(), "nowhere/config.json: missing"),
    ],
    ids=["nothing", "file", "empty-directory"],
)
def test_what_is_no_checkpoint_is_named(make, message, tmp_path):
    make(tmp_path / "nowhere")

    with pytest.raises(CheckpointError, match=message):
        load(tmp_path / "nowhere")


def test_of_a_run_directory_the_newest_checkpoint_is_named(make_checkpoint, tmp_path):
    directory, _ = make_checkpoint()
    for name in ("checkpoint-9", "checkpoint-10", "checkpoint-notes"):
        (tmp_path / "run" / name).mkdir(parents=True)
    for name in ("checkpoint-9", "checkpoint-10"):
        shutil.copy(directory / CONFIG_FILE, tmp_path / "run" / name)

    with pytest.raises(CheckpointError, match=r"run: is the directory of a run; give a checkpoint of it: .*-10$"):
        load(tmp_path / "run")


@pytest.mark.parametrize("name", ["nowhere", "./no/where", "no/such/thing", "~/no-such-model-of-mine"])
def test_a_path_that_is_no_hub_id_never_asks_the_hub(name, monkeypatch):
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *args, **kwargs: pytest.fail("asked the hub"))

    with pytest.raises(CheckpointError, match="no such directory"):
        checkpoint.locate(name)


def test_a_hub_that_does_not_answer_is_a_checkpoint_error(monkeypatch):
    def unreachable(*args: Any, **kwargs: Any) -> None:
        assert "*.bin" not in kwargs["allow_patterns"]
        raise ConnectionError("no route to host\nand more")

    monkeypatch.setattr("huggingface_hub.snapshot_download", unreachable)

    with pytest.raises(
        CheckpointError,
        match=r"someone/model: no such directory, and it could not be read from the hub: no route to host$",
    ):
        checkpoint.locate("someone/model")


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda d: (d / TOKENIZER_FILE).unlink(), "tokenizer.json: missing"),
        (lambda d: truncate(d / TOKENIZER_FILE), "tokenizer.json: not a usable tokenizer"),
        (lambda d: (d / TOKENIZER_FILE).write_text("{}"), "tokenizer.json: not a usable tokenizer"),
        (lambda d: truncate(d / "tokenizer_config.json"), "tokenizer.json: not a usable tokenizer"),
    ],
    ids=["missing", "truncated", "empty-object", "config-truncated"],
)
def test_damaged_tokenizer_is_named(harm, message, make_checkpoint):
    directory, _ = make_checkpoint()
    harm(directory)

    with pytest.raises(CheckpointError, match=message):
        checkpoint.read_tokenizer(directory)
