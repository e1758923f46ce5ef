"""Run the model for many rows at once: the only part of the engine that touches the model.

Owns the preallocated key/value slots and the recursion state (x, y, z) of every slot. Knows slots, tokens, positions
and steps; knows no requests. A failing call raises whatever torch raises and leaves the slots of other rows as they
were. All positions of a call lie one behind the other, N of them, whatever rows they belong to and however many each
has; only attention looks at rows.

Legend: N positions of a call, B rows, C positions of each, W positions in view, D hidden, K key/value heads,
d head size, V vocabulary.
"""

import logging
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import accumulate
from typing import NamedTuple, Self, TypeVar

import torch
from torch import Tensor

from trm.engine.drafting import Costs
from trm.engine.request import SamplingParams
from trm.engine.slots import Slots, SlotView, Span, Where, locate, rounded
from trm.errors import DeviceError
from trm.layers import Rope
from trm.model import TRMForCausalLM

logger = logging.getLogger(__name__)

CHECKED_SLOTS = 5  # that keep each other company in `check_exact`
COST_POSITIONS = (1, 8, 64)  # sizes of the calls that are timed to decide about drafting
COST_REPEATS = 5
COST_ENOUGH_S = 0.3  # of one size and kind of call; a large model is timed once

T = TypeVar("T")


class Chunk(NamedTuple):
    """Tokens of one slot for the backbone, from position `start` on.

    place: of a token that is to be thought about, which of its row's places it takes: 0 for the chosen one, then
    those of the draft. None for a part of a prompt; over that the recursion runs to depth `steps`, if its keys come
    from the state.
    """

    slot: int
    start: int
    tokens: Sequence[int]
    place: int | None = None
    steps: int = 0


class Halting(NamedTuple):
    """When a row's positions stop thinking: never, unless told. See SamplingParams."""

    threshold: float = 1.0
    tolerance: float = 0.0

    @classmethod
    def of(cls, params: SamplingParams) -> Self:
        """The limits of a request, those that it leaves out never reached."""
        never = cls()
        return cls(params.halt_threshold or never.threshold, params.halt_tolerance or never.tolerance)


