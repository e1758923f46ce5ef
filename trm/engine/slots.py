"""Keys and values of many rows, in slots, and what attention sees of them in one call.

All positions of a call lie one behind the other, whatever rows they belong to and however many each has: only here
are they told apart. In exact mode a row's keys are added up in an order that its own width decides, so that its
neighbours change no bit: rows share a call of attention where their widths, rounded up, are the same, and the
positions of one row attend one by one, as they do when they are decoded.

Legend: N positions of a call, B rows, C positions of each, W positions in view, H heads, K key/value heads,
d head size.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby
from typing import NamedTuple

import torch
from torch import Tensor

from trm.device import upload
from trm.layers import KeyValue, attend

WIDTH = 64  # in exact mode a row looks at so many positions, or a multiple


class Span(NamedTuple):
    """Consecutive positions of one slot."""

    slot: int
    start: int
    length: int = 1


class Slots:
    """Preallocated keys and values: `entries` tables of (slots, K, max_len, d), born as zeros."""

    def __init__(
        self,
        entries: int,
        slots: int,
        num_key_value_heads: int,
        max_len: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        shape = (entries, slots, num_key_value_heads, max_len, head_dim)
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros_like(self.keys)

    def write(self, entry: int | Tensor, where: "Where", keys: Tensor, values: Tensor) -> None:
        """Store keys and values (N, K, d). `entry`: one for all positions, or (N,)."""
        self.keys[entry, where.slots, :, where.positions] = keys.to(self.keys.dtype)
        self.values[entry, where.slots, :, where.positions] = values.to(self.values.dtype)

    def read(self, entry: int | Tensor, where: "Where", group: "Group") -> KeyValue:
        """Keys and values of the positions in a group's view, each (B, K, W, d). `entry`: one for all, or (N,)."""
        if isinstance(entry, Tensor):
            firsts = torch.stack((entry, where.slots))[:, group.positions].view(2, *group.shape)[..., 0]  # (2, B)
            return self.keys[*firsts, :, : group.width], self.values[*firsts, :, : group.width]
        return self.keys[entry, group.slots, :, : group.width], self.values[entry, group.slots, :, : group.width]


