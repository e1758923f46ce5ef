"""Whatever is given becomes a checkpoint: a decoder on a plain backbone, or on random weights of a shape."""

import pytest
import torch

from tests.conftest import randomize
from trm import TRMForCausalLM, bundled_model_path
from trm.bench import models
from trm.bench.models import UNTRAINED, backbone_of, checkpoint_of, is_untrained
from trm.bench.settings import SHAPES
from trm.checkpoint import read_backbone, read_config
from trm.errors import ConfigError


def test_a_checkpoint_stays_where_it_is():
    with checkpoint_of(str(bundled_model_path())) as directory:
        assert directory == bundled_model_path()
    with checkpoint_of(None) as directory:
        assert directory == bundled_model_path()
    assert not is_untrained(directory)
    assert backbone_of(directory) == directory / "backbone"


def test_a_plain_backbone_gets_an_untrained_decoder(backbone_directory):
    ids = torch.arange(1, 9)[None]
    with checkpoint_of(str(backbone_directory)) as directory:
        model = TRMForCausalLM.from_pretrained(directory)
        config = read_config(directory)
        assert is_untrained(directory)
        assert backbone_of(directory) == str(backbone_directory)
    assert not directory.exists()
    assert {name: getattr(config, name) for name in UNTRAINED} == UNTRAINED
    assert config.n_supervision * config.calls_per_step == 12
    theirs = read_backbone(backbone_directory).to_transformers()(ids).logits
    assert torch.equal(model(ids).logits.argmax(-1), theirs.argmax(-1))


def test_what_was_trained_shows(backbone_directory, tmp_path):
    with checkpoint_of(str(backbone_directory)) as directory:
        randomize(TRMForCausalLM.from_pretrained(directory)).save_pretrained(tmp_path / "trained")

    assert not is_untrained(tmp_path / "trained")


def test_a_shape_gets_random_weights(monkeypatch):
    small = SHAPES["qwen2.5-0.5b"] | {"hidden_size": 56, "intermediate_size": 64, "num_hidden_layers": 1}
    monkeypatch.setattr(models, "SHAPES", {"qwen2.5-0.5b": small | {"vocab_size": 3000}})

    with checkpoint_of(None, "qwen2.5-0.5b") as directory:
        model = TRMForCausalLM.from_pretrained(directory)

    assert model.config.vocab_size == 3000
    assert model.backbone.layers[0].feed_forward.gate_up_proj.weight.std() > 0.01


def test_a_model_and_a_shape_are_two_models():
    with pytest.raises(ConfigError, match="are two models"), checkpoint_of("some", "qwen2.5-3b"):
        pass


@pytest.mark.parametrize(("shape", "millions"), [("0.5b", 494), ("1.5b", 1544), ("3b", 3086), ("7b", 7616)])
def test_shapes_have_the_sizes_of_their_names(shape, millions):
    """Parameters as their model cards state them."""
    from transformers import AutoModelForCausalLM, Qwen2Config

    with torch.device("meta"):
        backbone = AutoModelForCausalLM.from_config(Qwen2Config(**SHAPES[f"qwen2.5-{shape}"]))

    assert round(sum(parameter.numel() for parameter in backbone.parameters()) / 1e6) == millions
