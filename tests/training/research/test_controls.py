"""Controls: they start as the backbone, train what they say, cost what the decoder cost, and are plain models."""

import itertools
import json
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from transformers import AutoModelForCausalLM

from training import ordinary
from training.building import backbone_source
from training.config import TrainSettings
from training.research import controls
from training.research.controls import CONTROL_JSON, Kind, add_weights, train_control
from training.run import train
from training.weights import Weights
from trm import bundled_model_path, checkpoint
from trm.errors import ConfigError

pytestmark = pytest.mark.slow

IDS = torch.tensor([[5, 6, 7, 8, 9]])


@pytest.fixture
def run(backbone_dir: Path) -> TrainSettings:
    return TrainSettings(
        dataset="synthetic:have", num_problems=40, backbone=str(backbone_dir), n_latent=1,
        n_cycles=1, n_supervision=2, num_threads=1, validation_problems=0, lr=1e-2,
    )  # fmt: skip


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
    run: TrainSettings, backbone_dir: Path, tmp_path: Path, kind: Kind
) -> None:
    directory = train_control(kind, [run], tmp_path / kind)

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


def test_an_interrupted_control_goes_on_to_the_same_bits(
    run: TrainSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(controls, "SAVE_STEPS", 3)
    straight = train_control("lora", [run], tmp_path / "straight")
    original, calls = ordinary.add_gradients, itertools.count(1)

    def interrupted(*batch: Any) -> torch.Tensor:
        if next(calls) == controls.COUNTED_STEPS + 5:  # the operations are counted first
            raise KeyboardInterrupt
        return original(*batch)

    monkeypatch.setattr(ordinary, "add_gradients", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train_control("lora", [run], tmp_path / "again")
    monkeypatch.setattr(ordinary, "add_gradients", original)
    assert list(tmp_path.glob(".again*"))
    with pytest.raises(ConfigError, match="is of another run"):
        train_control("lora", [run], tmp_path / "again", lr=1e-4)
    again = train_control("lora", [run], tmp_path / "again")

    weights = [AutoModelForCausalLM.from_pretrained(directory).state_dict() for directory in (straight, again)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[1])
    assert not list(tmp_path.glob(".again*"))


def test_what_another_control_put_down_is_not_taken_up(run: TrainSettings, tmp_path: Path) -> None:
    def weights(value: float, steps: int) -> Weights:
        return Weights({"a": torch.nn.Parameter(torch.full((2, 2), value))}, run, steps)

    here, other = controls._digest("lora", 1e-3), controls._digest("lora", 2e-3)
    controls._save(weights(1.0, 10), 3, tmp_path / "state", here)
    same, foreign = weights(0.0, 10), weights(0.0, 10)

    assert controls._restore(same, tmp_path / "state", here) == 3
    for others, identity in ((foreign, other), (weights(0.0, 12), here)):
        with pytest.raises(ConfigError, match="state: is of another run; choose another --output-dir"):
            controls._restore(others, tmp_path / "state", identity)
    assert (same.parameters["a"].unique().tolist(), foreign.parameters["a"].unique().tolist()) == ([1.0], [0.0])


def test_a_control_is_put_in_the_place_of_nothing(
    run: TrainSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    monkeypatch.setattr(controls, "build_trainer", None)  # that is seen before anything is trained
    monkeypatch.chdir(tmp_path)

    for place in (tmp_path, Path("."), tmp_path / "notes.txt"):
        with pytest.raises(ConfigError, match=f"--output-dir {tmp_path}.*: holds something already; choose another"):
            train_control("layer", [run], place)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_the_command_takes_the_settings_of_a_run(
    run: TrainSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    first = train(run.model_copy(update={"output_dir": tmp_path / "first"}))
    train(TrainSettings(dataset=run.dataset, num_problems=8, init_from=first, lr=1e-3, output_dir=tmp_path / "run"))
    asked = ["--run", str(tmp_path / "run"), "--kind", "layer", "--output-dir", str(tmp_path / "more")]
    monkeypatch.setattr("sys.argv", ["controls", *asked, "--num-threads", "1"])
    monkeypatch.setattr(controls, "configure_logging", lambda level: None)

    controls.main()

    assert capsys.readouterr().out.splitlines() == [str(tmp_path / "more")]
    runs = [run, run.model_copy(update={"num_problems": 8, "lr": 1e-3})]
    again = train_control("layer", runs, tmp_path / "again")
    weights = [AutoModelForCausalLM.from_pretrained(d).state_dict() for d in (tmp_path / "more", again)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[1])
    alone = train_control("layer", [run], tmp_path / "alone")
    costs = [json.loads((directory / CONTROL_JSON).read_text()) for directory in (again, alone)]
    assert costs[0]["decoder_tflop"] > 1.1 * costs[1]["decoder_tflop"], "both runs count"


def test_a_run_that_names_no_backbone_stands_on_the_bundled_one() -> None:
    assert backbone_source(TrainSettings()) == (str(bundled_model_path()), None)
    assert backbone_source(TrainSettings(backbone="a/b", backbone_revision="c")) == ("a/b", "c")
