"""Checkpoints: what is written comes back, and whatever is broken is a CheckpointError that names it."""

import ast
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from transformers import Qwen2ForCausalLM

from tests.conftest import BACKBONES, make_backbone, make_model, randomize
from tests.trm.conftest import edit_json, some_prompt, vary_norms
from trm import TRMForCausalLM, checkpoint
from trm.backbone import Backbone
from trm.chat import ChatFormat, solve_messages
from trm.checkpoint import BACKBONE_DIR, CONFIG_FILE, TOKENIZER_FILE, WEIGHTS_FILE, backbone_record, fingerprint
from trm.errors import CheckpointError, ConfigError
from trm.loading import load_for_decoding

ROOT = Path(__file__).parents[2]
BACKBONE_WEIGHTS = f"{BACKBONE_DIR}/{WEIGHTS_FILE}"
IDS = torch.tensor([some_prompt(12)])


def load(directory: Path) -> TRMForCausalLM:
    return TRMForCausalLM.from_pretrained(directory)


def files(directory: Path) -> dict[str, bytes]:
    """Everything below a directory."""
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


# Round trips


@pytest.mark.parametrize("own_lm_head", [False, True], ids=["shared-head", "own-head"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("family", BACKBONES)
def test_what_is_saved_comes_back(family, tied, own_lm_head, kv_source, make_checkpoint):
    sizes = {"tie_word_embeddings": tied}
    settings = {"own_lm_head": own_lm_head, "kv_source": kv_source, "n_layers": 2, "max_supervision": 7}
    directory, model = make_checkpoint(family=family, sizes=sizes, normalize_text=False, **settings)
    if own_lm_head:
        with torch.no_grad():
            model.lm_head.weight.mul_(1.5)
        model.save_pretrained(directory)

    loaded = load(directory)

    for name, value in (settings | {"n_latent": 2, "n_cycles": 2, "n_supervision": 3, "normalize_text": False}).items():
        assert getattr(loaded.config, name) == value
    assert loaded.config.backbone_config.model_type == family
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in loaded.state_dict().items())
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)
    assert not loaded.training


def test_only_what_training_owns_lies_in_the_weights_file(make_checkpoint):
    directory, model = make_checkpoint()

    weights = load_file(directory / WEIGHTS_FILE)

    assert weights.keys() == model.trained_state().keys()
    assert all(name.startswith("decoder.") for name in weights)
    assert json.loads((directory / CONFIG_FILE).read_text())["model_type"] == "trm"


def test_tokenizer_and_chat_template_come_back(make_checkpoint, tokenizer):
    directory, _ = make_checkpoint()

    again = checkpoint.read_tokenizer(directory)

    assert again.chat_template == tokenizer.chat_template
    messages = solve_messages("What is 2 + 2?")
    assert ChatFormat(again).encode(messages) == ChatFormat(tokenizer).encode(messages)
    assert ChatFormat(again).end_id == ChatFormat(tokenizer).end_id


def test_truncation_and_padding_of_a_tokenizer_file_are_left_out(make_checkpoint):
    """They belong to whoever saved it: a prompt that they cut would be another prompt."""
    directory, _ = make_checkpoint()
    plain = checkpoint.read_tokenizer(directory)
    file = Tokenizer.from_file(str(directory / TOKENIZER_FILE))
    file.enable_truncation(3)
    file.enable_padding(length=9)
    file.save(str(directory / TOKENIZER_FILE))

    again = checkpoint.read_tokenizer(directory)

    assert again.backend_tokenizer.to_str() == plain.backend_tokenizer.to_str()
    assert again("1 + 1 = 2")["input_ids"] == plain("1 + 1 = 2")["input_ids"]


def test_what_files_hold_is_known_of_a_model_that_is_loaded(tmp_path, monkeypatch):
    """Copied backbone or named one; the digest tells decoders on the same backbone apart."""
    monkeypatch.setattr(checkpoint, "MAX_COPIED_BACKBONE_BYTES", 0)
    make_backbone().save_pretrained(tmp_path / "backbone")
    record = backbone_record(tmp_path / "backbone", None, checkpoint.read_backbone(tmp_path / "backbone"))
    found = {}
    for name, seed, fields in (("copied", 1, {}), ("named", 1, record), ("other", 2, {})):
        model = TRMForCausalLM.from_backbone(make_backbone(), n_latent=1, n_cycles=1, **fields)
        randomize(model, seed=seed).save_pretrained(tmp_path / name)
        found[name] = load_for_decoding(tmp_path / name, dtype="float32").stored

    files = [tmp_path / "copied" / WEIGHTS_FILE, tmp_path / "copied" / BACKBONE_WEIGHTS]
    numbers = sum(tensor.numel() for file in files for tensor in load_file(file).values())
    assert found["copied"].parameters == found["named"].parameters == numbers
    assert found["copied"].size_bytes == sum(file.stat().st_size for file in files)
    assert found["copied"].digest == found["named"].digest
    assert len(found["other"].digest) == 64
    assert found["other"].digest != found["copied"].digest


