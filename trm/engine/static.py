"""The runner whose calls have few shapes, so that a GPU replays each of them by one launch.

Every position that is decoded is a *lane* of its own, with a slot, a position, a step and a token. As many lanes as a
*bucket* has, at a width that is a power of two of what exact attention looks at, are one call; it depends on nothing
but five numbers of each lane. Masks, rotary positions and entries of the cache are made of these on the device. Lanes
that nobody needs work in a spare slot, which nobody reads.

The positions of one row may be cut anywhere into calls that follow each other: each position looks only at itself and
at those before it. Prompts are packed, as in the plain runner: their calls are few and large.

A token that was just chosen passes the backbone before the host knows it, so that the device need not wait for the
host: the lane says in which seat it was chosen. If it turns out not to be wanted, nobody looks at what it left.

Where the model is exact, or there is one bucket only, no bit of a lane depends on its company: its width is its own,
and prompts are lanes, too.

Legend: N lanes of a call, W positions in view, D hidden, C states of each, V vocabulary.
"""

import logging
from array import array
from bisect import bisect_left
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Self, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from trm.device import fetch, send
from trm.engine.graphs import Function, Graphs
from trm.engine.request import SamplingParams
from trm.engine.runner import Chunk, Halted, Halting, Runner
from trm.engine.sampling import Answer, Ask, Numbers, Picker, is_plain, pick, picker
from trm.engine.slots import WIDTH, Group, SlotView, Span, Where, rounded
from trm.model import TRMForCausalLM

logger = logging.getLogger(__name__)

GREEDY = SamplingParams(temperature=0.0)

T = TypeVar("T")


class Lane(NamedTuple):
    """One position of one slot.

    seat: where its x, y and z lie; step: how many it has done; token: its id, or ~s for what was chosen in seat s;
    limits: see `Halting`.
    """

    slot: int
    position: int
    seat: int
    step: int = 0
    token: int = 0
    limits: Halting | None = None


class Piece(NamedTuple):
    """Lanes of one call, some of its bucket's `size`, that look at `width` positions."""

    lanes: Sequence[Lane]
    size: int
    width: int


class Lanes(NamedTuple):
    """The numbers of a call's lanes on the device, (N,) each."""

    slots: Tensor
    positions: Tensor
    seats: Tensor
    steps: Tensor
    tokens: Tensor

    @classmethod
    def of(cls, table: Tensor) -> Self:
        """Those of a table, whose first rows they are."""
        return cls(*table[: len(cls._fields)])

    @classmethod
    def reals(cls, table: Tensor) -> Tensor:
        """The rows below them, as the numbers (R, N) in float64 that `_bits` was given."""
        return table[len(cls._fields) :].view(torch.float64)


