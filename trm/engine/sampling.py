"""Choose the next tokens of many rows at once, on the device that holds their logits.

A sampled token is the argmax of the processed logits over the temperature plus Gumbel noise, and the noise is a
function of (seed, sample index, position, token). So the same request gives the same reply, and the same log
probabilities to the bit, whatever else is decoded beside it: what is summed is summed in integers, or by a softmax over
the last dimension, which treats every row alike. Logits count as float32; ties go to the lowest id.

Few tokens can win. The vocabulary is looked at in blocks: of a row that is filtered only the best tokens are
candidates, of another one only the blocks that could hold the winner. Where it is not proven that the winner is among
the candidates, the row is done again with more of them, and in the end with all. `trm.reference` says it the slow way.

Legend: N rows (a place of a draft is a row here), V vocabulary, C candidates, best first. Everything up to the one
copy to the host has shapes that do not depend on numbers on the device.
"""

import math
from array import array
from collections.abc import Callable, Iterable, Sequence
from enum import Enum, auto
from functools import cache
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor
from torch.nn.functional import pad

from trm.device import fetch, send, upload
from trm.engine.noise import BLOCK, block_noise, gumbel_noise, noise_of_blocks, stream_key
from trm.engine.penalties import Penalties
from trm.engine.request import Candidates, Follow, SamplingParams

NUM_CANDIDATES = 128  # of a row that is filtered: nuclei are seldom larger
MORE_CANDIDATES = 2048  # where those do not suffice, and at most where top_k asks for so many
NUM_BLOCKS = 32  # of a row that is not filtered
MORE_BLOCKS = 512  # where those do not suffice
WEIGHT_ONE = 2.0**35  # what the best token weighs; the sum over a vocabulary stays below 2**63
PIECE = {"cpu": 2**19}  # logits that a softmax works on at once, so that they stay in a cache
ENOUGH = 1 - 2**-16  # a share that is met but for the rounding of a softmax is met
SLACK = 1e-5  # by which a bound must be missed: more than its rounding


class Ask(NamedTuple):
    """What to choose a token by. position: how many tokens stand before it; follow: what its grammar allows."""

    params: SamplingParams
    position: int
    penalties: Penalties | None = None
    follow: Follow | None = None


class Answer(NamedTuple):
    """The token chosen, whether all of its row's logits were finite, its own log probability and the likeliest tokens.

    Log probabilities, under the model's own logits, where they were asked for: as many as logprobs or trace wants.
    """

    token: int
    finite: bool
    logprob: float = math.nan
    top: Candidates = ()


class Numbers(NamedTuple):
    """What the tokens of M rows are drawn by, all (M, 1); infinite where a filter is off.

    least: score that min_p leaves. keys: of the noise. few: candidates of a filtered row, at first.
    """

    temperature: Tensor
    top_k: Tensor
    least: Tensor
    top_p: Tensor
    keys: Tensor
    few: int = NUM_CANDIDATES

    @classmethod
    def on_host(cls, asks: Sequence[Ask]) -> tuple[Tensor, Tensor]:
        """Filters (M, 4) in float64, and keys (M, 1): none where nothing is drawn, for they take the host a while."""
        filters = torch.tensor([_filters(ask.params) for ask in asks], dtype=torch.float64).view(-1, 4)
        keys = [
            stream_key(ask.params.seed, ask.params.sample_index, ask.position) if ask.params.temperature else 0
            for ask in asks
        ]
        return filters, torch.tensor(keys, dtype=torch.int64).view(-1, 1)

    @classmethod
    def of(cls, asks: Sequence[Ask], device: torch.device) -> Self:
        """The numbers of some asks on a device."""
        filters, keys = (send(part, device) for part in cls.on_host(asks))
        few = max([NUM_CANDIDATES, *(min(ask.params.top_k, MORE_CANDIDATES) for ask in asks)])
        return cls.in_columns(filters, keys)._replace(few=few)

    @classmethod
    def in_columns(cls, filters: Tensor, keys: Tensor) -> Self:
        """The numbers that `on_host` gave."""
        temperature, top_k, least, top_p = filters.T[..., None]
        return cls(temperature, top_k, least, top_p, keys)


class Width(Enum):
    """How many tokens are candidates. With ALL every row is proven."""

    FEW = auto()
    MORE = auto()
    ALL = auto()