def test_loaded_checkpoint_can_be_saved_again(make_checkpoint, tmp_path):
    directory, _ = make_checkpoint()

    load(directory).save_pretrained(tmp_path / "again")

    for name in (WEIGHTS_FILE, BACKBONE_WEIGHTS):
        assert (tmp_path / "again" / name).read_bytes() == (directory / name).read_bytes()
    assert torch.equal(load(tmp_path / "again")(IDS).logits, load(directory)(IDS).logits)


def test_saving_replaces_an_older_checkpoint_and_leaves_nothing_beside_it(make_checkpoint, tmp_path):
    directory, _ = make_checkpoint(scale=0.1)
    (directory / "stale.txt").write_text("of the older one")

    directory, model = make_checkpoint(scale=0.4)

    assert torch.equal(load(directory)(IDS).logits, model(IDS).logits)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]
    assert not (directory / "stale.txt").exists()


@pytest.mark.parametrize(
    "occupy",
    [
        lambda path: (path.mkdir(), (path / "thesis.tex").write_text("years of work")),
        lambda path: path.write_text("years of work"),
        lambda path: make_backbone().save_pretrained(path),
    ],
    ids=["directory", "file", "somebody-elses-model"],
)
def test_saving_deletes_nothing_but_checkpoints_of_ours(occupy, tmp_path):
    """Replacing a directory deletes what it held: `save_pretrained("models")` must not cost anyone their models."""
    place = tmp_path / "place"
    occupy(place)
    before = files(place) if place.is_dir() else place.read_bytes()

    with pytest.raises(CheckpointError, match="place: "):
        make_model().save_pretrained(place)

    assert before == (files(place) if place.is_dir() else place.read_bytes())
    assert [path.name for path in tmp_path.iterdir()] == ["place"]


@pytest.mark.parametrize("first", [True, False], ids=["first", "beside-an-older-model"])
def test_saving_keeps_the_tokenizer_that_lies_there(first, tmp_path, tokenizer):
    if not first:
        make_model().save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    before = files(tmp_path)

    make_model(scale=0.1).save_pretrained(tmp_path)

    after = files(tmp_path)
    assert {name: after.get(name) for name in before if "token" in name or "chat" in name} == {
        name: content for name, content in before.items() if "token" in name or "chat" in name
    }
    assert load(tmp_path)


