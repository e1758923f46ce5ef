"""Calls of few shapes: they say what calls of any size say, write nowhere else, and ask nothing of the host."""

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.conftest import make_model
from tests.trm.conftest import exact_model, some_prompt
from tests.trm.engines import OTHERS, assert_empty, expected, make_engine, request
from tests.trm.test_exactness import alone, bits, packed_model, some_request
from trm import TRMForCausalLM
from trm.device import has_fast_bfloat16
from trm.engine import Engine, EngineConfig, Request, SamplingParams, sampling
from trm.engine.graphs import Function, Graphs
from trm.engine.runner import Chunk, Halting, Runner
from trm.engine.slots import WIDTH, Span
from trm.engine.static import Lane, StaticRunner, default_buckets
from trm.errors import ConfigError
from trm.linear import has_packed_bfloat16

BUCKETS = (1, 2, 4, 7)
LENGTH = 3 * WIDTH
PLACES = 3
ENTRIES = 4  # supervision steps with room in the cache


def runners(model: TRMForCausalLM, num_slots: int = 7, buckets: Sequence[int] = BUCKETS) -> tuple[Runner, StaticRunner]:
    """The plain one and the one of few shapes."""
    sizes = num_slots, LENGTH, model.config.cache_entries(ENTRIES), PLACES - 1
    return Runner(model, *sizes), StaticRunner(model, *sizes, buckets=buckets)


def prompts(num_rows: int, seed: int = 0) -> list[Chunk]:
    """A prompt for each slot: some end next to the border between two widths, some lie far from it."""
    rng = random.Random(seed)
    lengths = [rng.choice((1, 5, WIDTH - 2, WIDTH - 1, WIDTH, 2 * WIDTH - 1, 150)) for _ in range(num_rows)]
    return [Chunk(slot, 0, some_prompt(length, slot), steps=ENTRIES) for slot, length in enumerate(lengths)]


def decode(runner: Runner, rows: Sequence[Chunk], halting: Sequence[Halting] | None = None) -> list[Tensor]:
    """Logits of every place of rows that stand at different steps and have drafts of different lengths."""
    runner.encode(rows)
    ends = [len(chunk.tokens) for chunk in rows]
    lengths = [1 + slot % PLACES for slot in range(len(rows))]
    for place in range(PLACES):
        behind = [Chunk(row.slot, end + place, [7 + place], place=place) for row, end in zip(rows, ends, strict=True)]
        if some := [chunk for chunk, length in zip(behind, lengths, strict=True) if place < length]:
            runner.encode(some)
    found = []
    done = [0] * len(rows)
    for tick in range(ENTRIES):
        working = [index for index in range(len(rows)) if tick >= index % 2]  # every other row begins a tick later
        spans = [Span(rows[index].slot, ends[index], lengths[index]) for index in working]
        if not spans:
            continue
        rules = None if halting is None else [halting[index] for index in working]
        halted = runner.tick(spans, [done[index] for index in working], rules)
        if halted is not None:
            found.append(torch.tensor([flag for row in range(len(working)) for flag in halted.of(row)]).double())
        for index in working:
            done[index] += 1
        at = [(rows[index].slot, place) for index in working for place in range(lengths[index])]
        found.append(runner.logits(*zip(*at, strict=True)).clone())
    return found


@pytest.mark.parametrize("num_rows", range(1, 8))
def test_every_number_of_rows_says_what_calls_of_any_size_say(kv_source, num_rows):
    model = make_model(kv_source=kv_source)
    plain, static = runners(model)
    rows = prompts(num_rows)

    for want, got in zip(decode(plain, rows), decode(static, rows), strict=True):
        assert torch.allclose(got, want, atol=1e-4), float((got - want).abs().max())


has_bfloat16 = pytest.mark.skipif(
    not (has_fast_bfloat16("cpu") and has_packed_bfloat16()), reason="this processor has no bfloat16 products"
)


