"""The checkpoints of a run: which one a resume takes, which ones stay, and what a full disk does to them."""

import errno
import json
import logging
import os
import resource
import shutil
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.training.comparing import differing_tensors
from training import checkpoints
from training.checkpoints import STATE_JSON, STATE_TENSORS
from training.config import TrainSettings
from training.run import train
from trm import checkpoint
from trm.errors import CheckpointError, ConfigError

Settings = Callable[..., TrainSettings]


def names(run: Path) -> list[str]:
    return sorted(path.name for path in run.glob("*checkpoint*"))


def set_loss(directory: Path, loss: float) -> None:
    """Pretend that a checkpoint was measured so."""
    path = directory / STATE_JSON
    state = json.loads(path.read_text())
    path.write_text(json.dumps(state | {"validation": {"loss": loss, "losses": [loss]}}))


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-50] ^= 1
    path.write_bytes(content)


BREAKAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "truncated": (lambda d: truncate(d / STATE_TENSORS), "truncated or changed"),
    "one bit": (lambda d: flip(d / checkpoint.WEIGHTS_FILE), "truncated or changed"),
    "no state": (lambda d: (d / STATE_JSON).unlink(), "missing"),
    "torn state": (lambda d: (d / STATE_JSON).write_text('{"step":'), "not readable as JSON"),
    "no backbone": (lambda d: (d / "backbone" / "config.json").unlink(), "missing"),
    "empty": (lambda d: (shutil.rmtree(d), d.mkdir()), "missing"),
}


@pytest.mark.parametrize("breakage", BREAKAGES)
def test_a_run_directory_resumes_from_its_newest_whole_checkpoint(
    settings: Settings, caplog: pytest.LogCaptureFixture, breakage: str
) -> None:
    last = train(settings(max_steps=3, save_steps=1))
    whole = shutil.copytree(last, last.parent.parent / "whole")
    breaks, reason = BREAKAGES[breakage]
    breaks(last)

    with pytest.raises(CheckpointError, match=reason):
        checkpoints.find(last)
    with caplog.at_level(logging.WARNING):
        again = train(TrainSettings(resume=last.parent))

    assert again == last
    assert differing_tensors(last, whole) == []
    assert f"{last} is skipped" in caplog.text
    assert reason in caplog.text


def test_a_run_directory_without_a_whole_checkpoint_says_so(settings: Settings, tmp_path: Path) -> None:
    last = train(settings(max_steps=1))
    (last / STATE_JSON).unlink()
    with pytest.raises(CheckpointError, match="none of its 1 checkpoints is whole"):
        train(TrainSettings(resume=last.parent))

    shutil.rmtree(last)
    with pytest.raises(ConfigError, match="no checkpoint yet; start it again without --resume"):
        train(TrainSettings(resume=last.parent))
    assert train(settings(max_steps=1)) == last  # which works

    with pytest.raises(ConfigError, match="no such directory"):
        train(TrainSettings(resume=tmp_path / "nowhere"))


def test_the_last_ones_and_the_best_are_kept(settings: Settings) -> None:
    run = train(settings(max_steps=4, save_steps=1, epochs=9, keep_last=9)).parent
    for step, loss in ((1, 0.5), (2, 0.1), (3, 0.1), (4, float("nan"))):
        set_loss(run / f"checkpoint-{step}", loss)
    (run / "checkpoint-0").mkdir()  # none of ours
    shutil.copytree(run / "checkpoint-1", run / "checkpoint-1-copy")

    train(TrainSettings(resume=run / "checkpoint-4", max_steps=6, keep_last=2))

    kept = ["checkpoint-0", "checkpoint-1-copy", "checkpoint-2", "checkpoint-5", "checkpoint-6"]
    assert names(run) == kept
    assert json.loads((run / "run.json").read_text())["best"] == {"step": 2, "loss": 0.1}