class _Table(NamedTuple):
    """Logits (N, W), float32, filled up with -inf to whole blocks, and the best of each block (N, W / BLOCK)."""

    logits: Tensor
    heights: Tensor

    @classmethod
    def of(cls, logits: Tensor) -> Self:
        if missing := -logits.shape[1] % BLOCK:
            logits = pad(logits, (0, missing), value=-math.inf)
        return cls(logits, logits.view(len(logits), -1, BLOCK).amax(dim=-1))

    def finite(self, vocab_size: int) -> Tensor:
        """Whether all logits of each row are, (N,). Neither of the two hides a NaN."""
        return (self.logits[:, :vocab_size].amin(dim=-1) > -math.inf) & (self.heights.amax(dim=-1) < math.inf)

    def best(self, rows: Tensor) -> Tensor:
        """The best logit of each of some rows, (M, 1)."""
        return self.heights[rows].amax(dim=-1, keepdim=True)

    def members(self, rows: Tensor, blocks: Tensor) -> tuple[Tensor, Tensor]:
        """Logits and ids (M, K x BLOCK) of the tokens of K blocks of each of some rows."""
        num_rows, num_blocks = self.heights.shape
        values = self.logits.view(num_rows, num_blocks, BLOCK)[rows[:, None], blocks]
        ids = blocks[..., None] * BLOCK + torch.arange(BLOCK, device=blocks.device)
        return values.flatten(1), ids.flatten(1)


@torch.inference_mode()
def choose(logits: Tensor, asks: Sequence[Ask]) -> list[Answer]:
    """The next token of each row of logits (N, V)."""
    answers, unproven = _choose(logits, asks, Width.FEW)
    for width in (Width.MORE, Width.ALL):
        if unproven:
            some = logits[upload(unproven, logits.device)]
            again, still = _choose(some, [asks[row] for row in unproven], width)
            for row, answer in zip(unproven, again, strict=True):
                answers[row] = answer
            unproven = [unproven[row] for row in still]
    return answers


@torch.inference_mode()
def likeliest(logits: Tensor, num: int) -> list[Candidates]:
    """The `num` likeliest tokens of each row under the model's own logits (N, V)."""
    table, rows = _Table.of(logits.float()), torch.arange(len(logits), device=logits.device)
    ids, _ = _best(table, rows, num)
    logprobs = table.logits.log_softmax(dim=-1).gather(1, ids)
    found = fetch(torch.stack((ids.double(), logprobs.double())))()  # float64 holds them all exactly
    return [_pairs(*row) for row in zip(*found, strict=True)]


def _choose(logits: Tensor, asks: Sequence[Ask], width: Width) -> tuple[list[Answer], list[int]]:
    """The answers, and the rows that they are not proven for."""
    table = _Table.of(logits.float())
    finite = table.finite(logits.shape[1])
    edited = _edited(table, asks)
    every = torch.arange(len(asks), device=logits.device)
    pickers = [picker(ask.params) for ask in asks]
    if len(set(pickers)) == 1:
        tokens, proven = pickers[0](edited, every, _numbers(pickers[0], asks, logits.device), width)
    else:
        tokens, proven = torch.zeros_like(every), torch.zeros_like(finite)
        for pick in dict.fromkeys(pickers):
            chosen = [row for row, its in enumerate(pickers) if its is pick]
            rows = upload(chosen, logits.device)
            numbers = _numbers(pick, [asks[row] for row in chosen], logits.device)
            tokens[rows], proven[rows] = pick(edited, rows, numbers, width)
    said = [tokens, finite, proven | ~finite]
    told = [row for row, ask in enumerate(asks) if _num_top(ask) is not None]
    num_top = max((_num_top(asks[row]) or 0 for row in told), default=0)
    if told:
        rows = upload(told, logits.device)
        logprobs = table.logits[rows].log_softmax(dim=-1)
        ids, _ = _best(table, rows, num_top)
        said += [logprobs.gather(1, part).flatten() for part in (tokens[rows, None], ids)]
        said.insert(4, ids.flatten())
    found = fetch(torch.cat([part.double() for part in said]))()  # the one copy; float64 holds them all exactly
    count, firsts = len(asks), 3 * len(asks) + len(told)
    answers = [Answer(int(found[row]), bool(found[count + row])) for row in range(count)]
    for place, row in enumerate(told):
        first = firsts + place * num_top
        ids_at = slice(first, first + (_num_top(asks[row]) or 0))
        logprobs_at = slice(ids_at.start + len(told) * num_top, ids_at.stop + len(told) * num_top)
        top = _pairs(found[ids_at], found[logprobs_at])
        answers[row] = answers[row]._replace(logprob=found[3 * count + place], top=top)
    return answers, [row for row in range(count) if not found[2 * count + row]]