@has_bfloat16
@pytest.mark.parametrize("buckets", [(1, 2, 4, 8), (3, 8), (8,)], ids=str)
def test_buckets_change_no_bit_of_an_exact_model(kv_source, buckets):
    """Every number of rows, in every place of a call, beside rows of any width."""
    model = packed_model(kv_source, None)
    sizes = 8, LENGTH, model.config.cache_entries(ENTRIES)
    rows = [Chunk(slot, 0, some_prompt(1 + 27 * slot, slot, 300), steps=2) for slot in range(8)]

    def last_logits(some: Sequence[Chunk]) -> Tensor:
        static = StaticRunner(model, *sizes, buckets=buckets)
        assert static.exact
        static.encode(some)
        static.encode([Chunk(row.slot, len(row.tokens), [5], place=0) for row in some])
        for step in range(2):
            static.tick([Span(row.slot, len(row.tokens)) for row in some], [step] * len(some))
        return static.logits([row.slot for row in some])

    alone = [last_logits([row])[0] for row in rows]
    for num_rows in range(2, 9):
        for got, want in zip(last_logits(rows[:num_rows]), alone, strict=False):
            assert torch.equal(got, want)


@has_bfloat16
def test_replies_of_an_exact_model_are_the_same_to_the_bit_in_any_company():
    rng = random.Random(0)
    requests = [some_request(rng) for _ in range(7)]
    requests.append(replace(requests[0], prompt_ids=(*requests[0].prompt_ids, 7, 8)))  # takes a prefix over
    model, chat = packed_model("context", None), alone("context", None).chat

    def engine(max_rows: int, buckets: tuple[int, ...]) -> Engine:
        return Engine(model, chat, EngineConfig(max_rows=max_rows, max_model_len=200, row_buckets=buckets))

    solo, among = engine(1, (1, 2)), engine(5, (2, 5))

    assert among.exact
    assert list(map(bits, among.generate(requests))) == [bits(solo.generate([one])[0]) for one in requests]


def test_one_bucket_is_exact_in_any_type():
    """All calls have the same shape."""
    model = make_model(scale=1.0)

    assert StaticRunner(model, 6, LENGTH, 4, buckets=(6,)).check_exact()
    assert not StaticRunner(model, 6, LENGTH, 4, buckets=(1, 6)).check_exact()


def test_who_has_halted_keeps_the_answer(monkeypatch):
    model = exact_model("context")
    plain, static = runners(model)
    rows = [chunk._replace(tokens=[token % 16 for token in chunk.tokens]) for chunk in prompts(6)]
    rules = [Halting(), Halting(0.5), Halting(1.0, 0.2), Halting(0.4, 0.4), Halting(), Halting(1.0, 1.0)]

    for some in (rules, [Halting(rule.threshold) for rule in rules]):
        want, got = decode(plain, rows, some), decode(static, rows, some)
        flags = torch.cat([one for one in want if one.ndim == 1])
        assert 0 < flags.sum() < len(flags), "some halt, some do not"
        for one, other in zip(want, got, strict=True):
            assert torch.allclose(one, other, atol=1e-9)


def test_idle_lanes_write_into_no_slot_but_the_spare_one(kv_source):
    model = make_model(kv_source=kv_source)
    _, static = runners(model, buckets=(7, 8))
    spare = 7
    tables = dict.fromkeys(static._tables(), 1) | {static.state: 1, static.halted: 0}  # and which axis is slots
    for table in tables:
        table.copy_(torch.randn(table.shape) > 0 if table.dtype == torch.bool else torch.randn(table.shape))
    before = [table.clone() for table in tables]

    static.encode([Chunk(3, 11, [9], place=1)])
    static.tick([Span(3, 10, 2)], [1], [Halting(0.5)])
    static.logits([3])

    for (table, axis), old in zip(tables.items(), before, strict=True):
        changed = (table != old).transpose(0, axis).flatten(1).any(1).nonzero().flatten().tolist()
        assert set(changed) <= {3, spare}
        assert 3 in changed or table is static.halted


def test_rows_beyond_the_largest_bucket_are_several_calls(kv_source):
    """Places of one row may lie in different calls."""
    model = make_model(kv_source=kv_source)
    plain, static = runners(model, buckets=(1, 2))
    rows = prompts(5, seed=1)

    for want, got in zip(decode(plain, rows), decode(static, rows), strict=True):
        assert torch.allclose(got, want, atol=1e-4)


