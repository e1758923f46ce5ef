"""Batches that mix depths: each row as if it were alone, replaced in time, and resumable."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import training.mixing
from tests.training.test_trainer import make_trainer
from training.checkpoints import STATE_TENSORS
from training.config import TrainSettings
from training.mixing import MixedRows
from training.run import train
from training.trainer import Trainer
from trm.errors import ConfigError

Settings = Callable[..., TrainSettings]


def mixed_trainer(settings: TrainSettings, tmp_path: Path) -> Trainer:
    trainer = make_trainer(settings)
    trainer.keep_states(tmp_path)
    for parameter in trainer.weights.parameters.values():
        torch.nn.init.normal_(parameter, std=0.1)
    return trainer


@pytest.mark.parametrize("kv_source", ["context", "state"])
def test_a_row_goes_its_way_as_if_alone(settings: Settings, tmp_path: Path, kv_source: str) -> None:
    still = {"lr": 1e-30, "weight_decay": 0.0, "autocast": "off", "kv_source": kv_source, "gradient": "paper"}
    trainer = mixed_trainer(settings(mix_depths="steps", **still), tmp_path)
    for _ in range(8):
        trainer.train_step()

    assert trainer.feed.mixed is not None
    rows, decoder = trainer.feed.mixed.rows, trainer.model.decoder
    assert {row.done for row in rows if row} == {1, 2, 3}
    for row in rows:
        assert row is not None
        alone = trainer.feed.prepare([row.index])
        y = z = torch.zeros_like(alone.x)
        with torch.no_grad():
            for _ in range(row.done):
                y, z = decoder.step(alone.x, y, z, alone.query_rope, alone.key_values(trainer.model))
        torch.testing.assert_close(row.y, y[0, : len(row.y)], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(row.z, z[0, : len(row.z)], rtol=1e-4, atol=1e-4)


def test_every_example_has_its_steps_before_one_has_more(settings: Settings, tmp_path: Path) -> None:
    # 24 examples, 5 rows, 3 steps each; the first rows leave early to spread the depths.
    trainer = mixed_trainer(settings(mix_depths="steps", gradient="paper", batch_size=5, epochs=3), tmp_path)
    assert trainer.feed.mixed is not None
    steps = [0] * 24
    for _ in range(12):
        trainer.train_step()
        for row in trainer.feed.mixed.rows:
            steps[row.index if row else -1] += 1

    assert sum(steps) == 60
    assert max(steps) == 3
    assert steps.count(3) >= 60 // 3 - 5 - 3


@pytest.mark.parametrize(("bias", "taken"), [(9.0, range(40, 48)), (-9.0, range(16, 20))], ids=["sure", "unsure"])
def test_a_row_leaves_when_its_head_is_sure(settings: Settings, tmp_path: Path, bias: float, taken: range) -> None:
    trainer = mixed_trainer(settings(mix_depths="halting", gradient="paper", lr=1e-30, epochs=9), tmp_path)
    with torch.no_grad():
        trainer.model.decoder.halt_head.weight.zero_()
        trainer.model.decoder.halt_head.bias.fill_(bias)
    for _ in range(12):
        trainer.train_step()

    assert trainer.feed.mixed is not None
    assert trainer.feed.mixed.taken in taken  # 12 steps of 4 rows, 3 steps a row at most; exploration keeps a few


def test_a_row_leaves_only_if_sure_of_all_its_labels(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training.mixing, "EXPLORATION", 0.0)
    trainer = mixed_trainer(settings(mix_depths="halting", gradient="paper"), tmp_path)
    assert trainer.feed.mixed is not None
    trainer.feed.fetch(0)
    rows = trainer.feed.prepared[0].answers[:, 0]
    halt = torch.where(torch.arange(len(rows)) == (rows == 2).nonzero()[1], -1.0, 1.0)

    trainer.feed.advance(0, trainer.feed.carry, halt)

    assert [row.done == row.limit for row in trainer.feed.mixed.rows if row] == [True, True, False, True]


@pytest.mark.parametrize("mix_depths", ["steps", "halting"])
def test_a_mixed_run_resumes_to_the_bit(settings: Settings, tmp_path: Path, mix_depths: str) -> None:
    straight = train(settings(gradient="paper", mix_depths=mix_depths, max_steps=7, save_steps=4, batch_size=5))

    resumed = train(TrainSettings(resume=straight.parent / "checkpoint-4", output_dir=tmp_path / "resumed"))

    ours, theirs = load_file(straight / STATE_TENSORS), load_file(resumed / STATE_TENSORS)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_mixing_without_kept_states_is_refused(settings: Settings) -> None:
    with pytest.raises(ConfigError, match="--mix-depths steps: must keep the backbone's states"):
        train(settings(gradient="paper", mix_depths="steps", cache_states="off"))


def test_the_first_rows_spread_the_depths() -> None:
    rows = MixedRows(5, 3).fill(lambda number: number, lambda index: torch.zeros(1, 1))

    assert [(row.index, row.limit) for row in rows] == [(0, 1), (1, 2), (2, 3), (3, 1), (4, 2)]
