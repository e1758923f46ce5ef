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
from trm.errors import ConfigError

Settings = Callable[..., TrainSettings]


@pytest.mark.parametrize(("kv_source", "context_layers"), [("context", []), ("context", [0, 2]), ("state", [])])
def test_where_states_are_kept_changes_no_bit(
    settings: Settings, tmp_path: Path, kv_source: str, context_layers: list[int]
) -> None:
    reports = []
    for place in ("off", "memory", "disk"):
        trainer = make_trainer(
            settings(kv_source=kv_source, context_layers=context_layers, cache_states=place, epochs=2)
        )
        trainer.keep_states(tmp_path)
        reports.append([trainer.train_step() for _ in range(trainer.total_steps)])

    assert reports[0] == reports[1] == reports[2]


def test_a_state_depends_on_its_example_alone(settings: Settings) -> None:
    states = make_trainer(settings()).feed.states
    longest = max(len(example.ids) for example in states.examples)

    together = states.padded([5, 1, 7, 3], longest)

    for row, index in enumerate([5, 1, 7, 3]):
        alone, length = states.padded([index], longest)[0], len(states.examples[index].ids)
        assert torch.equal(together[row], alone)
        assert alone[:length].square().mean() == pytest.approx(1, abs=0.01)  # x is normed
        assert not alone[length:].any()


def test_a_state_is_computed_when_it_is_first_needed(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    computed: list[int] = []
    encode = training.states.encode
    monkeypatch.setattr(
        training.states, "encode", lambda model, batch: computed.append(len(batch.input_ids)) or encode(model, batch)
    )
    trainer = make_trainer(settings(cache_states="memory", epochs=3))  # 24 problems, 4 a batch
    trainer.keep_states(tmp_path)
    assert not computed

    counts = []
    for _ in range(trainer.total_steps):
        trainer.train_step()
        counts.append(sum(computed))

    assert counts[:7] == [4, 8, 12, 16, 20, 24, 24]
    assert counts[-1] == 24


def test_a_file_serves_other_runs_on_the_same_data(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def states(seed: int) -> States:
        trainer = make_trainer(settings(cache_states="disk", batch_size=3, seed=seed))
        trainer.keep_states(tmp_path / "cache")
        return trainer.feed.states

    first = states(0).padded([3, 4], 400)
    monkeypatch.setattr(training.states, "encode", None)

    assert torch.equal(states(1).padded([4, 3], 400).flip(0), first)
    assert [file.suffix for file in (tmp_path / "cache").iterdir()] == [".states"]


def test_what_a_killed_run_has_half_written_is_computed_again(settings: Settings, tmp_path: Path) -> None:
    def states() -> States:
        trainer = make_trainer(settings(cache_states="disk"))
        trainer.keep_states(tmp_path)
        return trainer.feed.states

    first = states().padded([0, 1], 400)
    (file,) = tmp_path.iterdir()
    content = bytearray(file.read_bytes())
    content[40] ^= 1
    file.write_bytes(content)

    assert torch.equal(states().padded([0, 1], 400), first)
    assert file.read_bytes() != content


def test_a_run_resumed_on_kept_states_ends_in_the_same_bits(settings: Settings, tmp_path: Path) -> None:
    straight = train(settings(epochs=2, max_steps=8, save_steps=4, context_layers=[0, 2]))
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
