"""A write of a checkpoint that fails or is interrupted loses nothing."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import make_model
from tests.trm.checkpoints import BACKBONE_WEIGHTS, files, load
from trm import checkpoint
from trm.checkpoint import CONFIG_FILE, WEIGHTS_FILE
from trm.errors import CheckpointError


@pytest.mark.parametrize(
    "step", ["trm.checkpoint.save_file", "trm.checkpoint.os.replace", "trm.config.TRMConfig.save_pretrained"]
)
def test_interrupted_write_leaves_the_older_checkpoint_untouched(step, make_checkpoint, monkeypatch):
    directory, _ = make_checkpoint(scale=0.1)
    before = files(directory)

    def killed(*args: Any, **kwargs: Any) -> None:
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(step, killed)
        with pytest.raises((OSError, CheckpointError), match="No space left"):
            make_model(scale=0.4).save_pretrained(directory)

    assert files(directory) == before
    make_model(scale=0.4).save_pretrained(directory)  # the remains of the interrupted one are no obstacle
    assert files(directory).keys() >= {CONFIG_FILE, WEIGHTS_FILE, BACKBONE_WEIGHTS}
    assert files(directory)[WEIGHTS_FILE] != before[WEIGHTS_FILE]


def test_failed_rename_leaves_the_older_checkpoint_in_its_place(make_checkpoint, monkeypatch):
    """It was moved out of the way just before; the next write would even delete it there."""
    directory, _ = make_checkpoint(scale=0.1)
    before = files(directory)
    rename = os.rename

    def fail(source: Any, target: Any) -> None:
        if Path(source).name.endswith(".partial"):
            raise OSError("Input/output error")
        rename(source, target)

    with monkeypatch.context() as patch:
        patch.setattr("trm.checkpoint.os.rename", fail)
        with pytest.raises((OSError, CheckpointError), match="Input/output"):
            make_model(scale=0.4).save_pretrained(directory)

    assert files(directory) == before


def test_interrupted_first_write_leaves_nothing_that_looks_like_a_checkpoint(tmp_path, monkeypatch):
    def killed(*args: Any, **kwargs: Any) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr("trm.config.TRMConfig.save_pretrained", killed)
    with pytest.raises((OSError, CheckpointError), match="No space left"):
        make_model().save_pretrained(tmp_path / "checkpoint")

    assert not (tmp_path / "checkpoint").exists()
    assert not list(tmp_path.glob(f"*/{CONFIG_FILE}"))


def test_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")

    with pytest.raises(CheckpointError, match="file/checkpoint: cannot write there: Not a directory"):
        make_model().save_pretrained(tmp_path / "file" / "checkpoint")


def test_saving_to_a_relative_path(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")

    make_model().save_pretrained("../there/")

    assert load(tmp_path / "there")


def test_saving_into_the_working_directory_works_or_is_refused(tmp_path, monkeypatch):
    """`Path('.')` has no name to put a neighbour beside."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")

    try:
        make_model().save_pretrained(".")
    except CheckpointError:
        assert not list((tmp_path / "here").iterdir())
    else:
        assert load(tmp_path / "here")


def test_json_is_written_aside_and_renamed(tmp_path, monkeypatch):
    checkpoint.write_json(tmp_path / "run.json", {"step": 1})
    monkeypatch.setattr("trm.checkpoint.os.replace", lambda *paths: None)

    checkpoint.write_json(tmp_path / "run.json", {"step": 2})

    assert checkpoint.read_json(tmp_path / "run.json") == {"step": 1}


def test_saving_changes_nothing_in_the_model(tmp_path):
    """Saved in the middle of training, where weights, types and gradients must go on as they were."""
    model = make_model()
    before = {name: (tensor.clone(), tensor.dtype) for name, tensor in model.state_dict().items()}
    trainable = [parameter.requires_grad for parameter in model.parameters()]

    model.save_pretrained(tmp_path / "checkpoint")

    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name][0])
        assert tensor.dtype == before[name][1]
    assert [parameter.requires_grad for parameter in model.parameters()] == trainable
