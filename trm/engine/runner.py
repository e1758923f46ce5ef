"""Run the model for many rows at once: the only part of the engine that touches the model.

Owns the preallocated key/value slots and the recursion state (x, y, z) of every slot. Knows slots, whose decoder works
in each, tokens, positions and steps; knows no requests. All decoders share the backbone and its calls. A failing call
raises whatever torch raises and leaves the slots of other rows as they were. All positions of a call lie one behind the
other, N of them, whatever rows they belong to and however many each has; only attention looks at rows.

Where a GPU is to replay a call, its shapes must not depend on who decodes: see `trm.engine.static`.

Legend: N positions of a call, B rows, C positions of each, W positions in view, D hidden, K key/value heads,
d head size, V vocabulary.
"""

import logging
import time
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from itertools import accumulate
from typing import Any, NamedTuple, Self, TypeVar

import torch
from torch import Tensor

from trm.device import upload, wait_for
from trm.engine.drafting import Costs
from trm.engine.request import SamplingParams
from trm.engine.sampling import Answer, Ask, choose
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


class Halted:
    """Which positions of each row of a tick have halted by now. To read it is to wait for the device."""

    def __init__(self, read: Callable[[], list[bool]], lengths: Sequence[int]) -> None:
        self._read = read
        self._ends = list(accumulate(lengths))
        self._lengths = lengths

    def of(self, row: int) -> list[bool]:
        """The positions of one row, in the order of the tick's spans."""
        end = self._ends[row]
        return self._flat[end - self._lengths[row] : end]

    @cached_property
    def _flat(self) -> list[bool]:
        return self._read()