@pytest.mark.parametrize(
    "arguments",
    [
        {"is_main_process": True, "state_dict": None},
        {"safe_serialization": True, "max_shard_size": "5GB", "push_to_hub": False, "save_function": save_file},
    ],
    ids=["trainer", "habits"],
)
def test_saving_takes_arguments_that_ask_for_nothing(arguments, tmp_path):
    model = make_model(scale=0.1)

    model.save_pretrained(tmp_path, **arguments)

    assert torch.equal(load(tmp_path)(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize("argument", ["push_to_hub", "distributed_checkpoint"])
def test_saving_refuses_by_name_what_it_does_not_do(argument, tmp_path):
    with pytest.raises(ConfigError, match=f"save_pretrained does not take {argument}"):
        make_model().save_pretrained(tmp_path / "place", **{argument: True})

    assert not (tmp_path / "place").exists()


def test_only_the_main_process_saves(tmp_path):
    make_model().save_pretrained(tmp_path / "place", is_main_process=False)

    assert not (tmp_path / "place").exists()


def test_weights_that_are_given_are_saved_if_they_fit(tmp_path):
    model, other = make_model(scale=0.1), make_model(scale=0.4)
    weights = other.state_dict()

    model.save_pretrained(tmp_path / "whole", state_dict=weights)
    del weights["decoder.halt_head.bias"]
    with pytest.raises(CheckpointError, match=r"tensor decoder\.halt_head\.bias is missing"):
        model.save_pretrained(tmp_path / "short", state_dict=weights)

    assert torch.equal(load(tmp_path / "whole")(IDS).logits, other(IDS).logits)
    assert not (tmp_path / "short").exists()


def test_saving_into_an_empty_directory(tmp_path):
    make_model().save_pretrained(tmp_path)

    assert load(tmp_path)


# The backbone


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_backbone_that_bfloat16_holds_is_copied_in_bfloat16(tied, tmp_path):
    backbone = make_backbone(tie_word_embeddings=tied)
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter.copy_(parameter.to(torch.bfloat16))
    model = randomize(TRMForCausalLM.from_backbone(backbone, n_supervision=2).eval())

    model.save_pretrained(tmp_path / "checkpoint")

    stored = load_file(tmp_path / "checkpoint" / BACKBONE_WEIGHTS)
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
    assert ("lm_head.weight" in stored) is not tied
    loaded = load(tmp_path / "checkpoint")
    assert loaded.backbone.embed_tokens.weight.dtype == torch.float32
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)


def test_backbone_that_bfloat16_would_round_is_copied_as_it_is(make_checkpoint):
    directory, _ = make_checkpoint()

    stored = load_file(directory / BACKBONE_WEIGHTS)

    assert {tensor.dtype for tensor in stored.values()} == {torch.float32}


def test_backbone_config_is_the_backbones_own(make_checkpoint):
    """The folder is a plain Qwen2 model that other tools read."""
    directory, model = make_checkpoint()

    backbone = checkpoint.read_backbone(directory / BACKBONE_DIR)

    assert backbone.config.model_type == "qwen2"
    assert fingerprint(backbone) == fingerprint(model.backbone)
    theirs = Qwen2ForCausalLM.from_pretrained(directory / BACKBONE_DIR)
    assert theirs.config.architectures == ["Qwen2ForCausalLM"]
    assert torch.allclose(theirs(IDS).logits, model(IDS, n_supervision=0).logits, atol=1e-4)


def test_small_local_backbone_is_copied_and_needs_no_record(tmp_path):
    make_backbone().save_pretrained(tmp_path / "backbone")
    backbone = checkpoint.read_backbone(tmp_path / "backbone")

    assert set(backbone_record(tmp_path / "backbone", None, backbone).values()) == {None}


@pytest.mark.parametrize("revision", [None, "main"])
def test_hub_backbone_is_recorded_by_id_commit_and_fingerprint(tmp_path, monkeypatch, revision):
    # A branch moves; the commit that was downloaded names its snapshot directory.
    snapshot = tmp_path / "snapshots" / "0123abcd"
    monkeypatch.setattr("trm.checkpoint.locate", lambda source, revision: snapshot)
    backbone = Backbone.from_transformers(make_backbone())

    assert backbone_record("Qwen/Qwen2.5-0.5B", revision, backbone) == {
        "backbone_source": "Qwen/Qwen2.5-0.5B",
        "backbone_revision": "0123abcd",
        "backbone_fingerprint": fingerprint(backbone),
    }


def test_large_local_backbone_is_recorded_by_path_and_fingerprint(make_recorded):
    directory, source, model = make_recorded()

    loaded = load(directory)

    assert not (directory / BACKBONE_DIR).exists()
    assert loaded.config.backbone_source == str(source.resolve())
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)


def test_model_and_backbone_are_asked_of_the_hub_as_the_caller_says(make_recorded, monkeypatch):
    directory, source, _ = make_recorded()
    edit_json(directory / CONFIG_FILE, backbone_source="someone/backbone", backbone_revision="0123abcd")
    places = {("someone/model", "main"): directory, ("someone/backbone", "0123abcd"): source}
    how = {"cache_dir": "elsewhere", "force_download": False, "local_files_only": True, "token": "secret"}
    asked = set()

    def download(name: str, revision: str | None, allow_patterns: Any, **given: Any) -> str:
        assert given == how
        asked.add((name, revision))
        return str(places[name, revision])

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    TRMForCausalLM.from_pretrained("someone/model", revision="main", **how)

    assert asked == places.keys()


def test_backbone_other_than_the_recorded_one_is_refused(make_recorded):
    directory, source, model = make_recorded()
    make_backbone(seed=1).save_pretrained(source)

    with pytest.raises(CheckpointError, match=r"their-backbone.*fingerprint.*trained on") as caught:
        load(directory)
    assert fingerprint(model.backbone) in str(caught.value)


def test_recorded_backbone_that_is_gone_is_named(make_recorded):
    directory, source, _ = make_recorded()
    shutil.rmtree(source)

    with pytest.raises(CheckpointError, match="their-backbone: no such directory"):
        load(directory)