def _num_top(ask: Ask) -> int | None:
    """How many of the likeliest tokens are told of with the token, None for no log probability at all."""
    return max((num for num in (ask.params.logprobs, ask.params.trace) if num is not None), default=None)


def _pairs(ids: Sequence[float], logprobs: Sequence[float]) -> Candidates:
    return tuple(zip(map(int, ids), logprobs, strict=True))


# --- how a token is picked ---------------------------------------------------------------------------
# Each picker takes some rows of a table and their numbers, and returns their tokens and whether these are proven.

Picker = Callable[[_Table, Tensor, Numbers, Width], tuple[Tensor, Tensor]]


def picker(params: SamplingParams) -> Picker:
    """How a token is picked: rows that it holds for are picked together."""
    if params.temperature == 0:
        return _greedy
    if params.top_k or params.min_p:
        return _filtered
    return _nucleus if params.top_p < 1 else _unfiltered


def pick(logits: Tensor, how: Picker, filters: Tensor, keys: Tensor) -> Tensor:
    """Tokens of logits (N, V), whether all of a row's are finite, and whether the token is proven: (3, N), float64.

    A function of tensors alone, `filters` and `keys` as `Numbers.on_host` gives them: for plain asks, see `is_plain`.
    """
    table = _Table.of(logits.float())
    rows = torch.arange(len(logits), device=logits.device)
    tokens, proven = how(table, rows, Numbers.in_columns(filters, keys), Width.FEW)
    finite = table.finite(logits.shape[1])
    return torch.stack((tokens.double(), finite.double(), (proven | ~finite).double()))


def is_plain(ask: Ask) -> bool:
    """Whether nothing but a token is asked for, and of its row's own logits."""
    edited = ask.follow or (ask.penalties and ask.penalties.ids)
    return not edited and _num_top(ask) is None and ask.params.top_k <= NUM_CANDIDATES


def _numbers(how: Picker, asks: Sequence[Ask], device: torch.device) -> Numbers:
    """The numbers that rows are picked by: none for the likeliest token."""
    return _no_numbers(device) if how is _greedy else Numbers.of(asks, device)


@cache
def _no_numbers(device: torch.device) -> Numbers:
    return Numbers.of((), device)


def _greedy(table: _Table, rows: Tensor, numbers: Numbers, width: Width) -> tuple[Tensor, Tensor]:
    """The best token, of equal ones the first."""
    block = table.heights[rows].argmax(dim=-1, keepdim=True)
    values, ids = table.members(rows, block)
    return ids.gather(1, values.argmax(dim=-1, keepdim=True))[:, 0], torch.ones_like(rows, dtype=torch.bool)


def _filtered(table: _Table, rows: Tensor, numbers: Numbers, width: Width) -> tuple[Tensor, Tensor]:
    """One of the tokens that top_k, min_p and top_p leave, in this order: top_p is a share of what the others leave."""
    return _among_best(table, rows, numbers, width)


def _nucleus(table: _Table, rows: Tensor, numbers: Numbers, width: Width) -> tuple[Tensor, Tensor]:
    """One of the tokens that top_p leaves, a share of the whole vocabulary."""
    enough = _enough(table, rows, table.best(rows), numbers.temperature, numbers.top_p)
    if width is Width.MORE:
        return _likely_kept(table, rows, numbers, enough)
    return _among_best(table, rows, numbers, width, enough)


