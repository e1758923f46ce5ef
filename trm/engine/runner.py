"""Run the model for many rows at once: the only part of the engine that touches tensors.

Owns the preallocated key/value slots and the recursion state (x, y, z) of every slot. Knows
slots, tokens, positions and steps; knows no requests. A failing call raises whatever torch
raises; the engine turns that into DeviceError for the rows of the call.

Neighbouring slots are read in place, as a view; only rows that lie apart are gathered, which
costs a copy. Legend: B rows of a call, C positions per row, W cached positions in view, D hidden,
K key/value heads, d head size, V vocabulary.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, Self

import numpy as np
import torch
from torch import Tensor

from trm.engine.drafting import Costs
from trm.engine.request import SamplingParams
from trm.errors import DeviceError
from trm.layers import Attending, KeyValue, signed
from trm.model import TRMForCausalLM

COST_POSITIONS = (1, 8, 64)  # sizes of the calls that are timed to decide about drafting
COST_REPEATS = 5
COST_ENOUGH_S = 0.3  # of one size and kind of call; a large model is timed once


class Span(NamedTuple):
    """Consecutive positions of one slot."""

    slot: int
    start: int
    length: int = 1


class Halting(NamedTuple):
    """When a row's positions stop thinking: never, unless told. See SamplingParams."""

    threshold: float = 1.0
    tolerance: float = 0.0

    @classmethod
    def of(cls, params: SamplingParams) -> Self:
        """The limits of a request, those that it leaves out never reached."""
        never = cls()
        return cls(params.halt_threshold or never.threshold, params.halt_tolerance or never.tolerance)


@dataclass(frozen=True)
class _Place:
    """Where the positions of one call lie. Rows shorter than C are padded; padding is written to a scratch position."""

    slots: slice | Tensor  # for reading: a slice where the slots are neighbours
    rows: Tensor  # (B, 1) slots
    write_at: Tensor  # (B, C)
    positions: Tensor  # (B, C), 0 where padded
    mask: Tensor  # (B, 1, C, W), additive
    count: int  # C
    width: int  # W


class Slots:
    """Preallocated keys and values: `entries` tables of (slots, K, max_len, d), born as zeros."""

    def __init__(
        self, entries: int, slots: int, num_key_value_heads: int, max_len: int, head_dim: int, like: Tensor
    ) -> None:
        shape = (entries, slots, num_key_value_heads, max_len, head_dim)
        self.keys = torch.zeros(shape, dtype=like.dtype, device=like.device)
        self.values = torch.zeros_like(self.keys)

    def write(self, entry: int | Tensor, place: _Place, keys: Tensor, values: Tensor) -> None:
        """Store keys and values (B, K, C, d). `entry`: one for all rows, or (B, 1)."""
        self.keys[entry, place.rows, :, place.write_at] = keys.transpose(1, 2)
        self.values[entry, place.rows, :, place.write_at] = values.transpose(1, 2)

    def read(self, entry: int | Tensor, place: _Place) -> KeyValue:
        """Keys and values of the positions in view, each (B, K, W, d)."""
        if isinstance(entry, Tensor):
            where = entry[:, 0], place.rows[:, 0]
            return self.keys[*where, :, : place.width], self.values[*where, :, : place.width]
        return self.keys[entry, place.slots, :, : place.width], self.values[entry, place.slots, :, : place.width]


class _BackboneView:
    """What the backbone's layers see as their cache during one call."""

    def __init__(self, slots: Slots, place: _Place) -> None:
        self.slots = slots
        self.place = place

    def update(self, keys: Tensor, values: Tensor, layer: int, *args: object, **kwargs: object) -> KeyValue:
        self.slots.write(layer, self.place, keys, values)
        return self.slots.read(layer, self.place)