def test_fingerprint_sees_values_and_names_but_not_the_stored_type():
    theirs = make_backbone().to(torch.bfloat16)
    before = fingerprint(Backbone.from_transformers(theirs))

    assert fingerprint(Backbone.from_transformers(theirs.float())) == before
    with torch.no_grad():
        theirs.model.norm.weight[3] += 0.01
    assert fingerprint(Backbone.from_transformers(theirs)) != before


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_fingerprint_is_what_the_first_checkpoints_recorded(tied):
    """A hash of the tensors under transformers' names, a tied head included."""
    theirs = make_backbone(tie_word_embeddings=tied)
    digest = hashlib.sha256()
    for name, tensor in sorted(theirs.state_dict().items()):
        digest.update(name.encode() + tensor.numpy().tobytes())

    assert fingerprint(Backbone.from_transformers(theirs)) == digest.hexdigest()[:16]


def test_fingerprint_is_computed_once(monkeypatch):
    """Half a billion weights take seconds, and a run asks several times."""
    backbone = Backbone.from_transformers(make_backbone())
    first = fingerprint(backbone)
    monkeypatch.setattr(Backbone, "hub_tensors", lambda self: pytest.fail("read again"))

    assert fingerprint(backbone) == first


def test_fingerprint_of_rounded_weights_is_another():
    backbone = Backbone.from_transformers(make_backbone())

    assert fingerprint(backbone) != fingerprint(backbone.to(torch.bfloat16))


def test_sharded_backbone_is_read(make_checkpoint):
    directory, model = make_checkpoint()
    shutil.rmtree(directory / BACKBONE_DIR)
    model.backbone.to_transformers().save_pretrained(directory / BACKBONE_DIR, max_shard_size="40KB")
    assert len(list((directory / BACKBONE_DIR).glob("*.safetensors"))) > 1

    assert torch.equal(load(directory)(IDS).logits, model(IDS).logits)


def test_a_checkpoint_of_ours_stands_for_the_backbone_inside_it(make_checkpoint):
    directory, model = make_checkpoint()

    assert fingerprint(checkpoint.read_backbone(directory)) == fingerprint(model.backbone)


def test_plain_backbone_is_told_apart_from_a_checkpoint(tmp_path):
    make_backbone().save_pretrained(tmp_path)

    with pytest.raises(CheckpointError, match=r"config.json: model_type is 'qwen2', not 'trm'.*trm-train"):
        load(tmp_path)


# What is broken is named


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


# Interrupted writes


@pytest.mark.parametrize(
    "step", ["trm.checkpoint.save_file", "trm.checkpoint.os.replace", "trm.config.TRMConfig.save_pretrained"]
)
def test_interrupted_write_leaves_the_older_checkpoint_untouched(step, make_checkpoint, monkeypatch):
    directory, _ = make_checkpoint(scale=0.1)
    before = files(directory)

    def killed(*args: Any, **kwargs: Any) -> None:
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(step, killed)
        with pytest.raises((OSError, CheckpointError), match="No space left"):
            make_model(scale=0.4).save_pretrained(directory)

    assert files(directory) == before
    make_model(scale=0.4).save_pretrained(directory)  # the remains of the interrupted one are no obstacle
    assert files(directory).keys() >= {CONFIG_FILE, WEIGHTS_FILE, BACKBONE_WEIGHTS}
    assert files(directory)[WEIGHTS_FILE] != before[WEIGHTS_FILE]


def test_failed_rename_leaves_the_older_checkpoint_in_its_place(make_checkpoint, monkeypatch):
    """It was moved out of the way just before; the next write would even delete it there."""
    directory, _ = make_checkpoint(scale=0.1)
    before = files(directory)
    rename = os.rename

    def fail(source: Any, target: Any) -> None:
        if Path(source).name.endswith(".partial"):
            raise OSError("Input/output error")
        rename(source, target)

    with monkeypatch.context() as patch:
        patch.setattr("trm.checkpoint.os.rename", fail)
        with pytest.raises((OSError, CheckpointError), match="Input/output"):
            make_model(scale=0.4).save_pretrained(directory)

    assert files(directory) == before


def test_interrupted_first_write_leaves_nothing_that_looks_like_a_checkpoint(tmp_path, monkeypatch):
    def killed(*args: Any, **kwargs: Any) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr("trm.config.TRMConfig.save_pretrained", killed)
    with pytest.raises((OSError, CheckpointError), match="No space left"):
        make_model().save_pretrained(tmp_path / "checkpoint")

    assert not (tmp_path / "checkpoint").exists()
    assert not list(tmp_path.glob(f"*/{CONFIG_FILE}"))


