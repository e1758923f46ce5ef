"""A run that begins with the decoder of an earlier one."""

import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from training.building import backbone_source, build_trainer, settings_from
from training.config import TrainSettings
from training.run import train
from trm import TRMForCausalLM, checkpoint
from trm.errors import ConfigError

Settings = Callable[..., TrainSettings]


@pytest.fixture
def first(settings: Settings, tmp_path: Path) -> Path:
    """A trained decoder that is not of the default shape."""
    return train(settings(output_dir=tmp_path / "first", max_steps=2, context_layers=[0, 2], expansion=2.0))


def second(first: Path, **changes: Any) -> TrainSettings:
    """What a user gives who wants to go on from `first`, on other problems."""
    given: dict[str, Any] = {
        "dataset": "synthetic:mental", "num_problems": 24, "init_from": first, "lr": 1e-2, "num_threads": 1,
        "output_dir": first.parent.parent / "second", "validation_problems": 4,
    }  # fmt: skip
    return TrainSettings(**(given | changes))


def test_it_begins_with_that_decoder_on_its_backbone(first: Path) -> None:
    settings = settings_from(second(first), first)
    trainer = build_trainer(settings, *backbone_source(settings), "cpu")

    begun, old = trainer.model, TRMForCausalLM.from_pretrained(first)
    assert all(torch.equal(begun.state_dict()[name], tensor) for name, tensor in old.state_dict().items())
    assert begun.config.context_layers == [0, 2]
    assert (begun.config.n_latent, begun.config.n_supervision, begun.config.max_supervision) == (2, 3, 16)
    assert begun.config.work == ["none"]  # what the new run teaches
    assert trainer.step == 0
    ids = torch.tensor([[5, 6, 7]])
    assert torch.equal(begun(ids).logits, old(ids).logits)


def test_a_decoder_as_the_backbone_is_said_to_begin_anew(
    first: Path, settings: Settings, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        train(settings(backbone=str(first), output_dir=tmp_path / "second", max_steps=1))

    assert f"--backbone {first.resolve()}: nothing of its decoder is taken; --init-from would begin" in caplog.text


def test_depth_may_change(first: Path) -> None:
    config = checkpoint.read_config(train(second(first, n_supervision=5, min_supervision=4, n_latent=1, max_steps=1)))

    assert (config.n_latent, config.n_cycles, config.n_supervision, config.max_supervision) == (1, 2, 5, 20)


def test_it_resumes_to_the_bit_when_the_first_run_is_gone(first: Path, tmp_path: Path) -> None:
    straight = train(second(first, max_steps=4))
    cut = train(second(first, max_steps=4, save_steps=2, output_dir=tmp_path / "cut")).with_name("checkpoint-2")
    shutil.rmtree(first.parent)

    again = train(TrainSettings(resume=cut, output_dir=tmp_path / "again"))

    weights = [checkpoint.read_tensors(path / checkpoint.WEIGHTS_FILE) for path in (straight, again)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[1])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"expansion": 4.0}, r"--expansion 4.0: the decoder of --init-from .*checkpoint-2 has 2.0"),
        ({"context_layers": []}, r"--context-layers \[\]: the decoder of --init-from .*checkpoint-2 has \[0, 2\]"),
        ({"train_lm_head": True}, "--train-lm-head True: .* has False"),
        ({"backbone": "elsewhere"}, "a decoder belongs to its backbone; leave out --backbone"),
    ],
    ids=["width", "context", "head", "backbone"],
)
def test_what_its_weights_decide_cannot_change(first: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        train(second(first, **changes))
    assert not (first.parent.parent / "second").exists()


def test_a_backbone_that_was_not_copied_is_found_and_known_again(
    settings: Settings, backbone_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "MAX_COPIED_BACKBONE_BYTES", 0)
    large = tmp_path / "large"
    shutil.copytree(backbone_dir, large)
    first = train(settings(backbone=str(large), output_dir=tmp_path / "first", max_steps=1))

    last = train(second(first, max_steps=1))

    assert checkpoint.read_config(last).backbone_source == str(large)
    model = AutoModelForCausalLM.from_pretrained(large)
    model.model.norm.weight.data += 1
    model.save_pretrained(large)
    with pytest.raises(ConfigError, match=rf"--init-from .* and {large} has [0-9a-f]{{16}} now; get that revision"):
        train(second(first, output_dir=tmp_path / "third"))