@dataclass(frozen=True)
class Group:
    """Positions of a call that attention handles together: B rows of C positions that look at W positions of theirs."""

    positions: slice | Tensor  # which of the N, row by row
    shape: tuple[int, int]  # B, C
    slots: slice | Tensor  # of the rows; a slice, which reads without copying, where they are neighbours
    width: int  # W
    mask: Tensor  # (B, 1, C, W), additive
    alone: bool  # one row, whose positions attend one by one, each as if it were the only one

    def attend(self, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Attention of queries (N', H, d), the group's, over keys and values (B, K, W, d): (N', H, d)."""
        mask = self.mask.to(queries.dtype)
        if self.alone:
            each = (self.shape[1], -1, -1, -1)
            return attend(queries.unsqueeze(2), keys.expand(each), values.expand(each), mask).squeeze(2)
        out = attend(queries.unflatten(0, self.shape).transpose(1, 2), keys, values, mask)
        return out.transpose(1, 2).flatten(0, 1)


@dataclass(frozen=True)
class Where:
    """Where the N positions of a call lie, and what attention makes of them."""

    slots: Tensor  # (N,)
    positions: Tensor  # (N,)
    groups: Sequence[Group]


class SlotView:
    """The `KeyValues` of one call over slots. Entry 0 lies in entry `first`: one number for all positions, or (N,).

    `keep`: what was read is read again, unless it is written meanwhile; gathering it is then done once.
    """

    def __init__(self, slots: Slots, where: Where, first: int | Tensor = 0, keep: bool = False) -> None:
        self._slots = slots
        self._where = where
        self._first = first
        self._kept: dict[int, list[KeyValue]] | None = {} if keep else None

    def write(self, entry: int, keys: Tensor, values: Tensor) -> None:
        """Store keys and values (N, K, d)."""
        self._slots.write(self._first + entry, self._where, keys, values)

    def attend(self, entry: int, queries: Tensor) -> Tensor:
        """What queries (N, H, d) read from an entry: (N, H, d)."""
        groups = self._where.groups
        queries = queries.to(self._slots.keys.dtype)
        key_values = self._read(entry)
        if len(groups) == 1:
            return groups[0].attend(queries, *key_values[0])
        out = torch.empty_like(queries)
        for group, (keys, values) in zip(groups, key_values, strict=True):
            out[group.positions] = group.attend(queries[group.positions], keys, values)
        return out

    def _read(self, entry: int) -> list[KeyValue]:
        if self._kept is not None and entry in self._kept:
            return self._kept[entry]
        found = [self._slots.read(self._first + entry, self._where, group) for group in self._where.groups]
        if self._kept is not None:
            self._kept[entry] = found
        return found


def locate(spans: Sequence[Span], exact: bool, dtype: torch.dtype, device: torch.device) -> Where:
    """Where the positions of `spans` lie, one span behind the other; masks are of type `dtype`."""
    table = upload(spans, device)  # (B, 3)
    slots, starts, lengths = table.unbind(1)
    total = sum(span.length for span in spans)
    begins = starts - (lengths.cumsum(0) - lengths)  # less what lies before each span
    slots, begins = (part.repeat_interleave(lengths, output_size=total) for part in (slots, begins))
    positions = begins + torch.arange(total, device=device)
    plan = _exact_plan(spans) if exact else _plan(spans)

    def group(part: "_Part") -> Group:
        which = positions[part.positions]
        hidden = torch.arange(part.width, device=device) > which[:, None]  # (B C, W)
        mask = torch.zeros(hidden.shape, dtype=dtype, device=device).masked_fill_(hidden, -torch.inf)
        rows = len(part.slots)
        shape = rows, len(which) // rows
        mask = mask[:, None, None] if part.alone else mask.view(*shape, 1, part.width).transpose(1, 2)
        return Group(
            part.positions if isinstance(part.positions, slice) else upload(part.positions, device),
            shape,
            _neighbours(part.slots, device),
            part.width,
            mask,
            part.alone,
        )

    return Where(slots, positions, [group(part) for part in plan])


class _Part(NamedTuple):
    """A group to be: which of the N positions, of which slots, how many positions in view."""

    positions: slice | list[int]
    slots: list[int]
    width: int
    alone: bool = False


def _plan(spans: Sequence[Span]) -> list[_Part]:
    """Rows with equally many positions together, all as wide as the widest of them."""
    parts = []
    firsts = _firsts(spans)
    for length in sorted({span.length for span in spans}):
        rows = [row for row, span in enumerate(spans) if span.length == length]
        positions: slice | list[int] = [first for row in rows for first in range(firsts[row], firsts[row] + length)]
        if rows == list(range(rows[0], rows[-1] + 1)):
            positions = slice(firsts[rows[0]], firsts[rows[-1]] + length)
        width = max(spans[row].start for row in rows) + length
        parts.append(_Part(positions, [spans[row].slot for row in rows], width))
    return parts


def _exact_plan(spans: Sequence[Span]) -> list[_Part]:
    """Single positions of neighbouring slots together where they see equally much, those of one row likewise."""
    parts: list[_Part] = []
    for first, span in zip(_firsts(spans), spans, strict=True):
        widths = [rounded(span.start + offset + 1) for offset in range(span.length)]
        for width, run in groupby(range(span.length), widths.__getitem__):
            some = list(run)
            last = parts[-1] if parts else None
            if (
                span.length == 1
                and last is not None
                and not last.alone
                and (last.slots[-1] + 1, last.width) == (span.slot, width)
            ):
                assert isinstance(last.positions, slice)
                parts[-1] = _Part(slice(last.positions.start, first + 1), [*last.slots, span.slot], width)
            else:
                alone = span.length > 1
                parts.append(_Part(slice(first + some[0], first + some[-1] + 1), [span.slot], width, alone))
    return parts


def rounded(width: int) -> int:
    """So many positions, rounded up to what exact attention looks at."""
    return -(-width // WIDTH) * WIDTH


def _firsts(spans: Sequence[Span]) -> list[int]:
    """Where among the N positions each span begins."""
    return [0, *accumulate(span.length for span in spans)][:-1]


def _neighbours(slots: Sequence[int], device: torch.device) -> slice | Tensor:
    """An index for `slots`: a slice, which reads without copying, where they are consecutive."""
    first = slots[0]
    if list(slots) == list(range(first, first + len(slots))):
        return slice(first, first + len(slots))
    return upload(slots, device)