def test_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")

    with pytest.raises(CheckpointError, match="file/checkpoint: cannot write there: Not a directory"):
        make_model().save_pretrained(tmp_path / "file" / "checkpoint")


def test_saving_to_a_relative_path(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")

    make_model().save_pretrained("../there/")

    assert load(tmp_path / "there")


def test_saving_into_the_working_directory_works_or_is_refused(tmp_path, monkeypatch):
    """`Path('.')` has no name to put a neighbour beside."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")

    try:
        make_model().save_pretrained(".")
    except CheckpointError:
        assert not list((tmp_path / "here").iterdir())
    else:
        assert load(tmp_path / "here")


def test_json_is_written_aside_and_renamed(tmp_path, monkeypatch):
    checkpoint.write_json(tmp_path / "run.json", {"step": 1})
    monkeypatch.setattr("trm.checkpoint.os.replace", lambda *paths: None)

    checkpoint.write_json(tmp_path / "run.json", {"step": 2})

    assert checkpoint.read_json(tmp_path / "run.json") == {"step": 1}


def test_saving_changes_nothing_in_the_model(tmp_path):
    """Saved in the middle of training, where weights, types and gradients must go on as they were."""
    model = make_model()
    before = {name: (tensor.clone(), tensor.dtype) for name, tensor in model.state_dict().items()}
    trainable = [parameter.requires_grad for parameter in model.parameters()]

    model.save_pretrained(tmp_path / "checkpoint")

    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name][0])
        assert tensor.dtype == before[name][1]
    assert [parameter.requires_grad for parameter in model.parameters()] == trainable


# Nothing is ever unpickled

UNSAFE_MODULES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
UNSAFE_CALLS = {"torch.load", "torch.save", "torch.jit.load", "yaml.load", "yaml.unsafe_load", "yaml.full_load"}


def unsafe_uses(source: str) -> list[str]:
    """Imports of serialisers that execute what they read, and calls that use them."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name.split(".")[0] in UNSAFE_MODULES]
        elif isinstance(node, ast.ImportFrom):
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found += sorted(names & UNSAFE_CALLS)
            found += [str(node.module)] if str(node.module).split(".")[0] in UNSAFE_MODULES else []
        elif isinstance(node, ast.Attribute) and ast.unparse(node) in UNSAFE_CALLS:
            found.append(ast.unparse(node))
        elif isinstance(node, ast.keyword) and node.arg == "allow_pickle":
            found.append("allow_pickle")
    return found


@pytest.mark.parametrize("package", ["trm", "server", "training"])
def test_no_source_file_can_unpickle(package):
    sources = sorted((ROOT / package).rglob("*.py"))
    assert sources

    assert {str(path): uses for path in sources if (uses := unsafe_uses(path.read_text()))} == {}


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from torch import load",
        "x = torch.load(f)",
        "np.load(f, allow_pickle=True)",
        "import joblib.x as y",
    ],
)
def test_the_scan_sees_what_it_looks_for(source):
    assert unsafe_uses(source)


class Evil:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> Any:
        return Path.touch, (self.trace,)


def test_pickle_beside_the_weights_is_never_opened(make_checkpoint, tmp_path):
    directory, _ = make_checkpoint()
    for place in (directory, directory / BACKBONE_DIR):
        torch.save(Evil(tmp_path / "executed"), place / "pytorch_model.bin")

    load(directory)

    assert not (tmp_path / "executed").exists()


def test_pickle_is_not_opened_where_only_other_tensors_are_safe(make_checkpoint, tmp_path):
    """A safetensors file of any name shows good will, and transformers would then fall back to the pickle."""
    directory, _ = make_checkpoint()
    (directory / BACKBONE_WEIGHTS).rename(directory / BACKBONE_DIR / "adapter.safetensors")
    torch.save(Evil(tmp_path / "executed"), directory / BACKBONE_DIR / "pytorch_model.bin")

    with pytest.raises(CheckpointError, match="backbone: "):
        load(directory)

    assert not (tmp_path / "executed").exists()


def test_norm_weights_of_the_backbone_come_back(tmp_path):
    model = TRMForCausalLM.from_backbone(vary_norms(make_backbone()), n_supervision=1).eval()
    model.save_pretrained(tmp_path / "checkpoint")

    assert torch.equal(load(tmp_path / "checkpoint")(IDS).logits, model(IDS).logits)
