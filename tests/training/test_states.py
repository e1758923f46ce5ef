"""Backbone states that are kept: the same losses, the same bits wherever they lie, and room for them."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

import training.states
from tests.training.test_trainer import make_trainer
from training.checkpoints import STATE_TENSORS
from training.config import TrainSettings
from training.run import train
from training.states import States, choose
from trm.chat import Example
from trm.errors import ConfigError

Settings = Callable[..., TrainSettings]


@pytest.mark.parametrize("kv_source", ["context", "state"])
def test_kept_states_give_the_losses_of_fresh_ones(settings: Settings, tmp_path: Path, kv_source: str) -> None:
    reports = []
    for place in ("off", "memory"):
        trainer = make_trainer(settings(kv_source=kv_source, cache_states=place, autocast="off"))
        trainer.keep_states(tmp_path)
        assert (trainer.feed.states is None) == (place == "off")
        reports.append([trainer.train_step() for _ in range(3)])

    for fresh, kept in zip(*reports, strict=True):
        assert kept["losses"] == pytest.approx(fresh["losses"], rel=1e-3)
        assert kept["grad_norm"] == pytest.approx(fresh["grad_norm"], rel=1e-2)


def test_a_file_holds_the_bits_of_memory_and_is_computed_once(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def kept(place: str) -> States:
        trainer = make_trainer(settings(cache_states=place, batch_size=3, seed=1 if place == "disk" else 0))
        trainer.keep_states(tmp_path / "cache")
        assert trainer.feed.states is not None
        return trainer.feed.states

    memory, disk = kept("memory"), kept("disk")
    monkeypatch.setattr(training.states, "encode", None)

    assert torch.equal(memory.x, disk.x)
    assert torch.equal(kept("disk").x, disk.x)
    assert [file.suffix for file in (tmp_path / "cache").iterdir()] == [".states"]


def test_rows_are_padded_with_zeros() -> None:
    examples = [Example((1, 2, 3), 1), Example((4,), 0)]
    states = States(torch.tensor([[4.0], [1.0], [2.0], [3.0]]), examples)

    assert states.padded([1, 0], 4).squeeze(-1).tolist() == [[4, 0, 0, 0], [1, 2, 3, 0]]


def test_a_run_resumed_on_kept_states_ends_in_the_same_bits(settings: Settings, tmp_path: Path) -> None:
    straight = train(settings(epochs=2, max_steps=8, save_steps=4))
    assert not (straight.parent / "cache").exists()

    resumed = train(
        TrainSettings(resume=straight.parent / "checkpoint-4", output_dir=tmp_path / "moved", cache_states="disk")
    )

    assert list((tmp_path / "moved" / "cache").iterdir())
    ours, theirs = load_file(straight / STATE_TENSORS), load_file(resumed / STATE_TENSORS)
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


@pytest.mark.parametrize(
    ("wanted", "needed", "epochs", "place"),
    [
        ("auto", 20, 2, "memory"),
        ("auto", 30, 2, "disk"),
        ("auto", 120, 2, "off"),
        ("auto", 20, 1, "off"),
        ("memory", 90, 1, "memory"),
        ("disk", 190, 1, "disk"),
        ("off", 1000, 9, "off"),
    ],
)
def test_states_go_where_there_is_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wanted: str, needed: int, epochs: float, place: str
) -> None:
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=100))
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=200))

    assert choose(wanted, needed, tmp_path / "new" / "file", epochs) == place

    for full in ("memory", "disk"):
        with pytest.raises(ConfigError, match=f"--cache-states {full}: the backbone's states take"):
            choose(full, 201, tmp_path / "new" / "file", epochs)


def test_a_cache_that_cannot_be_written_is_refused(settings: Settings, tmp_path: Path) -> None:
    (tmp_path / "file").touch()

    with pytest.raises(ConfigError, match="--cache-states disk: cannot write"):
        train(settings(cache_states="disk", cache_dir=tmp_path / "file" / "cache"))