@pytest.mark.parametrize("others", [(), tuple(OTHERS)], ids=["alone", "beside others"])
@pytest.mark.parametrize("draft", [0, 3])
def test_replies_are_those_of_the_reference(chat, kv_source, others, draft):
    engine = make_engine(chat, kv_source, draft=draft, others=others, row_buckets=(1, 3), max_rows=5)
    requests = [
        request(2 + 3 * index, index, n_supervision=index % 4, decoder=(None, *others)[index % (1 + len(others))])
        for index in range(9)
    ]
    long = request(40, 3, max_tokens=8, ignore_eos=True, temperature=0.8)
    for drawn in ({}, {"top_k": 5}, {"top_p": 0.7}, {"min_p": 0.1}, {"logprobs": 2}, {"frequency_penalty": 1.0}):
        requests.append(replace(long, params=replace(long.params, seed=2, **drawn)))

    for one, reply in zip(requests, engine.generate(requests), strict=True):
        assert reply.token_ids == expected(engine, one).token_ids
    assert_empty(engine)


@pytest.mark.parametrize("blocks", [1, 32])
def test_a_token_passes_the_backbone_before_the_host_knows_it(chat, blocks, monkeypatch):
    """Unless it must be chosen once more: with one block looked at, few drawn tokens are proven at first."""
    monkeypatch.setattr(sampling, "NUM_BLOCKS", blocks)
    model = make_model().double()
    fed: list[Lane] = []
    feed = StaticRunner._feed
    monkeypatch.setattr(StaticRunner, "_feed", lambda self, piece: (fed.extend(piece.lanes), feed(self, piece))[1])
    params = [
        SamplingParams(max_tokens=9, temperature=one % 3 / 2, seed=one, n_supervision=one % 3) for one in range(6)
    ]
    requests = [Request(tuple(some_prompt(4 + seed, seed)), one) for seed, one in enumerate(params)]
    sizes = {"max_rows": 4, "max_model_len": 80, "max_draft_tokens": 0}
    engine, plain = (Engine(model, chat, EngineConfig(row_buckets=some, **sizes)) for some in ((1, 4), None))
    fed.clear()

    replies = engine.generate(requests)

    assert [reply.token_ids for reply in replies] == [reply.token_ids for reply in plain.generate(requests)]
    ahead = [lane for lane in fed if lane.token < 0]
    assert len(ahead) == 6 * 8, "of each reply all tokens but the last"
    again = len(fed) - len(ahead) - 6
    assert again == 0 if blocks == 32 else 0 < again < 4 * 8
    assert not engine.loop.runner._ahead


@pytest.mark.parametrize("draft", [0, 3])
def test_who_halts_is_known_a_tick_later_and_changes_no_reply(chat, draft):
    engine = make_engine(chat, draft=draft, row_buckets=(1, 2, 4))
    rules: list[dict[str, Any]] = [{"halt_tolerance": 0.5}, {"halt_threshold": 0.2, "halt_tolerance": 0.2}, {}]
    requests = [request(4 + i, n_supervision=4, max_tokens=8, ignore_eos=True, **rule) for i, rule in enumerate(rules)]

    replies = engine.generate(requests)

    for one, reply in zip(requests, replies, strict=True):
        want = expected(engine, one)
        assert reply.token_ids == want.token_ids
        assert reply.usage.supervision_steps == sum(want.steps)
    assert replies[0].usage.supervision_steps < 4 * 8 == replies[2].usage.supervision_steps
    if not draft:
        assert engine.stats().row_steps > sum(reply.usage.supervision_steps for reply in replies), "a tick too many"


def test_a_trace_ends_with_the_step_that_halted(chat):
    one = request(5, n_supervision=4, max_tokens=6, ignore_eos=True, halt_tolerance=0.5, trace=2)

    [late], [at_once] = (make_engine(chat, row_buckets=sizes).generate([one]) for sizes in ((1, 4), None))

    assert late.usage.supervision_steps < 4 * 6
    assert [len(steps) for steps in late.traces] == [len(steps) for steps in at_once.traces]


