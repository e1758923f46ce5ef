"""Checkpoints: what is written comes back, and only that is written."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from tests.conftest import BACKBONES, make_backbone, make_model, randomize
from tests.trm.checkpoints import BACKBONE_WEIGHTS, IDS, files, load
from trm import TRMForCausalLM, checkpoint
from trm.chat import ChatFormat, solve_messages
from trm.checkpoint import CONFIG_FILE, TOKENIZER_FILE, WEIGHTS_FILE, backbone_record
from trm.errors import CheckpointError, ConfigError
from trm.loading import load_for_decoding


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