def _among_best(
    table: _Table, rows: Tensor, numbers: Numbers, width: Width, enough: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """One of the best tokens, filtered. enough: what those that top_p leaves weigh; None for its share of the best."""
    num_tokens = table.logits.shape[1]
    count = {Width.FEW: numbers.few, Width.MORE: MORE_CANDIDATES, Width.ALL: num_tokens}[width]
    ids, values = _best(table, rows, min(count, num_tokens))
    best, count = values[:, :1], ids.shape[1]
    scores = (values - best).double() / numbers.temperature
    kept = (torch.arange(count, device=rows.device) < numbers.top_k) & (scores >= numbers.least)
    weights = _weights(values, best, numbers.temperature) * kept
    up_to = weights.cumsum(dim=-1)
    if enough is None:
        enough = numbers.top_p * ENOUGH * up_to[:, -1:]
        proven = ~kept[:, -1:] | (numbers.top_k <= count) | (count == num_tokens)  # nothing is kept behind these
    else:
        proven = (up_to[:, -1:] >= enough) | (count == num_tokens)
    kept &= up_to - weights < enough
    scores = (scores + gumbel_noise(numbers.keys, ids)).masked_fill_(~kept, -math.inf)
    return _first_best(scores, ids), proven[:, 0]


def _likely_kept(table: _Table, rows: Tensor, numbers: Numbers, enough: Tensor) -> tuple[Tensor, Tensor]:
    """The tokens that rows with top_p alone would get without it, proven where it leaves that token."""
    tokens, proven = _unfiltered(table, rows, numbers, Width.MORE)
    logits, ids, best = table.logits[rows], torch.arange(table.logits.shape[1], device=rows.device), table.best(rows)
    value = logits.gather(1, tokens[:, None])
    better = (logits > value) | ((logits == value) & (ids < tokens[:, None]))
    before = (_weights(logits, best, numbers.temperature) * better).sum(dim=-1, keepdim=True)
    return tokens, proven & (before < enough)[:, 0]


def _filters(params: SamplingParams) -> tuple[float, float, float, float]:
    """Temperature, top_k, the least score and top_p: infinite where they are off."""
    least = math.log(params.min_p) if params.min_p else -math.inf
    return params.temperature, params.top_k or math.inf, least, params.top_p if params.top_p < 1 else math.inf


def _unfiltered(table: _Table, rows: Tensor, numbers: Numbers, width: Width) -> tuple[Tensor, Tensor]:
    """Any token. A block can hold the winner only if its best logit with its largest noise could win."""
    temperature, keys, heights = numbers.temperature, numbers.keys, table.heights[rows]
    best, count = heights.amax(dim=-1, keepdim=True), heights.shape[1]
    wanted = {Width.FEW: NUM_BLOCKS, Width.MORE: MORE_BLOCKS, Width.ALL: count}[width]
    if wanted < count:
        bounds = ((heights - best).double() / temperature + block_noise(keys, count)).topk(wanted + 1)
        blocks, beyond = bounds.indices[:, :-1], bounds.values[:, -1:]
    else:
        blocks = torch.arange(count, device=rows.device).expand(len(rows), -1)
        beyond = torch.full_like(best, -math.inf)
    values, ids = table.members(rows, blocks)
    scores = (values - best).double() / temperature + noise_of_blocks(keys, blocks).flatten(1)
    proven = scores.amax(dim=-1, keepdim=True) > beyond + SLACK
    return _first_best(scores, ids), proven[:, 0]


def _first_best(scores: Tensor, ids: Tensor) -> Tensor:
    """The id of the best score of each row, of equal ones the lowest."""
    return ids.masked_fill(scores < scores.amax(dim=-1, keepdim=True), torch.iinfo(ids.dtype).max).amin(dim=-1)


# --- the best tokens, and what all of them weigh -----------------------------------------------------


def _best(table: _Table, rows: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Ids and logits (M, count) of the best tokens of each row, of equal ones the lowest first.

    They lie in the `count` best blocks, where of equally high ones the first are the best: each block that is better
    than a token's own holds a token that is better.
    """
    num_blocks, width = table.heights.shape[1], table.logits.shape[1]
    if count < num_blocks:
        numbers = torch.arange(num_blocks, device=rows.device)
        values, ids = table.members(rows, _id_of(_sortable(table.heights[rows], numbers).topk(count).values))
    else:
        values, ids = table.logits[rows], torch.arange(width, device=rows.device)
    ids = _id_of(_sortable(values, ids).topk(count).values)
    return ids, table.logits[rows[:, None], ids]


def _sortable(values: Tensor, ids: Tensor) -> Tensor:
    """Integers in the order of float32 `values`, and where these are equal in the opposite order of `ids`."""
    bits = (values + 0.0).view(torch.int32)  # + 0.0: there is but one zero
    bits ^= (bits >> 31).bitwise_and_(0x7FFFFFFF)
    return (bits.long() << 32).add_(0xFFFFFFFF).sub_(ids)


def _id_of(sortable: Tensor) -> Tensor:
    return 0xFFFFFFFF - (sortable & 0xFFFFFFFF)


def _weights(values: Tensor, best: Tensor, temperature: Tensor) -> Tensor:
    """What tokens with logits `values` weigh beside the best one: whole numbers, whose sums nothing rounds."""
    return (values - best).mul_(_rate(temperature)).exp_().mul_(WEIGHT_ONE).long()


def _enough(table: _Table, rows: Tensor, best: Tensor, temperature: Tensor, top_p: Tensor) -> Tensor:
    """What the tokens that top_p leaves weigh together, of all tokens of each row: (M, 1), float64."""
    size = max(1, PIECE.get(rows.device.type, table.logits.numel()) // table.logits.shape[1])
    logits = table.logits if len(rows) == len(table.logits) else table.logits[rows]
    likeliest_logprobs = []
    for part, beside, rate in zip(*(each.split(size) for each in (logits, best, _rate(temperature))), strict=True):
        scores = (part - beside).mul_(rate)
        likeliest_logprobs.append(scores.log_softmax(dim=-1).amax(dim=-1, keepdim=True))
    return top_p * ENOUGH * WEIGHT_ONE / torch.cat(likeliest_logprobs).double().exp()


def _rate(temperature: Tensor) -> Tensor:
    """What logits are multiplied by, float32; finite, for zero times infinity is no number."""
    return (1 / temperature).clamp(max=1e30).float()


# --- what changes logits -----------------------------------------------------------------------------


def _edited(table: _Table, asks: Sequence[Ask]) -> _Table:
    """Without the tokens that grammars exclude, with penalties and bias: another table, if there are any."""
    penalised = [(row, ask.penalties) for row, ask in enumerate(asks) if ask.penalties and ask.penalties.ids]
    bound = [(row, ask.follow.mask) for row, ask in enumerate(asks) if ask.follow]
    if not penalised and not bound:
        return table
    logits = table.logits.clone()
    if penalised:
        _penalise(logits, penalised)
    if bound:
        _exclude(logits, bound)
    return _Table.of(logits)


def _penalise(logits: Tensor, penalised: Sequence[tuple[int, Penalties]]) -> None:
    """Change the logits of tokens that occurred or have a bias; see `Penalties`."""
    rows = [row * logits.shape[1] for row, one in penalised]
    counts = torch.tensor([len(one.ids) for _, one in penalised])
    where = _joined([one.ids for _, one in penalised], torch.int64) + torch.tensor(rows).repeat_interleave(counts)
    where = send(where, logits.device)
    columns = ([getattr(one, name) for _, one in penalised] for name in ("factors", "less", "bias"))
    factors, less, bias = (send(_joined(column, torch.float64), logits.device) for column in columns)
    values = logits.view(-1)[where].double()
    logits.view(-1)[where] = (torch.where(values > 0, values / factors, values * factors) - less + bias).float()


def _exclude(logits: Tensor, bound: Sequence[tuple[int, bytes]]) -> None:
    """Set the logits of tokens that are not in their row's mask to -inf; see `Follow`."""
    device, num_bytes = logits.device, logits.shape[1] // 8
    masks = send(_joined([mask[:num_bytes].ljust(num_bytes, b"\0") for _, mask in bound], torch.uint8), device)
    bits = (torch.arange(256, device=device)[:, None] >> torch.arange(8, device=device)) & 1
    spelt = torch.zeros(bits.shape, device=device).masked_fill_(bits == 0, -math.inf)  # a byte's eight tokens
    excluded = spelt.index_select(0, masks.int()).view(len(bound), -1)
    if len(bound) == len(logits):
        logits += excluded
    else:
        logits[upload([row for row, _ in bound], device)] += excluded


def _joined(arrays: Iterable["bytes | array[Any]"], dtype: torch.dtype) -> Tensor:
    return torch.frombuffer(bytearray(b"".join(arrays)), dtype=dtype)