def test_memory_and_lengths_count_the_spare_slot(chat):
    model = exact_model("context")
    per_token = Runner.bytes_per_position(model, model.config.cache_entries(2))

    engine = make_engine(chat, row_buckets=(1, 4), max_model_len=None, kv_cache_bytes=(4 + 1) * 130 * per_token)

    runner = engine.loop.runner
    assert engine.max_model_len == 128, "whole blocks of 64 positions"
    assert engine.stats().kv_cache_bytes == sum(table.nbytes for table in runner._tables())


@pytest.mark.parametrize(
    ("max_rows", "drafts", "buckets"),
    [(32, 7, (1, 2, 4, 8, 16, 32)), (6, 0, (1, 2, 4, 6)), (1, 7, (1, 2, 4, 8)), (1, 0, (1, 2))],
)
def test_default_buckets_hold_all_rows_and_a_draft(max_rows, drafts, buckets):
    assert default_buckets(max_rows, drafts) == buckets


@pytest.mark.parametrize("buckets", [(), (0, 1), (2, 1), (1, 1)])
def test_buckets_that_do_not_rise_are_refused(buckets):
    with pytest.raises(ConfigError, match="row_buckets"):
        EngineConfig(row_buckets=buckets)


# What may be captured


class NoHost(TorchDispatchMode):
    """Refuses what a capture refuses: to read a number, a shape that depends on one, a copy from or to the host."""

    refused = ("_local_scalar_dense", "item", "nonzero", "masked_select", "unique", "equal", "is_nonzero")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        assert name not in self.refused, f"{func} asks the host"
        assert name not in ("lift_fresh", "lift"), "a tensor of numbers from the host"
        indices = args[1] if name in ("index", "index_put", "index_put_") else ()
        assert torch.bool not in [index.dtype for index in indices if index is not None], "a shape that the host asks"
        return func(*args, **(kwargs or {}))


class Checked(Graphs):
    """Runs each function under `check` first."""

    def __init__(self, check: Callable[[Function, Tensor], Tensor]) -> None:
        super().__init__(torch.device("cpu"))
        self.check = check
        self.keys: set[Any] = set()

    def run(self, owner: Any, key: Any, function: Function, table: Tensor, idle: Callable[[], Tensor]) -> Tensor:
        if key not in self.keys:
            self.keys.add(key)
            torch.testing.assert_close(self.check(function, idle()), function(idle()), equal_nan=True)
        return super().run(owner, key, function, table, idle)


def without_the_host(function: Function, table: Tensor) -> Tensor:
    with NoHost():
        return function(table)


def in_one_graph(function: Function, table: Tensor) -> Tensor:
    torch._dynamo.reset()
    compiled: Tensor = torch.compile(function, fullgraph=True, backend="eager", dynamic=False)(table)
    return compiled


@pytest.mark.parametrize("check", [without_the_host, in_one_graph])
def test_no_call_asks_the_host(check, chat, kv_source):
    engine = make_engine(chat, kv_source, others=OTHERS, draft=2, row_buckets=(1, 4))
    runner = engine.loop.runner
    runner.graphs = checked = Checked(check)
    rule = {"halt_threshold": 0.5, "halt_tolerance": 0.1} if kv_source == "context" else {}
    drawn = [{"temperature": 0.7}, {"temperature": 0.7, "top_k": 3}, {"temperature": 0.7, "top_p": 0.9}]
    requests = [request(3, 1, decoder=name) for name in (None, *OTHERS)]
    requests += [request(4, n_supervision=3, **rule), *(request(4, **params) for params in drawn)]

    engine.generate(requests)

    names = [name for name, *_ in checked.keys]
    assert set(names) == {"backbone", "context", "tick", "pick"}
    assert len({how for name, *_, how in checked.keys if name == "pick"}) == 1 + len(drawn)


@pytest.mark.parametrize(
    "broken",
    [
        lambda table: table * table.sum().item(),
        lambda table: table[table > 0],
        lambda table: table + torch.tensor([1]),
        lambda table: table[:, [0]],
    ],
)
def test_what_asks_the_host_is_noticed(broken):
    with pytest.raises(AssertionError, match="host"):
        without_the_host(broken, torch.zeros(5, 2))