def test_checkpoints_of_another_run_and_later_ones_stay(
    settings: Settings, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    other = train(settings(max_steps=1, seed=1, output_dir=tmp_path / "other"))
    run = train(settings(max_steps=9, save_steps=3, epochs=9)).parent
    shutil.copytree(other, run / "checkpoint-1")
    shutil.copytree(other, run / "checkpoint-6", dirs_exist_ok=True)

    train(TrainSettings(resume=run / "checkpoint-3", max_steps=6, keep_last=1))

    assert names(run) == ["checkpoint-1", "checkpoint-6", "checkpoint-6.broken", "checkpoint-9"]
    assert "going on from step 3; the later checkpoint-9 stays" in caplog.text
    assert differing_tensors(run / "checkpoint-1", other) == []


def test_no_training_without_room(settings: Settings, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9 - 1000, 1000))
    with pytest.raises(ConfigError, match=r"0\.0 MB are free, but 5 checkpoints of about 0\.\d MB need \d\.\d MB"):
        train(settings(max_steps=1))
    assert names(tmp_path / "run") == []


def test_the_estimated_size_is_near_the_real_one(settings: Settings, caplog: pytest.LogCaptureFixture) -> None:
    sizes: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoints, "require_space", lambda run, size, keep: sizes.append(size))
        last = train(settings(max_steps=2, gradient="paper"))
    names = (checkpoint.WEIGHTS_FILE, STATE_TENSORS, "backbone/model.safetensors")

    assert 0.7 < sum((last / name).stat().st_size for name in names) / sizes[0] < 1.1


def no_space(*arguments: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("failing", ["write_tensors", "write_backbone", "replace_directory"])
def test_a_failed_save_leaves_older_checkpoints_alone(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    straight = train(settings(max_steps=4, save_steps=2)).rename(tmp_path / "straight")
    monkeypatch.setattr(checkpoint, failing, no_space)

    with pytest.raises(CheckpointError, match=r"checkpoint-4: cannot be saved: .*No space left.*--resume .*run$"):
        train(TrainSettings(resume=tmp_path / "run"))

    assert names(tmp_path / "run") == ["checkpoint-2"]
    assert not list((tmp_path / "run").glob(".checkpoint*"))
    monkeypatch.undo()
    assert differing_tensors(train(TrainSettings(resume=tmp_path / "run")), straight) == []


def test_a_write_that_the_system_refuses_is_named(settings: Settings, tmp_path: Path) -> None:
    train(settings(max_steps=4, save_steps=2))
    shutil.rmtree(tmp_path / "run" / "checkpoint-4")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (120_000, hard))  # log and JSON fit, weights do not
    try:
        with pytest.raises(CheckpointError, match=r"checkpoint-4: cannot be saved: .*File too large"):
            train(TrainSettings(resume=tmp_path / "run"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    assert names(tmp_path / "run") == ["checkpoint-2"]


def test_a_directory_that_cannot_be_written_is_found_before_training(settings: Settings, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="cannot write there: Not a directory"):
        train(settings(output_dir=tmp_path / "file" / "run"))


def test_moved_data_is_asked_for_and_taken(settings: Settings, jsonl: Callable[..., Path], tmp_path: Path) -> None:
    path = jsonl(*({"question": f"{n} and 1?", "answer": f"#### {n + 1}"} for n in range(12)))
    run = train(settings(dataset=str(path), max_steps=1)).parent
    moved = path.rename(tmp_path / "moved.jsonl")

    with pytest.raises(ConfigError, match=r"--dataset .*rows\.jsonl: the run to resume was started with it"):
        train(TrainSettings(resume=run, max_steps=2))

    assert train(TrainSettings(resume=run, max_steps=2, dataset=str(moved))) == run / "checkpoint-2"


def test_what_a_killed_run_left_half_done_is_removed_and_nothing_else(tmp_path: Path) -> None:
    for name in (".checkpoint-9.partial", ".checkpoint-3.old", ".checkpoint-mine.partial", "checkpoint-3", ".old"):
        (tmp_path / name).mkdir()
    for name in (".checkpoint-1.pruned", ".checkpoint-2.old"):  # halves
        (tmp_path / name).mkdir()

    checkpoints.clear_leftovers(tmp_path)

    assert {path.name for path in tmp_path.iterdir()} == {".checkpoint-mine.partial", "checkpoint-3", ".old"}
