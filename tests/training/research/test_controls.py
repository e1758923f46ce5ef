"""Controls: they start as the backbone, train what they say, cost what the decoder cost, and are plain models."""

import json
from pathlib import Path
from typing import get_args

import pytest
import torch
from transformers import AutoModelForCausalLM

from training.building import backbone_source
from training.config import TrainSettings
from training.research.controls import CONTROL_JSON, ControlSettings, Kind, add_weights, train_control
from training.run import train
from trm import bundled_model_path, checkpoint

pytestmark = pytest.mark.slow

IDS = torch.tensor([[5, 6, 7, 8, 9]])


@pytest.fixture(scope="module")
def run_dir(backbone_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("decoder")
    settings = TrainSettings(
        dataset="synthetic:have", num_problems=40, backbone=str(backbone_dir), output_dir=directory, n_latent=1,
        n_cycles=1, n_supervision=2, num_threads=1, validation_problems=0, lr=1e-2,
    )  # fmt: skip
    train(settings)
    return directory


@pytest.mark.parametrize(("kind", "share"), [("continued", 1.0), ("layer", 0.33), ("lora", 0.2)])
def test_a_control_starts_as_the_backbone(backbone_dir: Path, kind: Kind, share: float) -> None:
    model = checkpoint.read_backbone(backbone_dir).to_transformers()
    in_layers = sum(p.numel() for p in model.model.layers.parameters())
    before = model(IDS).logits.detach()

    trained = add_weights(model, kind, decoder_weights=in_layers // 5)

    assert torch.allclose(model(IDS).logits, before, atol=1e-6)
    size = sum(p.numel() for p in trained.values())
    layers = sum(p.numel() for p in model.model.layers.parameters()) if kind == "layer" else in_layers
    if kind == "continued":
        assert size == sum(p.numel() for p in model.parameters())
    else:
        assert size / layers == pytest.approx(share, abs=0.05)


@pytest.mark.parametrize("kind", get_args(Kind))
def test_a_trained_control_is_a_plain_model_that_cost_what_the_decoder_cost(
    run_dir: Path, backbone_dir: Path, tmp_path: Path, kind: Kind
) -> None:
    directory = train_control(ControlSettings(kind=kind, run=run_dir, output_dir=tmp_path / kind, num_threads=1))

    record = json.loads((directory / CONTROL_JSON).read_text())
    assert record["tflop"] >= record["decoder_tflop"] > 0
    backbone = checkpoint.read_backbone(backbone_dir)
    control = AutoModelForCausalLM.from_pretrained(directory)
    assert control.config.num_hidden_layers == backbone.config.num_hidden_layers + (kind == "layer")
    old, new = dict(backbone.hub_tensors()), control.state_dict()
    changed = {name for name in old if not torch.equal(old[name].to(torch.bfloat16), new[name].to(torch.bfloat16))}
    added = set(new) - set(old)
    match kind:
        case "continued":
            assert "model.embed_tokens.weight" in changed
            assert not added
        case "layer":
            assert not changed
            assert all(name.startswith("model.layers.2.") for name in added)
        case "lora":
            assert changed
            assert all(name.endswith("proj.weight") for name in changed)
            assert not added


def test_a_run_that_names_no_backbone_stands_on_the_bundled_one() -> None:
    assert backbone_source(TrainSettings()) == (str(bundled_model_path()), None)
    assert backbone_source(TrainSettings(backbone="a/b", backbone_revision="c")) == ("a/b", "c")