class StaticRunner(Runner):
    """A runner of calls of so many lanes as one of `buckets` has, which rise. More lanes are several calls."""

    spare = 1
    late = True

    def __init__(
        self,
        model: TRMForCausalLM,
        num_slots: int,
        max_len: int,
        entries: int,
        max_draft_tokens: int = 0,
        *,
        buckets: Sequence[int],
    ) -> None:
        super().__init__(model, num_slots, max_len, entries, max_draft_tokens)
        self.buckets = buckets
        self.exact = self.exact or len(buckets) == 1  # all calls have one shape, whoever is in them
        self.graphs = Graphs(self.device)
        self._spare = Lane(num_slots, 0, self._seat(num_slots, 0))
        self._chosen = torch.zeros(self._stopped.shape, dtype=torch.int64, device=self.device)  # in each seat
        self._answers = torch.zeros_like(self._seats[1])  # that they were chosen from
        self._layers: set[int] = set()  # that decoders have read so far: their mix changes all the time
        self._ahead: dict[int, tuple[int, int]] = {}  # slots whose next token passed ahead: its position and id

    @torch.inference_mode()
    def prepare(self) -> None:
        """Capture what a short greedy request needs, in every bucket. Slots must be empty, for one is written to.

        Large ones come first, in whose memory small ones find room.
        """
        for size in reversed(self.buckets):
            piece = Piece([Lane(0, 0, self._spare.seat)], size, self._width(1))
            self._feed(piece)
            self._step(self.model, piece)
            self._pick(self.model, picker(GREEDY), [self._spare.seat] * size, [Ask(GREEDY, 0)] * size)
        graphs = self.graphs
        words = "%d calls of the model are prepared, in %.1f s and %d MB; others follow when they are first needed"
        logger.info(words, graphs.count, graphs.seconds, graphs.bytes / 1e6)

    @classmethod
    def width(cls, model: TRMForCausalLM, max_len: int) -> int:
        """Positions of a slot that holds `max_len`: whole blocks, which fast attention asks for."""
        return rounded(max_len)

    def leave(self, slot: int) -> None:
        """The slot is free; see `Runner.leave`."""
        super().leave(slot)
        self._ahead.pop(slot, None)

    @torch.inference_mode()
    def encode(self, chunks: Sequence[Chunk]) -> None:
        """Pass tokens of any rows through the backbone; see `Runner.encode`."""
        ahead = [self._ahead.pop(chunk.slot, None) for chunk in chunks]
        pairs = zip(chunks, ahead, strict=True)
        chunks = [chunk for chunk, its in pairs if its is None or (chunk.start, *chunk.tokens) != its]
        packed = [chunk for chunk in chunks if chunk.place is None and not self.exact]
        if packed:
            super().encode(packed)
        together: list[Lane] = []
        thinking: dict[tuple[TRMForCausalLM, int], list[Lane]] = {}  # parts of prompts, by decoder and depth
        for chunk in chunks:
            if chunk.place is None and not self.exact:
                continue
            model, seat = self._models[chunk.slot], self._spare.seat
            if chunk.place is not None:
                seat = self._seat(chunk.slot, chunk.place)
            lanes = [Lane(chunk.slot, at, seat, token=token) for at, token in enumerate(chunk.tokens, chunk.start)]
            if chunk.place is None and model.config.kv_source == "state":
                thinking.setdefault((model, chunk.steps), []).extend(lanes)
            else:
                together += lanes
        for piece in self._pieces(together):
            self._feed(piece)
        for (model, depth), lanes in thinking.items():
            for piece in self._pieces(lanes):
                x = self._feed(piece)
                where = self._lanes_at(Lanes.of(send(self._table(piece), self.device)), piece.width)
                self._think(model, x, where, depth)

    @torch.inference_mode()
    def tick(
        self, spans: Sequence[Span], steps: Sequence[int], halting: Sequence[Halting] | None = None
    ) -> Halted | None:
        """One supervision step for rows of one decoder; see `Runner.tick`."""
        model = self._models[spans[0].slot]
        limits: Sequence[Halting | None] = halting or [None] * len(spans)
        lanes = [
            Lane(span.slot, span.start + place, self._seat(span.slot, place), step, 0, limit)
            for span, step, limit in zip(spans, steps, limits, strict=True)
            for place in range(span.length)
        ]
        reads = []
        for piece in self._pieces(lanes):
            now = self._step(model, piece)
            if halting is not None:
                reads.append((piece.lanes, fetch(now[: len(piece.lanes)])))
        if halting is None:
            return None

        def read() -> list[bool]:
            found = {lane: halted for some, numbers in reads for lane, halted in zip(some, numbers(), strict=True)}
            return [found[lane] for lane in lanes]

        return Halted(read, [span.length for span in spans])

    @torch.inference_mode()
    def choose(
        self,
        slots: Sequence[int],
        places: Sequence[int],
        asks: Sequence[Ask],
        ahead: Sequence[int | None] | None = None,
    ) -> list[Answer]:
        """The next token of answer states; see `Runner.choose`. What is plainly asked for is one call with the head.

        Tokens that have a position in `ahead` pass the backbone meanwhile.
        """
        positions = ahead or [None] * len(slots)
        plain: dict[tuple[Any, Picker], list[int]] = {}
        for index, (slot, ask) in enumerate(zip(slots, asks, strict=True)):
            if is_plain(ask):
                plain.setdefault((self._models[slot].head, picker(ask.params)), []).append(index)
        reads = []
        for (_, how), group in plain.items():
            for some in self._cut(group):
                seats = [self._seat(slots[index], places[index]) for index in some]
                found = self._pick(self._models[slots[some[0]]], how, seats, [asks[index] for index in some])
                reads.append((some, fetch(found[:, : len(some)])))
        lanes = [
            Lane(slots[index], position, self._seat(slots[index], 0), token=~self._seat(slots[index], places[index]))
            for some, _ in reads
            for index in some
            if (position := positions[index]) is not None
        ]
        for piece in self._pieces(lanes):
            self._feed(piece)
        answers: dict[int, Answer] = {}
        for some, read in reads:
            for index, token, finite, proven in zip(some, *read(), strict=True):
                position = positions[index]
                if proven:
                    answers[index] = Answer(int(token), bool(finite))
                if position is None:
                    continue
                if proven:
                    self._ahead[slots[index]] = position, int(token)
                else:  # it has to be chosen once more, from what was there before
                    seat = self._seat(slots[index], places[index])
                    self._seats[1, seat] = self._answers[seat]
        if left := [index for index in range(len(asks)) if index not in answers]:
            where = [slots[index] for index in left], [places[index] for index in left]
            rest = super().choose(*where, [asks[index] for index in left])
            answers.update(zip(left, rest, strict=True))
        return [answers[index] for index in range(len(asks))]

    # --- the calls ---------------------------------------------------------------------------------------

    def _feed(self, piece: Piece) -> Tensor:
        """Backbone pass over the tokens of lanes, which then sit in their seats; returns x (N, D).

        Each decoder whose keys come from the context stores those of its lanes.
        """
        own = {lane.slot: self._models[lane.slot] for lane in piece.lanes}
        models = list(dict.fromkeys(own.values()))
        self._layers.update(layer for model in models for layer in model.config.state_layers)
        layers = sorted(self._layers)

        def backbone(table: Tensor) -> Tensor:
            lanes = Lanes.of(table)
            where = self._lanes_at(lanes, piece.width)
            tokens = torch.where(lanes.tokens < 0, self._chosen[(~lanes.tokens).clamp(min=0)], lanes.tokens)
            embedded = self.model.backbone.embed_tokens(tokens)
            found = self.model.encode(embedded, self._rope(where), SlotView(self.backbone_slots, where), layers)
            self._sit_down(lanes.seats, found[:, -1])
            return found

        states = self._run(self.model, "backbone", piece, backbone, tuple(layers))  # (N, C, D)
        for model in models:
            if model.config.kv_source != "context":
                continue

            def context(table: Tensor, model: TRMForCausalLM = model) -> Tensor:
                lanes = Lanes.of(table)
                self._write_context(model, states, layers, Where(lanes.slots, lanes.positions, ()))
                return lanes.slots

            mine = [lane if own[lane.slot] is model else self._spare for lane in piece.lanes]
            self._run(model, "context", piece._replace(lanes=mine), context, tuple(layers))
        return states[:, -1]

    def _step(self, model: TRMForCausalLM, piece: Piece) -> Tensor:
        """One supervision step of lanes; returns which of those that have limits have halted, (N,)."""
        limits = [lane.limits for lane in piece.lanes if lane.limits is not None]  # of all or of none
        watched = slice(None) if any(limit.tolerance > 0 for limit in limits) else None

        def step(table: Tensor) -> Tensor:
            lanes = Lanes.of(table)
            where = self._lanes_at(lanes, piece.width)
            if model.config.kv_source == "context":
                view = SlotView(self.slots, where, keep=True)
            else:
                view = SlotView(self.slots, where, lanes.steps * model.config.cache_entries(1))
            of_lanes = Lanes.reals(table).T.float() if limits else None
            now = self._advance(model, where, view, lanes.seats, lanes.steps > 0, of_lanes, watched)
            return lanes.seats if now is None else now

        more = _bits(torch.tensor(limits, dtype=torch.float64)) if limits else None
        return self._run(model, "tick", piece, step, (bool(limits), watched is not None), more)

    def _readout(self, model: TRMForCausalLM, seats: Sequence[int]) -> Tensor:
        """Logits (M, V) of the answers in `seats`."""

        def head(table: Tensor) -> Tensor:
            return model.readout(self._seats[1, Lanes.of(table).seats])

        parts = []
        for some in self._cut(seats):
            out = self._run(model.head, "head", self._sitting(some), head)[: len(some)]
            parts.append(out.clone() if len(some) < len(seats) else out)  # the next call overwrites it
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    def _pick(self, model: TRMForCausalLM, how: Picker, seats: Sequence[int], asks: Sequence[Ask]) -> Tensor:
        """Tokens, and what is known of them, from the answers in `seats`: see `pick`."""

        def head_and_pick(table: Tensor) -> Tensor:
            seats, numbers = Lanes.of(table).seats, Lanes.reals(table)
            answers = self._seats[1, seats]
            found = pick(model.readout(answers), how, numbers[:-1].T, numbers[-1:].view(torch.int64).T)
            self._chosen[seats] = found[0].long().clamp(max=model.config.vocab_size - 1)  # of no numbers: anything
            self._answers[seats] = answers
            return found

        filters, keys = Numbers.on_host(asks)
        more = torch.cat((_bits(filters), keys.T))
        return self._run(model.head, "pick", self._sitting(seats), head_and_pick, how, more)

    def _trial(self, count: int) -> tuple[Callable[[], object], Callable[[], object], Callable[[], object]]:
        """Calls of backbone, step and head over the first positions of the first slot."""
        lanes = [Lane(0, position, self._spare.seat) for position in range(count)]
        pieces = self._pieces(lanes)
        calls: tuple[Callable[[], object], ...] = (
            lambda: [self._feed(piece) for piece in pieces],
            lambda: [self._step(self.model, piece) for piece in pieces],
            lambda: self._readout(self.model, [lane.seat for lane in lanes]),
        )
        for call in calls:
            call()  # captured now, not while it is timed
        backbone, step, head = calls
        return backbone, step, head

    # --- their shapes ------------------------------------------------------------------------------------

    def _run(
        self,
        owner: nn.Module,
        name: str,
        piece: Piece,
        function: Function,
        extra: object = None,
        more: Tensor | None = None,
    ) -> Tensor:
        """Let a function compute on a piece's table, at first once on none of its lanes; see `_table` and `Graphs.run`.

        extra: what it depends on beside `owner`, which holds all weights that it reads but the backbone's.
        """
        key = name, piece.size, piece.width, extra

        def idle() -> Tensor:
            return self._table(piece._replace(lanes=()), None if more is None else more[:, :0])

        return self.graphs.run(owner, key, function, self._table(piece, more), idle)

    def _pieces(self, lanes: Sequence[Lane]) -> list[Piece]:
        """Lanes that share calls: in exact mode those of equal width, else all, as wide as the widest."""
        if not lanes:
            return []
        if not self.exact:
            width = self._width(1 + max(lane.position for lane in lanes))
            return [Piece(some, self._size(len(some)), width) for some in self._cut(lanes)]
        widths = [self._width(lane.position + 1) for lane in lanes]
        pieces = []
        for width in sorted(set(widths)):
            group = [lane for lane, its in zip(lanes, widths, strict=True) if its == width]
            pieces += [Piece(some, self._size(len(some)), width) for some in self._cut(group)]
        return pieces

    def _sitting(self, seats: Sequence[int]) -> Piece:
        """Lanes that are no more than their seats."""
        return Piece([self._spare._replace(seat=seat) for seat in seats], self._size(len(seats)), 0)

    def _cut(self, some: Sequence[T]) -> list[Sequence[T]]:
        """Parts that fit into the largest bucket."""
        return [some[first : first + self.buckets[-1]] for first in range(0, len(some), self.buckets[-1])]

    def _size(self, count: int) -> int:
        """Lanes of the smallest bucket that holds so many."""
        return self.buckets[bisect_left(self.buckets, count)]

    def _width(self, positions: int) -> int:
        """So many positions, rounded up to WIDTH times a power of two, but no further than a slot."""
        width = WIDTH
        while width < positions:
            width *= 2
        return min(width, self.slots.keys.shape[3])

    def _table(self, piece: Piece, more: Tensor | None = None) -> Tensor:
        """The numbers of a piece's lanes and of idle ones up to its size, (5, N), on the host.

        Below them `more` (R, M), of its first M lanes, for others zeros.
        """
        lanes = [*piece.lanes, *[self._spare] * (piece.size - len(piece.lanes))]
        slots, positions, seats, steps, tokens, _ = zip(*lanes, strict=True)
        numbers = array("q", (*slots, *positions, *seats, *steps, *tokens))  # faster than torch.tensor of all lanes
        table = torch.frombuffer(numbers, dtype=torch.int64).view(-1, piece.size)
        if more is None:
            return table
        return torch.cat((table, pad(more, (0, piece.size - more.shape[1]))))

    def _lanes_at(self, lanes: Lanes, width: int) -> Where:
        """Where lanes lie: each attends alone to its own slot, up to itself."""
        hidden = torch.arange(width, device=self.device) > lanes.positions[:, None]  # (N, W)
        mask = torch.zeros(hidden.shape, dtype=self.backbone_slots.keys.dtype, device=self.device)
        mask = mask.masked_fill_(hidden, -torch.inf)[:, None, None]
        group = Group(slice(None), (len(lanes.slots), 1), lanes.slots, width, mask, alone=False)
        return Where(lanes.slots, lanes.positions, [group])


def _bits(numbers: Tensor) -> Tensor:
    """Rows (R, N) of a table for float64 `numbers` (N, R)."""
    return numbers.T.contiguous().view(torch.int64)


def default_buckets(max_rows: int, max_draft_tokens: int) -> tuple[int, ...]:
    """1, 2, 4, … up to all rows, or to one row and its draft: at least two, for a single one would mean exactness."""
    largest = max(max_rows, 1 + max_draft_tokens, 2)
    return *(2**power for power in range((largest - 1).bit_length())), largest
