"""Run the model for many rows at once: the only part of the engine that touches tensors.

Owns the preallocated key/value slots and the recursion state (x, y, z) of every slot. Knows
slots, tokens, positions and steps; knows no requests. A failing call raises whatever torch
raises; the engine turns that into DeviceError for the rows of the call.

Legend: B rows of a call, C tokens per row, W cached positions in view, D hidden, K key/value heads, d head size.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trm.layers import Attending, KeyValue
from trm.model import TRMForCausalLM


@dataclass(frozen=True)
class Chunk:
    """Consecutive tokens of one slot, the first at position `start`."""

    slot: int
    start: int
    tokens: Sequence[int]


class Slots:
    """Preallocated keys and values: `entries` tables of (slots, K, max_len, d), born as zeros."""

    def __init__(
        self, entries: int, slots: int, num_key_value_heads: int, max_len: int, head_dim: int, like: Tensor
    ) -> None:
        shape = (entries, slots, num_key_value_heads, max_len, head_dim)
        self.keys = torch.zeros(shape, dtype=like.dtype, device=like.device)
        self.values = torch.zeros_like(self.keys)

    def write(self, entries: Tensor | int, slots: Tensor, positions: Tensor, keys: Tensor, values: Tensor) -> None:
        """Store keys and values (M, K, d) of M tokens at their entry, slot and position, each (M,)."""
        self.keys[entries, slots, :, positions] = keys
        self.values[entries, slots, :, positions] = values

    def read(self, entries: Tensor | int, slots: Tensor, width: int) -> KeyValue:
        """Keys and values of the first `width` positions of some slots, each (B, K, W, d)."""
        return self.keys[entries, slots, :, :width], self.values[entries, slots, :, :width]

    def clear(self, slot: int) -> None:
        """Make a slot zero again: what is not finite there would poison whoever comes next, even masked."""
        self.keys[:, slot] = 0
        self.values[:, slot] = 0


class _BackboneView:
    """What the backbone's layers see as their cache during one call."""

    def __init__(self, slots: Slots, chunk: "_Padded") -> None:
        self.slots = slots
        self.chunk = chunk

    def update(self, keys: Tensor, values: Tensor, layer: int, *args: object, **kwargs: object) -> KeyValue:
        chunk = self.chunk
        rows, offsets = chunk.real
        self.slots.write(
            layer, chunk.slots[rows], chunk.positions[rows, offsets], keys[rows, :, offsets], values[rows, :, offsets]
        )
        return self.slots.read(layer, chunk.slots, chunk.width)


@dataclass(frozen=True)
class _Padded:
    """Chunks as tensors, padded on the right. `real` lists the (row, offset) of the tokens that are no padding."""

    tokens: Tensor  # (B, C)
    slots: Tensor  # (B,)
    positions: Tensor  # (B, C)
    real: tuple[Tensor, Tensor]
    mask: Tensor  # (B, 1, C, W)
    width: int


