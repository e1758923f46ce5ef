"""A checkpoint's backbone: copied or recorded, and known by its fingerprint."""

import hashlib
import shutil
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import Qwen2ForCausalLM

from tests.conftest import make_backbone, randomize
from tests.trm.checkpoints import BACKBONE_WEIGHTS, IDS, load
from tests.trm.conftest import edit_json, vary_norms
from trm import TRMForCausalLM, checkpoint
from trm.backbone import Backbone
from trm.checkpoint import BACKBONE_DIR, CONFIG_FILE, backbone_record, fingerprint
from trm.errors import CheckpointError


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


def test_norm_weights_of_the_backbone_come_back(tmp_path):
    model = TRMForCausalLM.from_backbone(vary_norms(make_backbone()), n_supervision=1).eval()
    model.save_pretrained(tmp_path / "checkpoint")

    assert torch.equal(load(tmp_path / "checkpoint")(IDS).logits, model(IDS).logits)
