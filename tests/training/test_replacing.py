"""A save that is killed or fails anywhere leaves a whole checkpoint behind, and what follows finds it."""

import errno
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import make_model
from training import checkpoints
from trm import checkpoint
from trm.errors import CheckpointError

CALLS = ("rename", "replace", "unlink", "rmdir")  # `shutil.rmtree` removes with the last two


class Killed(BaseException):
    """Not an Exception: a process that is killed handles nothing."""


def killed(number: int, wanted: int) -> None:
    """From the wanted call on, nothing reaches the disk."""
    if number >= wanted:
        raise Killed


def refused(number: int, wanted: int) -> None:
    """The wanted call fails, those after it do not."""
    if number == wanted:
        raise OSError(errno.EIO, os.strerror(errno.EIO))


@contextmanager
def interrupted(wanted: int, how: Callable[[int, int], None]) -> Iterator[list[str]]:
    """Within the block renames and removals are counted, and the wanted one is interrupted. Gives the calls so far."""
    calls: list[str] = []

    def counted(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def instead(*arguments: Any, **keywords: Any) -> Any:
            calls.append(name)
            how(len(calls), wanted)
            return call(*arguments, **keywords)

        return instead

    with pytest.MonkeyPatch.context() as patch:
        for name in CALLS:
            patch.setattr(os, name, counted(name, getattr(os, name)))
        yield calls


def each_interruption(work: Callable[[], Any], how: Callable[[int, int], None], prepare: Callable[[], Any]) -> Any:
    """Prepare, then interrupt `work` at its first call, its second, … until one runs through. Yields each number."""
    for wanted in count(1):
        prepare()
        with interrupted(wanted, how) as calls, suppress(Killed, OSError, CheckpointError):
            work()
        if len(calls) < wanted:
            assert wanted > 1, "nothing was renamed or removed"
            return
        yield wanted


def state(step: int, loss: float) -> dict[str, Any]:
    return {
        "step": step,
        "data_fingerprint": "data",
        "backbone_fingerprint": "backbone",
        "settings": {},
        "validation": {"loss": loss},
    }


def save(run: Path, step: int, loss: float, keep_last: int = 1) -> None:
    """What the trainer does, with small files."""
    directory = run / f"checkpoint-{step}"
    aside = checkpoint.make_aside(directory)
    (aside / "weights").write_text(f"{step} {loss}")
    (aside / "more").write_text("more")
    checkpoints.put_in_place(aside, directory, state(step, loss))
    checkpoints.prune(run, state(step, loss), keep_last)


def whole(run: Path) -> list[str]:
    """Names of the checkpoints whose files are as they were saved."""
    found = []
    for directory in checkpoints.checkpoints(run):
        with suppress(CheckpointError):
            checkpoints.read_whole(directory)
            found.append(directory.name)
    return found


@pytest.mark.parametrize("how", [killed, refused])
@pytest.mark.parametrize("kept", [(4,), (2, 4), (4, 6)], ids=["the only one", "the newest", "the best"])
def test_a_save_over_a_checkpoint_never_loses_it(
    tmp_path: Path, how: Callable[[int, int], None], kept: tuple[int, ...]
) -> None:
    # A run that resumed from an earlier step saves this one again; so does one whose loss is not finite after a save.
    run = tmp_path / "run"

    def prepare() -> None:
        shutil.rmtree(run, ignore_errors=True)
        run.mkdir()
        for step in kept:
            save(run, step, loss=1 / step if kept[-1] == 4 else step, keep_last=9)

    lost = []
    for wanted in each_interruption(lambda: save(run, 4, loss=0.1, keep_last=9), how, prepare):
        checkpoints.clear_leftovers(run)
        if whole(run) != [f"checkpoint-{step}" for step in kept]:
            lost.append((wanted, whole(run)))
        assert list(run.glob(".checkpoint-*")) == []
        if lost:
            continue
        save(run, 4, loss=0.2, keep_last=9)
        assert (run / "checkpoint-4" / "weights").read_text() == "4 0.2"

    assert lost == []


def test_clearing_up_can_itself_be_killed(tmp_path: Path) -> None:
    run = tmp_path / "run"

    def prepare() -> None:
        shutil.rmtree(run, ignore_errors=True)
        run.mkdir()
        save(run, 4, 0.2)
        aside = checkpoint.make_aside(run / "checkpoint-4")
        (aside / "weights").touch()
        os.rename(run / "checkpoint-4", run / ".checkpoint-4.old")  # between the two renames

    for _ in each_interruption(lambda: checkpoints.clear_leftovers(run), killed, prepare):
        checkpoints.clear_leftovers(run)
        assert whole(run) == [path.name for path in run.iterdir()] == ["checkpoint-4"]


@pytest.mark.parametrize("how", [killed, refused])
def test_pruning_leaves_the_newest_and_the_best_and_no_half(tmp_path: Path, how: Callable[[int, int], None]) -> None:
    run = tmp_path / "run"

    def prepare() -> None:
        shutil.rmtree(run, ignore_errors=True)
        run.mkdir()
        for step, loss in ((1, 0.5), (2, 0.1), (3, 0.4)):
            save(run, step, loss, keep_last=9)

    for _ in each_interruption(lambda: save(run, 4, 0.3), how, prepare):
        checkpoints.clear_leftovers(run)
        assert {"checkpoint-2", "checkpoint-3"} <= set(whole(run)) or {"checkpoint-2", "checkpoint-4"} <= set(
            whole(run)
        )
        assert [path.name for path in checkpoints.checkpoints(run)] == whole(run)
        assert list(run.glob(".checkpoint-*")) == []


def read(directory: Path) -> str | None:
    """What stands there, if it is whole."""
    files = (directory / "weights", directory / "more")
    return files[0].read_text() if all(file.is_file() for file in files) else None


def write(directory: Path, content: str) -> None:
    aside = checkpoint.make_aside(directory)
    (aside / "weights").write_text(content)
    (aside / "more").write_text("more")
    checkpoint.replace_directory(aside, directory)


def test_two_kills_in_a_row_leave_a_whole_directory(tmp_path: Path) -> None:
    directory = tmp_path / "model"

    def cut_once(wanted: int) -> None:
        shutil.rmtree(tmp_path)
        tmp_path.mkdir()
        write(directory, "first")
        with interrupted(wanted, killed), suppress(Killed):
            write(directory, "second")

    lost = []
    for first in each_interruption(lambda: write(directory, "second"), killed, lambda: cut_once(99)):
        again = each_interruption(lambda: write(directory, "third"), killed, lambda first=first: cut_once(first))
        for second in again:
            if not any(read(path) for path in (directory, tmp_path / ".model.old")):
                lost.append((first, second))

    assert lost == []


@pytest.mark.parametrize("how", [killed, refused])
def test_a_written_model_survives_the_write_over_it(tmp_path: Path, how: Callable[[int, int], None]) -> None:
    directory, model = tmp_path / "model", make_model()

    def put() -> None:
        checkpoint.write(directory, model.config, model.trained_state(), model.backbone)

    def prepare() -> None:
        shutil.rmtree(tmp_path)
        tmp_path.mkdir()
        put()

    for _ in each_interruption(put, how, prepare):
        if not directory.exists():
            with pytest.raises(CheckpointError, match=r"model: no such directory, because .*\.model\.old"):
                checkpoint.read(directory)
            checkpoint.read(tmp_path / ".model.old")
        put()  # finishes what was begun
        checkpoint.read(directory)
        assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_second_broken_checkpoint_of_one_step_is_kept_too(tmp_path: Path) -> None:
    for number in range(3):
        save(tmp_path, 4, 0.1)
        (tmp_path / "checkpoint-4" / checkpoints.STATE_JSON).write_text(f"torn {number}")
    save(tmp_path, 4, 0.1)

    broken = sorted(tmp_path.glob("checkpoint-4.broken*"))
    assert [(path / checkpoints.STATE_JSON).read_text() for path in broken] == ["torn 0", "torn 1", "torn 2"]
    assert whole(tmp_path) == ["checkpoint-4"]


def test_the_newer_copy_is_taken_where_the_older_one_is_broken(tmp_path: Path) -> None:
    """A run goes on from an earlier checkpoint, because a later one is broken, and is killed while it replaces that."""
    save(tmp_path, 4, 1.0)
    (tmp_path / "checkpoint-4").rename(tmp_path / ".checkpoint-4.partial")
    (tmp_path / ".checkpoint-4.old").mkdir()

    checkpoints.clear_leftovers(tmp_path)

    assert whole(tmp_path) == ["checkpoint-4"]
    assert not list(tmp_path.glob(".checkpoint-*"))
