"""A backbone's run that was interrupted goes on, unless it was another one."""

import json
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch

from training import ordinary, pretrain
from training.checkpoints import STATE_TENSORS
from training.config import PretrainSettings
from training.directories import claim
from trm import checkpoint
from trm.errors import CheckpointError, ConfigError

SMALL: dict[str, Any] = {
    "max_steps": 10,
    "batch_size": 2,
    "families": ["easy"],
    "hidden_size": 64,
    "num_layers": 1,
    "vocab_size": 400,
    "device": "cpu",
    "num_threads": 1,
}
INTERRUPTED = 8  # in the middle of the first pool of batches; a point of the curve lies two steps back


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The numbers of the batches trained on, counted over all runs; the 8th of the first run is not reached."""
    monkeypatch.setattr(pretrain, "TOKENIZER_PROBLEMS", 100)
    monkeypatch.setattr(pretrain, "NUM_TEST_PROBLEMS", 2)
    monkeypatch.setattr(pretrain, "NUM_EVALUATIONS", 5)
    taken: list[int] = []
    add_gradients = ordinary.add_gradients

    def interrupted(*arguments: Any) -> Any:
        taken.append(len(taken) + 1)
        if len(taken) == INTERRUPTED:
            raise KeyboardInterrupt
        return add_gradients(*arguments)

    monkeypatch.setattr(ordinary, "add_gradients", interrupted)
    return taken


def settings(directory: Path, **changes: Any) -> PretrainSettings:
    return PretrainSettings(output_dir=directory, **SMALL | changes)


def written(directory: Path) -> tuple[dict[str, torch.Tensor], list[dict[str, float]]]:
    """The weights, and the curve without its times."""
    curve = json.loads((directory / pretrain.PRETRAIN_JSON).read_text())["curve"]
    return checkpoint.read_tensors(directory / "model.safetensors"), [point | {"seconds": 0} for point in curve]


def test_an_interrupted_run_goes_on_to_the_bit(tmp_path: Path, steps: list[int]) -> None:
    with pytest.raises(KeyboardInterrupt):
        pretrain.pretrain(settings(tmp_path / "parts"))
    first_part = json.loads((tmp_path / "parts" / pretrain.PRETRAIN_JSON).read_text())["curve"]
    assert [point["step"] for point in first_part] == [2, 4, 6]

    pretrain.pretrain(settings(tmp_path / "parts"))

    assert len(steps) == INTERRUPTED + 4  # 7 to 10
    assert not (tmp_path / "parts" / "unfinished").exists()
    pretrain.pretrain(settings(tmp_path / "whole"))
    (weights, curve), (expected, points) = written(tmp_path / "parts"), written(tmp_path / "whole")
    assert curve == points
    for name, tensor in expected.items():
        assert torch.equal(weights[name], tensor), name


def test_a_second_run_in_one_directory_is_refused(tmp_path: Path, steps: list[int]) -> None:
    with claim(tmp_path, "trm-pretrain"), pytest.raises(ConfigError, match="another trm-pretrain is at work there"):
        pretrain.pretrain(settings(tmp_path))
    assert steps == []


def test_a_finished_backbone_is_not_written_over(tmp_path: Path, steps: list[int]) -> None:
    steps.extend(range(INTERRUPTED))  # past the one that is interrupted
    pretrain.pretrain(settings(tmp_path))
    before = {file: file.read_bytes() for file in tmp_path.iterdir()}

    for changes in ({}, {"seed": 1}):
        with pytest.raises(ConfigError, match=f"--output-dir {tmp_path}: holds a model already; choose another"):
            pretrain.pretrain(settings(tmp_path, **changes))
    assert {file: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_a_run_that_was_killed_before_its_last_point_was_saved_saves_it(
    tmp_path: Path, steps: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    steps.extend(range(INTERRUPTED))
    with monkeypatch.context() as patched:
        saving = Mock(side_effect=[*[None] * 4, OSError("disk full")])
        patched.setattr(pretrain.Qwen2ForCausalLM, "save_pretrained", saving)
        with pytest.raises(
            CheckpointError, match="cannot be saved: disk full; make room, then the same command goes on"
        ):
            pretrain.pretrain(settings(tmp_path / "killed"))

    pretrain.pretrain(settings(tmp_path / "killed"))

    assert [point["step"] for point in written(tmp_path / "killed")[1]] == [2, 4, 6, 8, 10]
    assert not (tmp_path / "killed" / "unfinished").exists()


def test_another_run_does_not_go_on(tmp_path: Path, steps: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(KeyboardInterrupt):
        pretrain.pretrain(settings(tmp_path))
    file = tmp_path / "unfinished" / STATE_TENSORS
    kept = file.read_bytes()

    with pytest.raises(
        ConfigError, match="unfinished: that run has another max_steps, lr; give what it was begun with"
    ):
        pretrain.pretrain(settings(tmp_path, max_steps=3, lr=1e-3))
    with monkeypatch.context() as patched:
        patched.setattr(pretrain, "FIRST_NUMBERS", 50)
        with pytest.raises(ConfigError, match="that run has another data;"):
            pretrain.pretrain(settings(tmp_path))
    assert file.read_bytes() == kept
    file.write_bytes(kept.replace(b"master.model.norm", b"master.model.corm"))
    with pytest.raises(CheckpointError, match=f"does not fit: 'master.model.norm.weight'; remove {tmp_path} to begin"):
        pretrain.pretrain(settings(tmp_path))

    assert len(steps) == INTERRUPTED