class Runner:
    """Model, slots and recursion state. `max_steps` bounds the effort where it costs cache."""

    def __init__(self, model: TRMForCausalLM, num_slots: int, max_len: int, max_steps: int) -> None:
        self.model = model
        config, backbone = model.config, model.config.backbone_config
        weight = model.decoder.halt_head.weight
        embedding: Tensor = model.backbone.model.embed_tokens.weight
        kv_heads = backbone.num_key_value_heads
        self.device = weight.device
        self.backbone_slots = Slots(
            backbone.num_hidden_layers, num_slots, kv_heads, max_len, config.head_dim, embedding
        )
        self.slots = Slots(config.cache_entries(max_steps), num_slots, kv_heads, max_len, config.head_dim, weight)
        self.state = torch.zeros(3, num_slots, config.hidden_size, dtype=weight.dtype, device=weight.device)  # x, y, z
        self.entries_per_step = config.calls_per_step * config.n_layers

    @staticmethod
    def bytes_per_position(model: TRMForCausalLM, max_steps: int) -> int:
        """Cache bytes that one position of one slot takes."""
        config, backbone = model.config, model.config.backbone_config
        per_entry = 2 * backbone.num_key_value_heads * config.head_dim
        weight, embedding = model.decoder.halt_head.weight, model.backbone.model.embed_tokens.weight
        recursion = config.cache_entries(max_steps) * weight.element_size()
        return int(per_entry * (backbone.num_hidden_layers * embedding.element_size() + recursion))

    @torch.inference_mode()
    def prefill(self, chunks: Sequence[Chunk], steps: Sequence[int]) -> None:
        """Cache prompt tokens. With keys from the state the recursion runs over them too, to each row's own depth."""
        if self.model.config.kv_source == "context":
            self._encode(self._pad(chunks))
            return
        for chunk, depth in zip(chunks, steps, strict=True):
            padded = self._pad([chunk])
            x, rope = self._encode(padded)
            y = z = torch.zeros_like(x)
            for step in range(depth):
                y, z = self.model.decoder.step(
                    x, y, z, self._attending(padded, rope, torch.tensor([step], device=self.device))
                )

    @torch.inference_mode()
    def feed(self, chunks: Sequence[Chunk], steps: Sequence[int]) -> None:
        """Pass one token of each row through the backbone and start its recursion; at effort 0 the answer is x."""
        padded = self._pad(chunks)
        x, _ = self._encode(padded)
        no_steps = torch.tensor([depth == 0 for depth in steps], device=self.device)
        self.state[0, padded.slots] = x[:, 0]
        self.state[1, padded.slots] = torch.where(no_steps[:, None], x[:, 0], 0)
        self.state[2, padded.slots] = 0

    @torch.inference_mode()
    def tick(self, slots: Sequence[int], positions: Sequence[int], steps: Sequence[int]) -> None:
        """One supervision step for rows at any step: row b stands at `positions[b]`, doing step `steps[b]` (from 0)."""
        padded = self._pad([Chunk(slot, position, (0,)) for slot, position in zip(slots, positions, strict=True)])
        x, y, z = self.state[:, padded.slots].unsqueeze(2)
        rope = self.model.backbone.model.rotary_emb(x, padded.positions)
        y, z = self.model.decoder.step(x, y, z, self._attending(padded, rope, torch.tensor(steps, device=self.device)))
        self.state[1, padded.slots] = y[:, 0]
        self.state[2, padded.slots] = z[:, 0]

    @torch.inference_mode()
    def logits(self, slots: Sequence[int]) -> Tensor:
        """Logits (B, V) of the answer states as they are."""
        return self.model.readout(self.state[1, torch.tensor(slots, device=self.device)])

    def clear(self, slot: int) -> None:
        """Leave nothing of a failed row behind."""
        self.backbone_slots.clear(slot)
        self.slots.clear(slot)
        self.state[:, slot] = 0

    def _encode(self, padded: _Padded) -> tuple[Tensor, KeyValue]:
        """Backbone pass over a padded call; returns x (B, C, D) and the rope of its positions."""
        view = _BackboneView(self.backbone_slots, padded)
        x, rope = self.model.encode(padded.tokens, padded.mask, padded.positions, view)
        if self.model.config.kv_source == "context":
            rows, offsets = padded.real
            for layer, (keys, values) in enumerate(self.model.decoder.context_keys_values(x, rope)):
                self.slots.write(
                    layer,
                    padded.slots[rows],
                    padded.positions[rows, offsets],
                    keys[rows, :, offsets],
                    values[rows, :, offsets],
                )
        return x, rope

    def _attending(self, padded: _Padded, rope: KeyValue, steps: Tensor) -> Attending:
        """What the recursion sees: each row its own slot, and with keys from the state its own step's entries."""
        if self.model.config.kv_source == "context":
            layers = range(self.model.config.n_layers)
            return Attending(
                rope, padded.mask, [self.slots.read(layer, padded.slots, padded.width) for layer in layers]
            )
        rows, offsets = padded.real

        def update(entry: int, keys: Tensor, values: Tensor) -> KeyValue:
            entries = steps * self.entries_per_step + entry
            self.slots.write(
                entries[rows],
                padded.slots[rows],
                padded.positions[rows, offsets],
                keys[rows, :, offsets],
                values[rows, :, offsets],
            )
            return self.slots.read(entries, padded.slots, padded.width)

        return Attending(rope, padded.mask, update=update)

    def _pad(self, chunks: Sequence[Chunk]) -> _Padded:
        count = max(len(chunk.tokens) for chunk in chunks)
        tokens = torch.tensor([[*chunk.tokens, *[0] * (count - len(chunk.tokens))] for chunk in chunks])
        lengths = torch.tensor([len(chunk.tokens) for chunk in chunks])
        starts = torch.tensor([chunk.start for chunk in chunks])
        positions = starts[:, None] + torch.arange(count)
        width = int((starts + lengths).max())
        real = torch.arange(count) < lengths[:, None]
        # Padding tokens look at position 0, so that no softmax is empty; nothing reads what they give.
        mask = torch.arange(width) <= torch.where(real, positions, 0)[..., None]
        rows, offsets = real.nonzero(as_tuple=True)
        device = self.device
        return _Padded(
            tokens.to(device),
            torch.tensor([chunk.slot for chunk in chunks], device=device),
            positions.to(device),
            (rows.to(device), offsets.to(device)),
            mask[:, None].to(device),
            width,
        )
