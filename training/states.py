"""Backbone states, computed once and kept: the backbone is frozen, so that x is the same in every epoch.

A token's x is computed among examples of similar length, in chunks that depend on the data alone, never on
the batches it is read back for. So a resumed run reads the bits that the uninterrupted one read.
Raises ConfigError where the states do not fit where they were asked to lie.
"""

import hashlib
import logging
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
import psutil
import torch
from torch import Tensor
from tqdm import tqdm

from training import workers
from training.batches import collate
from training.config import CacheStates
from training.loss import encode
from trm.chat import Example
from trm.errors import ConfigError
from trm.model import TRMForCausalLM

logger = logging.getLogger(__name__)

CHUNK_TOKENS = 8192  # padding included, of one pass of the backbone
RAM_SHARE = 0.25  # of what is available; beyond it "auto" goes to disk
DISK_SHARE = 0.5  # of what is free; beyond it "auto" keeps nothing


class States:
    """x (T, D) of the T tokens of all examples, on the CPU or in a mapped file, shortest example first."""

    def __init__(self, x: Tensor, examples: Sequence[Example]) -> None:
        self.x = x
        self.spans: dict[int, slice] = {}
        at = 0
        for index in by_length(examples):
            self.spans[index] = slice(at, at + len(examples[index].ids))
            at += len(examples[index].ids)

    def padded(self, indices: Sequence[int], width: int) -> Tensor:
        """x (B, width, D) of the examples at `indices`, zero at padding."""
        rows = torch.zeros(len(indices), width, self.x.shape[1], dtype=self.x.dtype)
        for row, index in enumerate(indices):
            own = self.x[self.spans[index]]
            rows[row, : len(own)] = own
        return rows


def by_length(examples: Sequence[Example]) -> list[int]:
    """Indices of the examples, the shortest first."""
    return sorted(range(len(examples)), key=lambda i: len(examples[i].ids))


def size_bytes(model: TRMForCausalLM, examples: Sequence[Example]) -> int:
    """What the states of all examples take, in the backbone's type."""
    return int(sum(len(e.ids) for e in examples) * model.config.hidden_size * model.backbone.dtype.itemsize)


def choose(wanted: CacheStates, needed: int, file: Path, epochs: float) -> CacheStates:
    """Where `needed` bytes of states go: to `wanted`, or for "auto" to the best place that has room.

    On disk they are `file`. A run of one epoch reads each state once, so that "auto" keeps none.
    Raises ConfigError where `wanted` has no room.
    """
    memory = psutil.virtual_memory().available // workers.count_here()  # every process keeps a copy
    disk = sum(f.stat().st_size for f in (file,) if f.exists()) + shutil.disk_usage(_existing(file.parent)).free
    if wanted == "auto":
        if epochs <= 1:
            return "off"
        return "memory" if needed <= RAM_SHARE * memory else "disk" if needed <= DISK_SHARE * disk else "off"
    room = {"memory": memory, "disk": disk}.get(wanted, needed)
    if needed > room:
        raise ConfigError(
            f"--cache-states {wanted}: the backbone's states take {needed / 1e9:.1f} GB, {room / 1e9:.1f} GB are free; "
            "use another place or --cache-states off"
        )
    return wanted


def keep(
    model: TRMForCausalLM,
    examples: Sequence[Example],
    autocast: bool,
    wanted: CacheStates,
    directory: Path,
    key: str,
    epochs: float,
) -> tuple[CacheStates, States | None]:
    """Compute the states of all examples now and keep them where `choose` says: the place, and the states unless "off".

    Files go to `directory`; `key` names data and backbone.
    """
    needed, file = size_bytes(model, examples), file_in(directory, model, key, autocast)
    place = workers.agree(choose(wanted, needed, file, epochs))
    if place == "off":
        return place, None
    logger.info("keeping the backbone's states: %.2f GB, %s", needed / 1e9, place)
    in_file = place == "disk"
    return place, on_disk(model, examples, autocast, file) if in_file else in_memory(model, examples, autocast)


def in_memory(model: TRMForCausalLM, examples: Sequence[Example], autocast: bool) -> States:
    """Compute the states of all examples and keep them in memory."""
    x = torch.empty(sum(len(e.ids) for e in examples), model.config.hidden_size, dtype=model.backbone.dtype)
    at = 0
    for chunk in _chunks(model, examples, autocast):
        x[at : at + len(chunk)] = chunk
        at += len(chunk)
    return States(x, examples)


def file_in(directory: Path, model: TRMForCausalLM, key: str, autocast: bool) -> Path:
    """The file of the states in a cache directory; `key` names data and backbone."""
    name = hashlib.sha256(f"{key}/{model.backbone.dtype}/{autocast}".encode()).hexdigest()[:16]
    return directory / f"{name}.states"


def on_disk(model: TRMForCausalLM, examples: Sequence[Example], autocast: bool, path: Path) -> States:
    """Map the states of all examples from a file, computed first where it is missing; it is never half written.

    Raises ConfigError where it cannot be written.
    """
    if workers.any_of(not path.exists(), model.device.type):
        chunks = _chunks(model, examples, autocast)
        if workers.is_first_here():
            _write(chunks, path)
        for _ in chunks:  # a process that does not write has its share to compute
            pass
        workers.wait()
    raw = torch.from_numpy(np.memmap(path, dtype=np.uint8, mode="c"))
    return States(raw.view(model.backbone.dtype).view(-1, model.config.hidden_size), examples)


def _write(chunks: Iterable[Tensor], path: Path) -> None:
    aside = path.with_name(f".{path.name}.{workers.rank()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with aside.open("wb") as file:
            for chunk in chunks:
                file.write(chunk.contiguous().view(torch.uint8).numpy().data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except OSError as error:
        with suppress(OSError):
            aside.unlink()
        raise ConfigError(f"--cache-states disk: cannot write {path}: {error.strerror}") from error


def _chunks(model: TRMForCausalLM, examples: Sequence[Example], autocast: bool) -> Iterator[Tensor]:
    """x (tokens, D) of a few examples at a time, in the order of `by_length`, on the CPU. Processes take turns."""
    order, chunks, start = by_length(examples), 0, 0
    dtype, width, device = model.backbone.dtype, model.config.hidden_size, model.device
    with tqdm(total=len(order), desc="backbone states", unit="problem", leave=False, disable=workers.rank() > 0) as bar:
        while start < len(order):
            end = start + 1
            while end < len(order) and (end + 1 - start) * len(examples[order[end]].ids) <= CHUNK_TOKENS:
                end += 1
            rows = [examples[i] for i in order[start:end]]
            turn = chunks % workers.count()
            if turn == workers.rank():
                with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=autocast):
                    padded, _ = encode(model, collate(rows, 0).to(device))
                x = torch.cat([padded[row, : len(e.ids)] for row, e in enumerate(rows)]).to(dtype)
            else:
                x = torch.empty(sum(len(e.ids) for e in rows), width, dtype=dtype, device=device)
            yield workers.from_rank(turn, x).cpu()
            bar.update(len(rows))
            start, chunks = end, chunks + 1


def _existing(directory: Path) -> Path:
    """The directory, or the nearest one above it that is there."""
    return next(path for path in (directory, *directory.absolute().parents) if path.is_dir())
