"""A batch whose rows stand at supervision steps of their own, as the paper's official trainer keeps it.

With detached steps a row needs nothing of its neighbours, so that one which has finished is replaced by a
fresh example while the others go on. Legend: B rows, A positions of a row's recursion, Q of the longest, D hidden.
"""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

EXPLORATION = 0.1  # share of the rows that a step makes think on, whatever their halting head says (official: 0.1)


@dataclass
class Row:
    """One example on its way: supervision steps done, steps after which it leaves, its states (A, D)."""

    index: int
    done: int
    limit: int
    y: Tensor
    z: Tensor


class MixedRows:
    """The rows at hand. The first ones leave after 1, 2, … `n_supervision` steps, which spreads the depths."""

    def __init__(self, num_rows: int, n_supervision: int) -> None:
        self.n_supervision = n_supervision
        self.taken = 0  # examples so far, in the order of the epochs
        self.rows: list[Row | None] = [None] * num_rows

    def fill(self, example: Callable[[int], int], fresh: Callable[[int], Tensor]) -> list[Row]:
        """All rows, finished ones replaced: `example(n)` is the n-th of the run, `fresh(index)` its first state."""
        for slot, row in enumerate(self.rows):
            if row is None or row.done >= row.limit:
                index = example(self.taken)
                limit = self.n_supervision if row else slot % self.n_supervision + 1
                self.rows[slot] = Row(index, 0, limit, fresh(index), fresh(index))
                self.taken += 1
        return self._filled()

    def carry(self, width: int) -> tuple[Tensor, Tensor]:
        """States y and z of all rows, (B, width, D) each, zero behind a row's own positions."""
        states = [[F.pad(state, (0, 0, 0, width - len(state))) for state in (row.y, row.z)] for row in self._filled()]
        y, z = (torch.stack(part) for part in zip(*states, strict=True))
        return y, z

    def advance(self, y: Tensor, z: Tensor, confident: Sequence[bool], rng: random.Random) -> None:
        """Take the states (B, Q, D) after a step. A row that is confident leaves now, unless it is made to explore."""
        for slot, row in enumerate(self._filled()):
            row.y, row.z = y[slot, : len(row.y)], z[slot, : len(row.z)]
            row.done += 1
            least = rng.randint(2, max(2, self.n_supervision)) if rng.random() < EXPLORATION else 1
            if confident[slot] and row.done >= least:
                row.limit = row.done

    def tensors(self) -> dict[str, Tensor]:
        """Everything that `restore` needs, by name."""
        rows = self._filled()
        counts = torch.tensor([[row.index, row.done, row.limit] for row in rows]).reshape(-1, 3)
        states = {f"row.{n}.{name}": getattr(row, name) for n, row in enumerate(rows) for name in "yz"}
        return {"rows": counts, "rows.taken": torch.tensor(self.taken), **states}

    def restore(self, tensors: Mapping[str, Tensor], device: str) -> None:
        """Put back what `tensors` gave."""
        self.taken = int(tensors["rows.taken"])
        for slot, (index, done, limit) in enumerate(tensors["rows"].tolist()):
            y, z = (tensors[f"row.{slot}.{name}"].to(device) for name in "yz")
            self.rows[slot] = Row(index, done, limit, y, z)

    def _filled(self) -> list[Row]:
        return [row for row in self.rows if row]