class Runner:
    """Model, slots and recursion state. `entries`: of the cache, for the recursion.

    `exact`: whether a row's numbers are the same to the bit in any company. A slot is the model's own unless `seat`
    gives it to another decoder on the same backbone.
    """

    spare = 0  # slots beside those of the rows
    late = False  # whether who has halted is better read after the next tick has begun

    def __init__(
        self, model: TRMForCausalLM, num_slots: int, max_len: int, entries: int, max_draft_tokens: int = 0
    ) -> None:
        self.model = model
        self.exact = model.exact
        self._models = [model] * num_slots  # whose decoder works in each slot
        config, backbone = model.config, model.config.backbone_config
        self.device = model.device
        self.max_len = max_len
        num_slots += self.spare
        sizes = num_slots, backbone.num_key_value_heads, self.width(model, max_len), config.head_dim
        self.backbone_slots = Slots(backbone.num_hidden_layers, *sizes, model.backbone.dtype, self.device)
        self.slots = Slots(entries, *sizes, model.decoder.dtype, self.device)
        shape = num_slots, 1 + max_draft_tokens
        with torch.inference_mode():
            self.rope = model.backbone.rope(torch.arange(max_len, device=self.device))  # each (max_len, d)
        wide = self.rope[0].dtype
        self.state = torch.zeros(3, *shape, config.hidden_size, dtype=wide, device=self.device)  # x, y, z
        self.halted = torch.zeros(shape, dtype=torch.bool, device=self.device)
        self._seats = self.state.flatten(1, 2)  # the same: place p of slot s is seat s * (places of a slot) + p
        self._stopped = self.halted.flatten()
        # of each decoder's latest tick
        self._last: dict[TRMForCausalLM, tuple[tuple[Span, ...], Where, Tensor, SlotView]] = {}

    def prepare(self) -> None:
        """Get ready for the first request."""

    @classmethod
    def width(cls, model: TRMForCausalLM, max_len: int) -> int:
        """Positions of a slot that holds `max_len`: exact attention looks at whole blocks of them."""
        return rounded(max_len) if model.exact else max_len

    @staticmethod
    def bytes_per_position(model: TRMForCausalLM, entries: int) -> int:
        """Cache bytes that one position of one slot takes, with so many entries for the recursion."""
        config, backbone = model.config, model.config.backbone_config
        per_entry = 2 * backbone.num_key_value_heads * config.head_dim
        recursion = entries * model.decoder.dtype.itemsize
        return int(per_entry * (backbone.num_hidden_layers * model.backbone.dtype.itemsize + recursion))

    def seat(self, slot: int, model: TRMForCausalLM) -> None:
        """From now on a slot is worked on by the decoder and head of `model`, which stands on the same backbone."""
        self._models[slot] = model

    def leave(self, slot: int) -> None:
        """The slot is free: nothing of its decoder is held on to."""
        self._last.pop(self._models[slot], None)
        self._models[slot] = self.model

    @torch.inference_mode()
    def encode(self, chunks: Sequence[Chunk]) -> None:
        """Pass tokens of any rows through the backbone, parts of prompts and tokens to think about together.

        Their keys and values are stored. What comes out at a token with a place is its answer of step 0.
        """
        spans = [Span(chunk.slot, chunk.start, len(chunk.tokens)) for chunk in chunks]
        where = self._where(spans)
        ids = upload([token for chunk in chunks for token in chunk.tokens], self.device)
        x = self._encode(ids, where, spans)  # (N, D)
        self._last.clear()  # keys that were gathered are out of date
        ends = list(accumulate(span.length for span in spans))
        thinking = [row for row, chunk in enumerate(chunks) if chunk.place is not None]
        if thinking:
            seats = [self._seat(chunks[row].slot, chunks[row].place or 0) for row in thinking]
            at, last = upload([seats, [ends[row] - 1 for row in thinking]], self.device)
            self._sit_down(at, x[last])
        parts: dict[tuple[TRMForCausalLM, int], list[int]] = {}  # of prompts, by decoder and depth
        for row, chunk in enumerate(chunks):
            model = self._models[chunk.slot]
            if chunk.place is None and model.config.kv_source == "state":
                parts.setdefault((model, chunk.steps), []).append(row)
        for (model, depth), rows in parts.items():
            of_rows = torch.cat([x[ends[row] - spans[row].length : ends[row]] for row in rows])
            self._think(model, of_rows, self._where([spans[row] for row in rows]), depth)

    @torch.inference_mode()
    def tick(
        self, spans: Sequence[Span], steps: Sequence[int], halting: Sequence[Halting] | None = None
    ) -> Halted | None:
        """One supervision step for rows at any step: row b works on `spans[b]`, doing step `steps[b]` (from 0).

        All are rows of one decoder.

        With `halting`, one for each row, positions that have halted keep their answer; returns which have.
        """
        model = self._models[spans[0].slot]
        where, seats, view = self._prepared(model, spans, steps)
        lengths = [span.length for span in spans]
        begun = None if all(steps) else upload(_spread([step > 0 for step in steps], lengths), self.device)
        limits = watched = None
        if halting is not None:
            spread = _spread(halting, lengths)
            limits = upload(spread, self.device)
            watching = [at for at, limit in enumerate(spread) if limit.tolerance > 0]
            watched = upload(watching, self.device) if watching else None
        now = self._advance(model, where, view, seats, begun, limits, watched)
        return None if now is None else Halted(now.tolist, lengths)

    @torch.inference_mode()
    def logits(self, slots: Sequence[int], places: Sequence[int] | None = None) -> Tensor:
        """Logits (M, V) of answer states as they are: of M slots, each at a place, the chosen token's unless told.

        They stand until it is called again.
        """
        seats = [self._seat(slot, place) for slot, place in zip(slots, places or [0] * len(slots), strict=True)]
        by_head: dict[Any, list[int]] = {}
        for index, slot in enumerate(slots):
            by_head.setdefault(self._models[slot].head, []).append(index)
        parts = [self._readout(self._models[slots[some[0]]], [seats[i] for i in some]) for some in by_head.values()]
        if len(parts) == 1:
            return parts[0]
        order = [index for some in by_head.values() for index in some]
        return torch.cat(parts)[upload(order, self.device).argsort()]

    @torch.inference_mode()
    def choose(
        self,
        slots: Sequence[int],
        places: Sequence[int],
        asks: Sequence[Ask],
        ahead: Sequence[int | None] | None = None,
    ) -> list[Answer]:
        """The next token of answer states, each as it is asked for; see `logits`.

        ahead: where each token will lie that `encode` will most likely be given as the next of its slot, at place 0.
        """
        return choose(self.logits(slots, places), asks)

    @torch.inference_mode()
    def copy(self, source: int, target: int, length: int, entries: int) -> None:
        """Copy the first positions of a slot to another, of the recursion's tables only so many entries."""
        for table in self._tables(entries):
            table[:, target, :, :length] = table[:, source, :, :length]

    @torch.inference_mode()
    def finite(self, slot: int, length: int, entries: int) -> bool:
        """Whether the keys and values of a slot's first positions are finite, in so many of the recursion's entries."""
        return all(bool(table[:, slot, :, :length].isfinite().all()) for table in self._tables(entries))

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

        Uses the slots. One slot has no company.
        """
        slots = range(min(CHECKED_SLOTS, len(self._models)))
        lengths = [max(1, min(3 + 2 * slot, self.max_len - 1)) for slot in slots]
        vocabulary = self.model.config.vocab_size
        prompts = [Chunk(slot, 0, [place % vocabulary for place in range(lengths[slot])]) for slot in slots]
        tokens = [Chunk(slot, lengths[slot], (slot % vocabulary,), place=0) for slot in slots]

        def decode(rows: slice) -> Tensor:  # the last row's, which has another place among the others
            self.encode(prompts[rows])
            self.encode(tokens[rows])
            some = tokens[rows]
            self.tick([Span(chunk.slot, chunk.start) for chunk in some], [0] * len(some))
            return self.logits(slots[-1:]).clone()

        if self.exact and not torch.equal(decode(slice(-1, None)), decode(slice(None))):
            self.exact = False
            logger.warning("products of this processor depend on their company here: replies may differ in near ties")
        return self.exact

    @torch.inference_mode()
    def measure(self) -> Costs:
        """Time backbone, step and head over a few positions of the first slot."""
        sizes = sorted({min(count, self.max_len - 1) for count in COST_POSITIONS})
        backbone_s, step_s, head_s = [], [], []
        for count in sizes:
            backbone, step, head = self._trial(count)
            backbone_s.append(_fastest(backbone, self.device))
            step_s.append(_fastest(step, self.device))
            head_s.append(_fastest(head, self.device))
        return Costs(sizes, backbone_s, step_s, head_s)

    def _trial(self, count: int) -> tuple[Callable[[], object], Callable[[], object], Callable[[], object]]:
        """Calls of backbone, step and head over the first positions of the first slot."""
        where = self._where([Span(0, 0, count)])
        ids = torch.zeros(count, dtype=torch.long, device=self.device)
        x = self._encode(ids, where, [Span(0, 0, count)])
        view = self._view(self.model, where, [0], [count])
        return (
            partial(self._encode, ids, where, [Span(0, 0, count)]),
            partial(self.model.decoder.step, x, x, x, self._rope(where), view),
            partial(self.model.readout, x),
        )

    def _tables(self, entries: int | None = None) -> list[Tensor]:
        """All tables of keys and values, of the recursion's only so many."""
        backbone, own = self.backbone_slots, self.slots
        return [backbone.keys, backbone.values, own.keys[:entries], own.values[:entries]]

    def _where(self, spans: Sequence[Span]) -> Where:
        return locate(spans, self.exact, self.backbone_slots.keys.dtype, self.device)

    def _seat(self, slot: int, place: int) -> int:
        """Where x, y and z of a slot's place lie in the state."""
        return slot * self.state.shape[2] + place

    def _sit_down(self, seats: Tensor, answers: Tensor) -> None:
        """Begin to think: `answers` (N, D) are x, and the answers of step 0."""
        self._seats[0, seats] = answers
        self._seats[1, seats] = answers
        self._seats[2].index_fill_(0, seats, 0)
        self._stopped.index_fill_(0, seats, False)

    def _advance(
        self,
        model: TRMForCausalLM,
        where: Where,
        view: SlotView,
        seats: Tensor,
        begun: Tensor | None,
        limits: Tensor | None,
        watched: Tensor | slice | None,
    ) -> Tensor | None:
        """One supervision step of the N positions in `seats`; see `tick`.

        begun: (N,), whether each has done a step before, None for all. limits: (N, 2), of those who may halt.
        watched: of which positions the probabilities are compared, None for none. Returns who has halted by now, (N,).
        """
        x, y, z = self._seats[:, seats]  # each (N, D)
        # what stands there before the first step is the answer of step 0; the recursion starts from zero
        start = y if begun is None else y.masked_fill(~begun[:, None], 0)
        new_y, new_z = model.decoder.step(x, start, z, self._rope(where), view)
        now = None
        if limits is not None:
            before = self._stopped[seats]
            new_y = torch.where(before[:, None], y, new_y)
            now = before | self._halts(model, y, new_y, limits, watched)
            self._stopped[seats] = now
        self._seats[1, seats] = new_y
        self._seats[2, seats] = new_z
        return now

    def _readout(self, model: TRMForCausalLM, seats: Sequence[int]) -> Tensor:
        """Logits (M, V) of the answers in `seats`."""
        return model.readout(self._seats[1, upload(seats, self.device)])

    def _rope(self, where: Where) -> Rope:
        return self.rope[0][where.positions], self.rope[1][where.positions]

    def _encode(self, ids: Tensor, where: Where, spans: Sequence[Span]) -> Tensor:
        """Backbone pass over the token ids (N,) of `spans`; returns x (N, D).

        Each decoder whose keys come from the context stores those of its rows.
        """
        rope = self._rope(where)
        embedded = self.model.backbone.embed_tokens(ids)
        of_spans = [self._models[span.slot] for span in spans]
        models = list(dict.fromkeys(of_spans))
        layers = sorted({layer for model in models for layer in model.config.state_layers})
        states = self.model.encode(embedded, rope, SlotView(self.backbone_slots, where), layers)  # (N, C, D)
        for model in models:
            if model.config.kv_source != "context":
                continue
            place, mine = where, states
            if len(models) > 1:
                owners = _spread(of_spans, [span.length for span in spans])
                own = upload([i for i, owner in enumerate(owners) if owner is model], self.device)
                place, mine = Where(where.slots[own], where.positions[own], ()), states[own]
            self._write_context(model, mine, layers, place)
        return states[:, -1]

    def _write_context(self, model: TRMForCausalLM, states: Tensor, layers: Sequence[int], where: Where) -> None:
        """Let a decoder store keys and values from states (N, C, D) after `layers`, of which it may read but some."""
        if layers != model.config.state_layers:
            states = torch.stack([states[:, layers.index(layer)] for layer in model.config.state_layers], dim=1)
        model.decoder.write_context(states, self._rope(where), SlotView(self.slots, where))

    def _think(self, model: TRMForCausalLM, x: Tensor, where: Where, depth: int) -> None:
        """The recursion over parts of prompts, x (N, D): its keys and values of the first `depth` steps are stored."""
        y = z = torch.zeros_like(x)
        for step in range(depth):
            view = self._view(model, where, [step], [len(x)])
            y, z = model.decoder.step(x, y, z, self._rope(where), view)

    def _halts(
        self, model: TRMForCausalLM, before: Tensor, after: Tensor, limits: Tensor, watched: Tensor | slice | None
    ) -> Tensor:
        """Which answers (N, D) stop thinking now, by the limits (N, 2) of their rows: (N,) bool."""
        thresholds, tolerances = limits.unbind(1)
        halts = model.decoder.halt_logits(after).float().sigmoid() > thresholds
        if watched is not None:
            halts[watched] |= model.moved(before[watched], after[watched]) < tolerances[watched]
        return halts

    def _view(self, model: TRMForCausalLM, where: Where, steps: Sequence[int], lengths: Sequence[int]) -> SlotView:
        """What the recursion sees: each row its own slot, and with keys from the state its own step's entries."""
        if model.config.kv_source == "context":
            return SlotView(self.slots, where, keep=True)
        first: int | Tensor = model.config.cache_entries(steps[0])
        if len(set(steps)) > 1:
            first = upload(_spread(steps, lengths), self.device) * model.config.cache_entries(1)
        return SlotView(self.slots, where, first)

    def _prepared(
        self, model: TRMForCausalLM, spans: Sequence[Span], steps: Sequence[int]
    ) -> tuple[Where, Tensor, SlotView]:
        """Where the positions of a tick lie, their seats and what they see.

        The ticks of one token share what does not change.
        """
        key, lengths = tuple(spans), [span.length for span in spans]
        if model not in self._last or self._last[model][0] != key:
            where = self._where(spans)
            seats = [self._seat(span.slot, place) for span in spans for place in range(span.length)]
            self._last[model] = key, where, upload(seats, self.device), self._view(model, where, steps, lengths)
        _, where, at, view = self._last[model]
        if model.config.kv_source == "state":
            view = self._view(model, where, steps, lengths)
        return where, at, view


def _spread(of_rows: Sequence[T], lengths: Sequence[int]) -> list[T]:
    """What each row has, for each of its positions."""
    return [one for one, length in zip(of_rows, lengths, strict=True) for _ in range(length)]


def _fastest(call: Callable[[], object], device: torch.device) -> float:
    """Seconds of the fastest of a few calls."""
    seconds = []
    for _ in range(COST_REPEATS):
        wait_for(device)
        started = time.perf_counter()
        call()
        wait_for(device)
        seconds.append(time.perf_counter() - started)
        if sum(seconds) > COST_ENOUGH_S:
            break
    return min(seconds)
