"""Two processes over gloo against one: the same losses and weights, and either goes on where the other stopped."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file
from torch import Tensor

from tests.training.together import assert_same_weights, in_two_processes
from training.checkpoints import STATE_TENSORS
from training.config import TrainSettings
from training.run import train

pytestmark = pytest.mark.slow

Settings = Callable[..., TrainSettings]


def read(checkpoint: Path) -> dict[str, Tensor]:
    return load_file(checkpoint / STATE_TENSORS)


def logged_losses(run_dir: Path) -> list[float]:
    lines = map(json.loads, (run_dir / "log.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if "loss" in line]


@pytest.mark.parametrize("place", ["memory", "disk"])
def test_two_processes_give_the_run_of_one(settings: Settings, tmp_path: Path, place: str) -> None:
    # 21 examples in batches of 4: the last batch has a row for one process only.
    # Problems of one and of several results: how many labels a step has depends on all processes' rows.
    at_once = {"dataset": "synthetic:easy,mental", "replies": ["worked", "answer"], "step_targets": True}
    rest = {"autocast": "off", "cache_states": place, "min_supervision": 2, "lr": 1e-3}
    small = settings(num_problems=11, epochs=2, **at_once, **rest)
    alone = train(small)
    assert json.loads((alone.parent / "run.json").read_text())["num_examples"] == 21

    values = small.model_dump(mode="json", exclude_none=True, exclude_defaults=True)
    values["output_dir"] = str(tmp_path / "two")
    (tmp_path / "two.yaml").write_text(json.dumps(values))  # which is YAML too
    in_two_processes("training", "--config", str(tmp_path / "two.yaml"))

    losses = logged_losses(alone.parent)
    assert len(losses) == 2
    assert logged_losses(tmp_path / "two") == pytest.approx(losses, rel=1e-4)
    assert_same_weights(read(tmp_path / "two" / alone.name), read(alone))


def test_two_processes_go_on_in_the_middle_of_a_batch_of_one(settings: Settings, tmp_path: Path) -> None:
    straight = train(settings(gradient="paper", autocast="off", max_steps=8, save_steps=4, batch_size=5, lr=1e-3))

    in_two_processes(
        "training", "--resume", str(straight.parent / "checkpoint-4"), "--output-dir", str(tmp_path / "two")
    )

    assert_same_weights(read(tmp_path / "two" / straight.name), read(straight))
