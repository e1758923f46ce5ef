"""The checkpoints of one run: which are whole, which is the newest, which is the best, which may go.

What is known of a checkpoint stands inside it, in training_state.json, with a digest of each of
its other files: nothing depends on a file beside it that a killed run may have left behind the times.
Only a directory that is a checkpoint of the same run is ever removed.
"""

import hashlib
import logging
import math
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

from training import directories
from trm import checkpoint
from trm.errors import CheckpointError, ConfigError

logger = logging.getLogger(__name__)

STATE_TENSORS = "training_state.safetensors"
STATE_JSON = "training_state.json"
RUN_JSON = "run.json"
FORMAT_VERSION = 2
# What may differ between the parts of one run. Data and backbone may have moved: their fingerprints may not change.
FREE_ON_RESUME = {"output_dir", "max_steps", "epochs", "save_steps", "keep_last", "lr", "max_grad_norm"}
FREE_ON_RESUME |= {
    "device",
    "num_threads",
    "cache_states",
    "cache_dir",
    "dataset",
    "validation",
    "backbone",
    "backbone_revision",
}

State = dict[str, Any]


def checkpoints(run_dir: Path) -> list[Path]:
    """Every `checkpoint-<step>` of a run directory, whole or not, by step."""
    named = [path for path in run_dir.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted((path for path in named if path.is_dir() and not path.is_symlink()), key=step_of)


def step_of(directory: Path) -> int:
    """The step in a checkpoint's name."""
    return int(directory.name.rpartition("-")[2])


def find(path: Path) -> Path:
    """The checkpoint that `--resume PATH` means: itself, or the newest whole one of a run directory.

    Raises CheckpointError where it is broken, or there is none; broken ones of a run directory are skipped
    with a warning.
    """
    if not path.is_dir():
        raise ConfigError(f"--resume {path}: no such directory; give a checkpoint or a run directory")
    candidates = checkpoints(path)
    if not candidates and not (path / RUN_JSON).is_file():
        read_whole(path)
        return path
    for directory in reversed(candidates):
        try:
            read_whole(directory)
        except CheckpointError as error:
            logger.warning("%s is skipped: %s", directory, error)
        else:
            return directory
    if candidates:
        raise CheckpointError(f"--resume {path}: none of its {len(candidates)} checkpoints is whole; start a new run")
    raise ConfigError(f"--resume {path}: the run has saved no checkpoint yet; start it again without --resume")


def read_state(directory: Path) -> State:
    """The JSON half of a training state. Raises CheckpointError where it is foreign or of another version."""
    path = directory / STATE_JSON
    state = checkpoint.read_json(path)
    if state.get("format_version") != FORMAT_VERSION:
        raise CheckpointError(
            f"{path}: format version is {state.get('format_version')}; this program reads {FORMAT_VERSION}"
        )
    kinds = {"step": int, "data_fingerprint": str, "backbone_fingerprint": str, "settings": dict, "files": dict}
    for name, kind in kinds.items():
        if not isinstance(state.get(name), kind):
            raise CheckpointError(f"{path}: {name} is missing or no {kind.__name__}")
    return state


def read_whole(directory: Path) -> State:
    """The state of a checkpoint. Raises CheckpointError for the first file that is not as it was saved."""
    state = read_state(directory)
    for name, digest in state["files"].items():
        if not (directory / name).is_file():
            raise CheckpointError(f"{directory / name}: missing")
        if _digest(directory / name) != digest:
            raise CheckpointError(f"{directory / name}: truncated or changed since it was saved")
    return state


def put_in_place(aside: Path, directory: Path, state: State) -> None:
    """Complete a checkpoint in `aside` with its state, force it to the disk, and rename it to `directory`.

    What stands there and is no checkpoint of this run is kept, under the name `<directory>.broken` or `.broken-<n>`.
    """
    files = {str(path.relative_to(aside)): _digest(path) for path in sorted(aside.rglob("*")) if path.is_file()}
    checkpoint.write_json(aside / STATE_JSON, {"format_version": FORMAT_VERSION} | state | {"files": files})
    for path in (*aside.rglob("*"), aside):
        _force_to_disk(path)
    if directory.exists() and not _same_run(_state_or_none(directory), state):
        kept = directory.with_name(f"{directory.name}.broken")
        if kept.exists():
            kept = next(path for n in count(2) if not (path := kept.with_name(f"{kept.name}-{n}")).exists())
        logger.warning("%s is broken or of another run; it is kept as %s", directory, kept.name)
        os.rename(directory, kept)
    checkpoint.replace_directory(aside, directory)
    _force_to_disk(directory.parent)


def best(run_dir: Path, state: State) -> tuple[Path, float] | None:
    """The checkpoint of the lowest validation loss in the run of `state`, and that loss; the earliest of equals."""
    losses = {path: (other["validation"] or {}).get("loss", math.nan) for path, other in _own(run_dir, state).items()}
    finite = {path: loss for path, loss in losses.items() if math.isfinite(loss)}
    return min(finite.items(), key=lambda item: item[1]) if finite else None


def prune(run_dir: Path, state: State, keep_last: int) -> None:
    """Remove what is older than the last `keep_last` checkpoints up to the one of `state`, except the best."""
    spared = best(run_dir, state)
    past = [path for path in _own(run_dir, state) if step_of(path) <= state["step"]]
    for path in past[:-keep_last]:
        if spared is None or path != spared[0]:
            condemned = path.with_name(f".{path.name}.pruned")  # so that a kill leaves no half of a checkpoint
            os.rename(path, condemned)
            shutil.rmtree(condemned)


def clear_leftovers(run_dir: Path) -> None:
    """Remove what a killed run was writing or removing; put back what it had not yet replaced.

    Where a checkpoint is missing, the older copy comes back if it is whole, else the newer one if that is.
    Not while another run is at work there.
    """
    leftovers = {
        path: found
        for path in run_dir.glob(".checkpoint-*")
        if (found := re.fullmatch(r"\.(checkpoint-\d+)\.(partial|old|pruned)", path.name)) and path.is_dir()
    }
    for suffix in ("old", "partial"):
        for path, found in leftovers.items():
            directory = run_dir / found[1]
            if found[2] == suffix and not directory.exists() and _is_whole(path):
                logger.warning("putting %s back: a killed run was replacing it", directory)
                os.rename(path, directory)
    for path in leftovers:
        if path.exists():
            logger.warning("removing %s: a killed run was at work on it", path)
            shutil.rmtree(path)


def warn_of_later(run_dir: Path, step: int) -> None:
    """Say it where a run directory holds checkpoints of steps that the run has still to take."""
    later = [path.name for path in checkpoints(run_dir) if step_of(path) > step]
    if later:
        logger.warning(
            "going on from step %d; the later %s stays until this run reaches its step, "
            "and until then --resume %s takes that one",
            step,
            later[-1],
            run_dir,
        )


def require_space(run_dir: Path, checkpoint_bytes: int, keep_last: int) -> None:
    """Raise ConfigError unless the disk holds the checkpoints to keep, the best and the one being written."""
    missing = max(1, keep_last + 2 - len(checkpoints(run_dir)))
    free = shutil.disk_usage(run_dir).free
    if free < missing * checkpoint_bytes:
        raise ConfigError(
            f"--output-dir {run_dir}: {free / 1e6:,.1f} MB are free, but {missing} checkpoints of about "
            f"{checkpoint_bytes / 1e6:,.1f} MB need {missing * checkpoint_bytes / 1e6:,.1f} MB; "
            f"make room{', or lower --keep-last' if keep_last > 1 else ''}"
        )


def record_progress(run_dir: Path, state: State, line: Mapping[str, Any]) -> None:
    """Bring the summary in run.json up to date: step, seconds, last losses, best checkpoint."""
    chosen = best(run_dir, state)
    progress = {
        "step": state["step"],
        "wall_s": state["wall_s"],
        "last": line,
        "validation": state["validation"],
        "best": chosen and {"step": step_of(chosen[0]), "loss": chosen[1]},
    }
    checkpoint.write_json(run_dir / RUN_JSON, checkpoint.read_json(run_dir / RUN_JSON) | progress)


@contextmanager
def claim(run_dir: Path) -> Iterator[None]:
    """Claim a run directory, and clear up after a killed run. Raises ConfigError as `directories.claim` does."""
    with directories.claim(run_dir, "trm-train"):
        clear_leftovers(run_dir)
        yield


def _own(run_dir: Path, state: State) -> dict[Path, State]:
    """The checkpoints of the run that `state` belongs to, by step."""
    states = {path: _state_or_none(path) for path in checkpoints(run_dir)}
    return {path: other for path, other in states.items() if other and _same_run(other, state)}


def _state_or_none(directory: Path) -> State | None:
    try:
        return read_state(directory)
    except CheckpointError:
        return None


def _is_whole(directory: Path) -> bool:
    try:
        read_whole(directory)
    except CheckpointError:
        return False
    return True


def _same_run(one: Mapping[str, Any] | None, other: Mapping[str, Any]) -> bool:
    return one is not None and identity(one) == identity(other)


def identity(state: Mapping[str, Any]) -> tuple[Any, ...]:
    """What makes a run the one that it is: its data, its backbone, and the settings that may not change."""
    settings = {name: value for name, value in state["settings"].items() if name not in FREE_ON_RESUME}
    return state["data_fingerprint"], state["backbone_fingerprint"], settings


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _force_to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