class Runner:
    """Model, slots and recursion state. `max_steps` bounds the effort where it costs cache.

    `exact`: whether a row's numbers are the same to the bit in any company.
    """

    def __init__(
        self, model: TRMForCausalLM, num_slots: int, max_len: int, max_steps: int, max_draft_tokens: int = 0
    ) -> None:
        self.model = model
        self.exact = model.exact
        config, backbone = model.config, model.config.backbone_config
        self.device = model.device
        self.max_len = max_len
        sizes = num_slots, backbone.num_key_value_heads, self.width(model, max_len), config.head_dim
        self.backbone_slots = Slots(backbone.num_hidden_layers, *sizes, model.backbone.dtype, self.device)
        self.slots = Slots(config.cache_entries(max_steps), *sizes, model.decoder.dtype, self.device)
        shape = num_slots, 1 + max_draft_tokens
        with torch.inference_mode():
            self.rope = model.backbone.rope(torch.arange(max_len, device=self.device))  # each (max_len, d)
        wide = self.rope[0].dtype
        self.state = torch.zeros(3, *shape, config.hidden_size, dtype=wide, device=self.device)  # x, y, z
        self.halted = torch.zeros(shape, dtype=torch.bool, device=self.device)
        self.entries_per_step = config.calls_per_step * config.n_layers
        self._last: tuple[tuple[Span, ...], Where, SlotView] | None = None

    @staticmethod
    def width(model: TRMForCausalLM, max_len: int) -> int:
        """Positions of a slot that holds `max_len`: exact attention looks at whole blocks of them."""
        return rounded(max_len) if model.exact else max_len

    @staticmethod
    def bytes_per_position(model: TRMForCausalLM, max_steps: int) -> int:
        """Cache bytes that one position of one slot takes."""
        config, backbone = model.config, model.config.backbone_config
        per_entry = 2 * backbone.num_key_value_heads * config.head_dim
        recursion = config.cache_entries(max_steps) * model.decoder.dtype.itemsize
        return int(per_entry * (backbone.num_hidden_layers * model.backbone.dtype.itemsize + recursion))

    @torch.inference_mode()
    def encode(self, chunks: Sequence[Chunk]) -> None:
        """Pass tokens of any rows through the backbone, parts of prompts and tokens to think about together.

        Their keys and values are stored. What comes out at a token with a place is its answer of step 0.
        """
        spans = [Span(chunk.slot, chunk.start, len(chunk.tokens)) for chunk in chunks]
        where = self._where(spans)
        ids = torch.tensor([token for chunk in chunks for token in chunk.tokens], device=self.device)
        x = self._encode(ids, where)  # (N, D)
        self._last = None  # keys that were gathered are out of date
        ends = list(accumulate(span.length for span in spans))
        thinking = [row for row, chunk in enumerate(chunks) if chunk.place is not None]
        if thinking:
            slots, places = ([getattr(chunks[row], name) for row in thinking] for name in ("slot", "place"))
            at = torch.tensor([slots, places], device=self.device)
            answers = x[torch.tensor([ends[row] - 1 for row in thinking], device=self.device)]
            self.state[0, at[0], at[1]] = answers
            self.state[1, at[0], at[1]] = answers
            self.state[2, at[0], at[1]] = 0
            self.halted[at[0], at[1]] = False
        if self.model.config.kv_source == "state":
            for depth in sorted({chunk.steps for chunk in chunks if chunk.place is None}):
                rows = [row for row, chunk in enumerate(chunks) if chunk.place is None and chunk.steps == depth]
                of_rows = torch.cat([x[ends[row] - spans[row].length : ends[row]] for row in rows])
                self._think(of_rows, self._where([spans[row] for row in rows]), depth)

    @torch.inference_mode()
    def tick(
        self, spans: Sequence[Span], steps: Sequence[int], halting: Sequence[Halting] | None = None
    ) -> list[list[bool]]:
        """One supervision step for rows at any step: row b works on `spans[b]`, doing step `steps[b]` (from 0).

        With `halting`, one for each row, positions that have halted keep their answer; returns for each
        row and position whether it has, or nothing without.
        """
        where, view = self._prepared(spans, steps)
        lengths = [span.length for span in spans]
        places = torch.tensor([place for length in lengths for place in range(length)], device=self.device)
        x, y, z = self.state[:, where.slots, places]  # each (N, D)
        start = y  # what stands there before the first step is the answer of step 0; the recursion starts from zero
        if not all(steps):
            begun = torch.tensor(_spread([step > 0 for step in steps], lengths), device=self.device)
            start = torch.where(begun[:, None], y, 0)
        new_y, new_z = self.model.decoder.step(x, start, z, self._rope(where), view)
        halted: list[list[bool]] = []
        if halting is not None:
            before = self.halted[where.slots, places]
            new_y = torch.where(before[:, None], y, new_y)
            now = before | self._halts(y, new_y, _spread(halting, lengths))
            self.halted[where.slots, places] = now
            flat, ends = now.tolist(), accumulate(lengths)
            halted = [flat[end - length : end] for end, length in zip(ends, lengths, strict=True)]
        self.state[1, where.slots, places] = new_y
        self.state[2, where.slots, places] = new_z
        return halted

    @torch.inference_mode()
    def logits(self, slots: Sequence[int], places: Sequence[int] | None = None) -> Tensor:
        """Logits (M, V) of answer states as they are: of M slots, each at a place, the chosen token's unless told."""
        at: int | Tensor = 0 if places is None else torch.tensor(places, device=self.device)
        return self.model.readout(self.state[1, torch.tensor(slots, device=self.device), at])

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
    def check_exact(self) -> bool:
        """Decode a token alone and in company: whether not a bit differs. If one does, go on without exactness.

        Slots must be free; they are left clean. One slot has no company.
        """
        slots = range(min(CHECKED_SLOTS, len(self.state[0])))
        lengths = [max(1, min(3 + 2 * slot, self.max_len - 1)) for slot in slots]
        vocabulary = self.model.config.vocab_size
        prompts = [Chunk(slot, 0, [place % vocabulary for place in range(lengths[slot])]) for slot in slots]
        tokens = [Chunk(slot, lengths[slot], (slot % vocabulary,), place=0) for slot in slots]

        def decode(rows: slice) -> Tensor:
            self.encode(prompts[rows])
            self.encode(tokens[rows])
            some = tokens[rows]
            self.tick([Span(chunk.slot, chunk.start) for chunk in some], [0] * len(some))
            return self.logits([0])

        if self.exact and not torch.equal(decode(slice(1)), decode(slice(None))):
            self.exact = False
            logger.warning("products of this processor depend on their company here: replies may differ in near ties")
        for slot in slots:
            self.clear(slot)
        return self.exact

    @torch.inference_mode()
    def measure(self) -> Costs:
        """Time backbone, step and head over a few positions in slots that must be free; they are left clean."""
        sizes = sorted({min(count, self.max_len - 1) for count in COST_POSITIONS})
        backbone_s, step_s, head_s = [], [], []
        for count in sizes:
            where = self._where([Span(0, 0, count)])
            ids = torch.zeros(count, dtype=torch.long, device=self.device)
            x = self._encode(ids, where)
            step = partial(self.model.decoder.step, x, x, x, self._rope(where), self._view(where, [0], [count]))
            backbone_s.append(_fastest(partial(self._encode, ids, where), self.device))
            step_s.append(_fastest(step, self.device))
            head_s.append(_fastest(partial(self.model.readout, x), self.device))
        self.clear(0)
        return Costs(sizes, backbone_s, step_s, head_s)

    def _tables(self, steps: int | None = None) -> list[Tensor]:
        """All tables of keys and values, of the recursion only what `steps` steps use."""
        entries = None if steps is None else self.model.config.cache_entries(steps)
        backbone, own = self.backbone_slots, self.slots
        return [backbone.keys, backbone.values, own.keys[:entries], own.values[:entries]]

    def _where(self, spans: Sequence[Span]) -> Where:
        return locate(spans, self.exact, self.backbone_slots.keys.dtype, self.device)

    def _rope(self, where: Where) -> Rope:
        return self.rope[0][where.positions], self.rope[1][where.positions]

    def _encode(self, ids: Tensor, where: Where) -> Tensor:
        """Backbone pass over token ids (N,); returns x (N, D), and with keys from the context stores them."""
        rope = self._rope(where)
        embedded = self.model.backbone.embed_tokens(ids)
        states = self.model.encode(embedded, rope, SlotView(self.backbone_slots, where))  # (N, C, D)
        if self.model.config.kv_source == "context":
            self.model.decoder.write_context(states, rope, SlotView(self.slots, where))
        return states[:, -1]

    def _think(self, x: Tensor, where: Where, depth: int) -> None:
        """The recursion over parts of prompts, x (N, D): its keys and values of the first `depth` steps are stored."""
        y = z = torch.zeros_like(x)
        for step in range(depth):
            view = SlotView(self.slots, where, step * self.entries_per_step)
            y, z = self.model.decoder.step(x, y, z, self._rope(where), view)

    def _halts(self, before: Tensor, after: Tensor, limits: Sequence[Halting]) -> Tensor:
        """Which answers (N, D) stop thinking now, by the limits of their rows: (N,) bool."""
        thresholds, tolerances = torch.tensor(limits, device=self.device).unbind(1)
        halts = self.model.decoder.halt_logits(after).float().sigmoid() > thresholds
        if watched := [place for place, limit in enumerate(limits) if limit.tolerance > 0]:
            at = torch.tensor(watched, device=self.device)
            halts[at] |= self.model.moved(before[at], after[at]) < tolerances[at]
        return halts

    def _view(self, where: Where, steps: Sequence[int], lengths: Sequence[int]) -> SlotView:
        """What the recursion sees: each row its own slot, and with keys from the state its own step's entries."""
        if self.model.config.kv_source == "context":
            return SlotView(self.slots, where, keep=True)
        first: int | Tensor = steps[0] * self.entries_per_step
        if len(set(steps)) > 1:
            first = torch.tensor(_spread(steps, lengths), device=self.device) * self.entries_per_step
        return SlotView(self.slots, where, first)

    def _prepared(self, spans: Sequence[Span], steps: Sequence[int]) -> tuple[Where, SlotView]:
        """Where the positions of a tick lie and what they see; the ticks of one token share what does not change."""
        key, lengths = tuple(spans), [span.length for span in spans]
        if self._last is None or self._last[0] != key:
            where = self._where(spans)
            self._last = key, where, self._view(where, steps, lengths)
        _, where, view = self._last
        if self.model.config.kv_source == "state":
            view = self._view(where, steps, lengths)
        return where, view


def _spread(of_rows: Sequence[T], lengths: Sequence[int]) -> list[T]:
    """What each row has, for each of its positions."""
    return [one for one, length in zip(of_rows, lengths, strict=True) for _ in range(length)]


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