class Runner:
    """Model, slots and recursion state. `max_steps` bounds the effort where it costs cache."""

    def __init__(
        self, model: TRMForCausalLM, num_slots: int, max_len: int, max_steps: int, max_draft_tokens: int = 0
    ) -> None:
        self.model = model
        config, backbone = model.config, model.config.backbone_config
        weight = model.decoder.halt_head.weight
        embedding: Tensor = model.backbone.model.embed_tokens.weight
        kv_heads = backbone.num_key_value_heads
        self.device = weight.device
        self.scratch = max_len - 1  # where the last token of a reply would lie, which nobody has to read
        sizes = num_slots, kv_heads, max_len, config.head_dim
        self.backbone_slots = Slots(backbone.num_hidden_layers, *sizes, embedding)
        self.slots = Slots(config.cache_entries(max_steps), *sizes, weight)
        shape = num_slots, 1 + max_draft_tokens
        self.state = torch.zeros(3, *shape, config.hidden_size, dtype=weight.dtype, device=self.device)  # x, y, z
        self.halted = torch.zeros(shape, dtype=torch.bool, device=self.device)
        self.entries_per_step = config.calls_per_step * config.n_layers
        with torch.inference_mode():
            positions = torch.arange(max_len, device=self.device)[None]
            cos, sin = signed(*model.backbone.model.rotary_emb(weight, positions))
            self.rope = cos[0], sin[0]
        self._last: tuple[tuple[Span, ...], _Place, Attending | None] | None = None

    @staticmethod
    def bytes_per_position(model: TRMForCausalLM, max_steps: int) -> int:
        """Cache bytes that one position of one slot takes."""
        config, backbone = model.config, model.config.backbone_config
        per_entry = 2 * backbone.num_key_value_heads * config.head_dim
        weight, embedding = model.decoder.halt_head.weight, model.backbone.model.embed_tokens.weight
        recursion = config.cache_entries(max_steps) * weight.element_size()
        return int(per_entry * (backbone.num_hidden_layers * embedding.element_size() + recursion))

    @torch.inference_mode()
    def prefill(self, spans: Sequence[Span], tokens: Sequence[Sequence[int]], steps: Sequence[int]) -> None:
        """Cache prompt tokens. With keys from the state the recursion runs over them too, to each row's own depth."""
        groups = [0] if self.model.config.kv_source == "context" else sorted(set(steps))
        for depth in groups:
            chosen = [i for i, own in enumerate(steps) if own == depth or len(groups) == 1]
            place = self._place([spans[i] for i in chosen])
            x = self._encode(place, [tokens[i] for i in chosen])
            y = z = torch.zeros_like(x)
            for step in range(depth):
                y, z = self.model.decoder.step(x, y, z, self._attending(place, [step] * len(chosen)))

    @torch.inference_mode()
    def feed(self, slots: Sequence[int], positions: Sequence[int], tokens: Sequence[int], offset: int = 0) -> None:
        """Pass one token of each row through the backbone; what comes out is the answer of step 0.

        offset: which of the row's places the token takes, 0 for the chosen one, then those of the draft.
        """
        place = self._place([Span(slot, position) for slot, position in zip(slots, positions, strict=True)])
        x = self._encode(place, [[token] for token in tokens])[:, 0]
        self.state[0, place.slots, offset] = x
        self.state[1, place.slots, offset] = x
        self.state[2, place.slots, offset] = 0
        self.halted[place.slots, offset] = False
        self._last = None  # keys that were gathered are out of date

    @torch.inference_mode()
    def tick(
        self, spans: Sequence[Span], steps: Sequence[int], halting: Sequence[Halting] | None = None
    ) -> list[list[bool]]:
        """One supervision step for rows at any step: row b works on `spans[b]`, doing step `steps[b]` (from 0).

        With `halting`, one for each row, positions that have halted keep their answer; returns for each
        row and position whether it has, or nothing without.
        """
        place, attending = self._prepared(spans, steps)
        x, y, z = self.state[:, place.slots, : place.count]
        begun = [step > 0 for step in steps]
        start = y  # what stands there before the first step is the answer of step 0; the recursion starts from zero
        if not all(begun):
            start = torch.where(torch.tensor(begun, device=self.device)[:, None, None], y, 0)
        new_y, new_z = self.model.decoder.step(x, start, z, attending)
        if halting is not None:
            halted = self.halted[place.slots, : place.count].clone()
            new_y = torch.where(halted[..., None], y, new_y)
            limits = torch.tensor(halting, device=self.device)  # (B, 2)
            halted |= self.model.decoder.halt_logits(new_y).float().sigmoid() > limits[:, :1]
            watched = limits[:, 1] > 0
            if watched.any():
                halted[watched] |= self.model.moved(y[watched], new_y[watched]) < limits[watched, 1:]
            self.halted[place.slots, : place.count] = halted
        self.state[1, place.slots, : place.count] = new_y
        self.state[2, place.slots, : place.count] = new_z
        return [] if halting is None else halted.tolist()

    @torch.inference_mode()
    def logits(self, slots: Sequence[int], first: int = 0, count: int = 1) -> Tensor:
        """Logits (B, count, V) of the answer states as they are, from place `first` on."""
        return self.model.readout(self.state[1, _neighbours(slots, self.device), first : first + count])

    @torch.inference_mode()
    def copy(self, source: int, target: int, length: int, steps: int) -> None:
        """Copy the first positions of a slot to another, for an effort of `steps`."""
        for table in self._tables(steps):
            table[:, target, :, :length] = table[:, source, :, :length]

    @torch.inference_mode()
    def finite(self, slot: int, length: int, steps: int) -> bool:
        """Whether the keys and values of a slot's first positions are finite, as far as an effort of `steps` reads."""
        return all(bool(table[:, slot, :, :length].isfinite().all()) for table in self._tables(steps))

    def clear(self, slot: int, start: int = 0, end: int | None = None) -> None:
        """Zero a slot's positions from `start` to `end`: what is not finite would poison its next row, even masked."""
        for table in self._tables():
            table[:, slot, :, start:end] = 0
        self.state[:, slot] = 0

    def probe(self) -> None:
        """Raise DeviceError unless the device still computes. After some CUDA errors it never does again."""
        try:
            computes = torch.ones(2, device=self.device).sum().item() == 2
        except Exception as error:
            raise DeviceError(f"{self.device} no longer computes: {type(error).__name__}") from error
        if not computes:
            raise DeviceError(f"{self.device} computes wrong sums")

    @torch.inference_mode()
    def measure(self) -> Costs:
        """Time backbone and supervision step over a few positions in slots that must be free; they are left clean."""
        spans = [Span(0, 0, length) for length in sorted({min(c, self.scratch) for c in COST_POSITIONS})]
        backbone_s, step_s = [], []
        for span in spans:
            place = self._place([span])
            x = self._encode(place, [[0] * span.length])
            backbone_s.append(_fastest(partial(self._draft, place, span.length), self.device))
            step_s.append(_fastest(partial(self.model.decoder.step, x, x, x, self._attending(place, [0])), self.device))
        self.clear(0)
        return Costs([span.length for span in spans], backbone_s, step_s)

    def _draft(self, place: _Place, count: int) -> Tensor:
        """What a drafted token costs besides its steps: backbone and head."""
        return self.model.readout(self._encode(place, [[0] * count]))

    def _tables(self, steps: int | None = None) -> list[Tensor]:
        """All tables of keys and values, of the recursion only what `steps` steps use."""
        entries = None if steps is None else self.model.config.cache_entries(steps)
        backbone, own = self.backbone_slots, self.slots
        return [backbone.keys, backbone.values, own.keys[:entries], own.values[:entries]]

    def _encode(self, place: _Place, tokens: Sequence[Sequence[int]]) -> Tensor:
        """Backbone pass; returns x (B, C, D), and with keys from the context stores them."""
        ids = torch.tensor([[*row, *[0] * (place.count - len(row))] for row in tokens], device=self.device)
        mask = place.mask.to(self.backbone_slots.keys.dtype)
        x, rope = self.model.encode(ids, mask, place.positions, _BackboneView(self.backbone_slots, place))
        if self.model.config.kv_source == "context":
            for layer, (keys, values) in enumerate(self.model.decoder.context_keys_values(x, rope)):
                self.slots.write(layer, place, keys, values)
        return x

    def _attending(self, place: _Place, steps: Sequence[int]) -> Attending:
        """What the recursion sees: each row its own slot, and with keys from the state its own step's entries."""
        rope = self.rope[0][place.positions], self.rope[1][place.positions]
        if self.model.config.kv_source == "context":
            layers = range(self.model.config.n_layers)
            return Attending(rope, place.mask, [self.slots.read(layer, place) for layer in layers])
        first: int | Tensor = steps[0] * self.entries_per_step
        if len(set(steps)) > 1:
            first = torch.tensor(steps, device=self.device)[:, None] * self.entries_per_step

        def update(entry: int, keys: Tensor, values: Tensor) -> KeyValue:
            self.slots.write(first + entry, place, keys, values)
            return self.slots.read(first + entry, place)

        return Attending(rope, place.mask, update=update)

    def _prepared(self, spans: Sequence[Span], steps: Sequence[int]) -> tuple[_Place, Attending]:
        """Place and attending of a tick; with keys from the context the ticks of one token share them."""
        key = tuple(spans)
        if self._last is None or self._last[0] != key:
            self._last = key, self._place(spans), None
        _, place, attending = self._last
        if attending is None:
            attending = self._attending(place, steps)
            if self.model.config.kv_source == "context":
                self._last = key, place, attending
        return place, attending

    def _place(self, spans: Sequence[Span]) -> _Place:
        slots, starts, lengths = np.array(spans).T[..., None]  # each (B, 1)
        offsets = np.arange(lengths.max())
        width = int((starts + lengths).max())
        real = offsets < lengths
        positions = np.where(real, starts + offsets, 0)  # padding looks at position 0, so that no softmax is empty
        hidden = torch.from_numpy(np.arange(width) > positions[:, None, :, None])
        device = self.device
        return _Place(
            _neighbours([span.slot for span in spans], device),
            torch.from_numpy(slots).to(device),
            torch.from_numpy(np.where(real, positions, self.scratch)).to(device),
            torch.from_numpy(positions).to(device),
            torch.zeros(hidden.shape, dtype=self.state.dtype).masked_fill_(hidden, -torch.inf).to(device),
            len(offsets),
            width,
        )


def _neighbours(slots: Sequence[int], device: torch.device) -> slice | Tensor:
    """An index for `slots`: a slice, which reads without copying, where they are consecutive."""
    first = slots[0]
    if list(slots) == list(range(first, first + len(slots))):
        return slice(first, first + len(slots))
    return torch.tensor(slots, device=device)


def _fastest(call: Callable[[], object], device: torch.device) -> float:
    """Seconds of the fastest of a few calls."""
    seconds = []
    for _ in range(COST_REPEATS):
        started = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - started)
        if sum(seconds) > COST_ENOUGH_S:
            break
    return min(seconds)
