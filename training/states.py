"""Backbone states, computed when a batch first needs them, and kept: the backbone is frozen, so that x is the same in
every epoch.

On a CPU each example passes the backbone alone. So its bits depend on nothing else, neither on its
batch nor on where it is kept or by which process it was computed, and a resumed run reads the bits that the
uninterrupted one read. On a GPU the missing examples of a batch pass it together.
Raises ConfigError where the states do not fit where they were asked to lie.
"""

import hashlib
import math
import os
import shutil
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import psutil
import torch
from torch import Tensor

from training import workers
from training.batches import collate
from training.config import CacheStates
from training.loss import encode
from training.problems.data import fingerprint
from trm import checkpoint
from trm.chat import Example
from trm.errors import ConfigError
from trm.model import TRMForCausalLM

FORMAT = 2  # of the files: other numbers are other files
RAM_SHARE = 0.25  # of what is available; beyond it "auto" goes to disk
DISK_SHARE = 0.5  # of what is free; beyond it "auto" keeps nothing


class States:
    """States (T, C, D) of the T tokens of all examples, as far as they were needed; without `store` nothing is kept.

    The store is bytes: the states, and behind them a checksum of each example's, 0 where there are none. In a file
    they may come from other runs, even from killed ones: what its checksum does not fit is missing.
    """

    def __init__(
        self, model: TRMForCausalLM, examples: Sequence[Example], autocast: bool, store: np.ndarray | None = None
    ) -> None:
        self.model, self.examples, self.autocast = model, examples, autocast
        self._known: set[int] = set()  # whose states are there for certain
        ends = np.cumsum([len(example.ids) for example in examples])
        self._spans = [slice(end - len(e.ids), end) for end, e in zip(ends.tolist(), examples, strict=True)]
        self._x = None
        if store is not None:
            size = size_bytes(model, examples)
            raw = torch.from_numpy(store[:size])
            self._x = raw.view(model.backbone.dtype).view(-1, *_shape(model))
            self._checksums = store[size:].view(np.uint32)

    def padded(self, indices: Sequence[int], width: int) -> Tensor:
        """States (B, width, C, D) of the examples at `indices`, zero at padding, in the backbone's type."""
        computed = self._compute([i for i in indices if not self._has(i)])
        shape = len(indices), width, *_shape(self.model)
        x = torch.zeros(shape, dtype=self.model.backbone.dtype, device=self.model.device)
        for row, index in enumerate(indices):
            own = computed[index] if index in computed else self._kept(index)
            x[row, : len(own)] = own
        return x

    def fetch_together(self, indices: Sequence[int]) -> None:
        """Compute what is missing of `indices`, which all processes name: they take turns, and each keeps all."""
        if self._x is None or workers.count() == 1:
            return
        absent = torch.tensor([int(not self._has(i)) for i in indices], device=self.model.device)
        missing = [i for i, number in zip(indices, workers.add(absent).tolist(), strict=True) if number]
        computed = self._compute(missing[workers.rank() :: workers.count()])
        for turn, index in enumerate(missing):
            own = computed[index] if index in computed else self._kept(index).to(self.model.device)
            raw = workers.from_rank(turn % workers.count(), own.contiguous().view(torch.uint8))
            self._keep(index, raw.view(own.dtype))

    def _compute(self, indices: Sequence[int]) -> dict[int, Tensor]:
        """States (S, C, D) of each example, on the device; kept, if anything is."""
        together = len(indices) if self.model.device.type == "cuda" else 1
        computed: dict[int, Tensor] = {}
        for start in range(0, len(indices), together):
            group = indices[start : start + together]
            batch = collate([self.examples[i] for i in group], 0).to(self.model.device)
            with torch.no_grad(), torch.autocast(self.model.device.type, torch.bfloat16, enabled=self.autocast):
                x, _ = encode(self.model, batch)
            computed |= {i: x[row, : len(self.examples[i].ids)] for row, i in enumerate(group)}
        computed = {i: x.to(self.model.backbone.dtype) for i, x in computed.items()}
        for index, x in computed.items():
            self._keep(index, x)
        return computed

    def _keep(self, index: int, x: Tensor) -> None:
        if self._x is None:
            return
        self._kept(index).copy_(x)
        self._checksums[index] = self._checksum(index)
        self._known.add(index)

    def _kept(self, index: int) -> Tensor:
        assert self._x is not None, "nothing is kept"
        return self._x[self._spans[index]]

    def _has(self, index: int) -> bool:
        if self._x is not None and index not in self._known:
            stored = int(self._checksums[index])
            if stored and stored == self._checksum(index):
                self._known.add(index)
        return index in self._known

    def _checksum(self, index: int) -> int:
        return zlib.crc32(self._kept(index).view(torch.uint8).numpy().data)


def size_bytes(model: TRMForCausalLM, examples: Sequence[Example]) -> int:
    """What the states of all examples take, in the backbone's type."""
    return int(sum(len(e.ids) for e in examples) * math.prod(_shape(model)) * model.backbone.dtype.itemsize)


def _shape(model: TRMForCausalLM) -> tuple[int, int]:
    """Of the states of a token: C, D."""
    return len(model.config.state_layers), model.config.hidden_size


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


def keep(states: States, wanted: CacheStates, directory: Path, epochs: float) -> tuple[CacheStates, States]:
    """The place that `choose` says, and states that will be kept there unless it is "off", as where there are none.

    Files go to `directory`, one for the same data, backbone, type and autocast.
    """
    model, examples, autocast = states.model, states.examples, states.autocast
    if not examples:
        return "off", states
    needed = size_bytes(model, examples) + 4 * len(examples)
    data, backbone = fingerprint(examples), checkpoint.fingerprint(model.backbone)
    key = f"{FORMAT}/{data}/{backbone}/{model.config.state_layers}/{model.backbone.dtype}/{autocast}"
    file = directory / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}.states"
    place = workers.agree(choose(wanted, needed, file, epochs))
    if place == "off":
        return place, states
    store = np.zeros(needed, np.uint8) if place == "memory" else _map(file, needed)
    return place, States(model, examples, autocast, store)


def _map(path: Path, size: int) -> np.ndarray:
    """A file of `size` bytes, in memory, shared with whoever else maps it; made, with its room, where it is missing."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab") as file:
            if file.tell() < size:
                if hasattr(os, "posix_fallocate"):  # a disk that is full later would end the process
                    os.posix_fallocate(file.fileno(), 0, size)
                file.truncate(size)
    except OSError as error:
        raise ConfigError(f"--cache-states disk: cannot write {path}: {error.strerror}") from error
    return np.memmap(path, np.uint8, "r+", shape=(size,))


def _existing(directory: Path) -> Path:
    """The directory, or the nearest one above it that is there."""
    return next(path for path in (directory, *directory.absolute().parents) if path.is_dir())
