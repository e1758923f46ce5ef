"""Captures, on a stand-in for torch.cuda: it writes operations down, and runs them again in the same places.

It does what torch does that surprises: a capture that fails leaves its stream, its pool and the random generator as
they were in it, and graphs of one pool overwrite each other's memory.
"""

import gc
import logging
import time
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import groupby
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.conftest import make_model
from tests.trm.engines import OTHERS, expected, make_engine, request
from trm.engine import runner as runner_module
from trm.engine.graphs import Graphs, Recorder
from trm.engine.runner import COST_REPEATS, Chunk, Runner
from trm.engine.static import StaticRunner
from trm.errors import ConfigError


class Tape(TorchDispatchMode):
    """The operations of a capture, and the tensors that it allocated."""

    def __init__(self, cuda: "Cuda") -> None:
        super().__init__()
        self.cuda = cuda
        self.steps: list[tuple[Any, Any, Any, list[Tensor]]] = []
        self.own: list[Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.cuda.fail:
            raise self.cuda.fail
        found = func(*args, **(kwargs or {}))
        outs = [leaf for leaf in tree_leaves(found) if isinstance(leaf, Tensor)]
        places = {leaf.untyped_storage().data_ptr() for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        self.own += [out for out in outs if out.untyped_storage().data_ptr() not in places]
        self.steps.append((func, args, kwargs or {}, outs))
        return found

    def replay(self) -> None:
        for func, args, kwargs, outs in self.steps:
            again = [leaf for leaf in tree_leaves(func(*args, **kwargs)) if isinstance(leaf, Tensor)]
            for out, new in zip(outs, again, strict=True):
                if out.data_ptr() != new.data_ptr():
                    out.copy_(new)

    def spoil(self) -> None:
        for tensor in self.own:
            tensor.fill_(1)


class Cuda:
    """torch.cuda, as far as captures use it. `fail`: raised by whatever is captured."""

    def __init__(self) -> None:
        self.stream_now: Any = "default"
        self.capturing: list[Any] = []  # pools that the allocator takes captured memory from
        self.begun: list[Any] = []  # pools captured into, never again after a failure
        self.poisoned: set[Any] = set()
        self.released: list[Any] = []
        self.graphs: list[FakeGraph] = []
        self.replays = 0
        self.fail: BaseException | None = None
        self.generator = SimpleNamespace(capturing=False)
        self.generator.clone_state = lambda: SimpleNamespace(capturing=False)
        self.generator.graphsafe_set_state = lambda state: vars(self.generator).update(capturing=state.capturing)
        self.free = 1000

    @contextmanager
    def stream(self, stream: Any) -> Iterator[None]:
        before, self.stream_now = self.stream_now, stream
        try:
            yield
        finally:
            self.stream_now = before

    def end_allocate(self, device: int, pool: Any) -> None:
        if pool not in self.capturing:
            raise RuntimeError("not currently recording to the pool")
        self.capturing.remove(pool)


class FakeGraph:
    def __init__(self, cuda: Cuda) -> None:
        self.cuda = cuda
        self.tape = Tape(cuda)

    def capture_begin(self, pool: Any, capture_error_mode: str) -> None:
        assert capture_error_mode == "thread_local"
        assert self.cuda.stream_now != "default"
        assert pool not in self.cuda.poisoned, "already recording to the pool"
        assert not self.cuda.capturing, "two captures at once"
        self.pool = pool
        self.cuda.capturing.append(pool)
        self.cuda.begun.append(pool)
        self.cuda.generator.capturing = True
        self.tape.__enter__()

    def capture_end(self) -> None:
        self.tape.__exit__(None, None, None)
        if self.cuda.fail:  # as where the stream's capture was invalidated: nothing behind this is done
            self.cuda.poisoned.add(self.pool)
            raise RuntimeError("operation failed due to a previous error during capture")
        self.cuda.capturing.remove(self.pool)
        self.cuda.generator.capturing = False
        self.cuda.graphs.append(self)
        self.cuda.free -= 10

    def replay(self) -> None:
        self.cuda.replays += 1
        for other in self.cuda.graphs:
            if other is not self and other.pool == self.pool:
                other.tape.spoil()
        self.tape.replay()


@pytest.fixture
def cuda(monkeypatch) -> Cuda:
    fake, pools = Cuda(), iter(range(100))
    stand_ins = {
        "Stream": lambda device: SimpleNamespace(wait_stream=lambda other: None),
        "current_stream": lambda device: SimpleNamespace(wait_stream=lambda other: None),
        "current_device": lambda: 0,
        "default_generators": (fake.generator,),
        "stream": fake.stream,
        "graph_pool_handle": lambda: next(pools),
        "CUDAGraph": lambda: FakeGraph(fake),
        "empty_cache": lambda: None,
        "mem_get_info": lambda device: (fake.free, 0),
    }
    for name, stand_in in stand_ins.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", fake.end_allocate, raising=False)
    release = lambda device, pool: fake.released.append(pool)  # noqa: E731
    monkeypatch.setattr(torch._C, "_cuda_releasePool", release, raising=False)
    return fake


def captured(graphs: Graphs | None = None) -> Graphs:
    """Graphs that capture on the stand-in, between buffers of the CPU."""
    graphs = graphs or Graphs(torch.device("cpu"))
    graphs._recorder = Recorder(torch.device("cpu"))
    return graphs


def table(number: int) -> Tensor:
    return torch.full((5, 2), number)


def idle() -> Tensor:
    return table(0)


def test_a_function_is_called_twice_and_then_replayed(cuda):
    graphs, owner, seen = captured(), nn.Module(), []

    def double(numbers: Tensor) -> Tensor:
        seen.append(bool(numbers.any()))
        return numbers * 2

    found = [int(graphs.run(owner, "double", double, table(number), idle)[0, 0]) for number in (3, 4, 5)]

    assert found == [6, 8, 10]
    assert seen == [False, False], "to warm up, and to capture, both idle"
    assert (graphs.count, graphs.plain, cuda.replays) == (1, 0, 3)
    assert graphs.bytes == 10 + 2 * table(0).nbytes


def test_no_graph_overwrites_what_another_one_gave(cuda):
    graphs, first, second = captured(), nn.Module(), nn.Module()

    one = graphs.run(first, "a", lambda numbers: numbers + 1, table(1), idle)
    graphs.run(second, "a", lambda numbers: numbers + 2, table(1), idle)
    graphs.run(first, "b", lambda numbers: numbers + 3, table(1), idle)

    assert int(one[0, 0]) == 2


def test_logits_of_several_heads_stand_side_by_side(cuda):
    model, other = make_model(), make_model(own_lm_head=True)
    other.backbone = model.backbone
    sizes = 2, 64, 4
    plain, runner = Runner(model, *sizes), StaticRunner(model, *sizes, buckets=(1, 2))
    captured(runner.graphs)
    found = []
    for one in (plain, runner):
        one.seat(1, other)
        one.encode([Chunk(slot, 0, [5 + slot], place=0) for slot in (0, 1)])
        for slots in ([1], [0], [0, 1], [1, 0]):
            found.append(one.logits(slots).clone())

    for want, got in zip(found[:4], found[4:], strict=True):
        assert torch.allclose(got, want, atol=1e-5)


@pytest.mark.parametrize("draft", [0, 3])
def test_replayed_replies_are_those_of_the_reference(cuda, chat, kv_source, draft):
    """What is captured holds for every later call: nothing of the first one is baked in."""
    others = tuple(OTHERS)
    engine = make_engine(chat, kv_source, draft=draft, others=others, row_buckets=(1, 3), max_rows=5)
    captured(engine.loop.runner.graphs)
    rule = {"halt_tolerance": 0.1} if kv_source == "context" else {"top_k": 3}
    requests = [
        request(2 + 3 * index, index, n_supervision=index % 4, decoder=(None, *others)[index % 3], **params)
        for index, params in enumerate([rule, {"temperature": 0.8}, {}] * 2)
    ]

    for one, reply in zip(requests, engine.generate(requests), strict=True):
        assert reply.token_ids == expected(engine, one).token_ids
    assert cuda.replays > 2 * len(cuda.graphs)


def test_what_cannot_be_captured_runs_plainly_from_then_on(cuda, caplog):
    graphs, owner = captured(), nn.Module()
    cuda.fail = RuntimeError("no such operation in a capture")

    with caplog.at_level(logging.WARNING):
        found = [int(graphs.run(owner, "odd", lambda numbers: numbers + 1, table(n), idle)[0, 0]) for n in (3, 4)]

    assert found == [4, 5]
    assert (graphs.count, graphs.plain, cuda.replays) == (1, 1, 0)
    assert [record.levelname for record in caplog.records] == ["WARNING"]


@pytest.mark.parametrize("failure", [RuntimeError("no such operation"), torch.OutOfMemoryError(), KeyboardInterrupt()])
def test_a_capture_that_fails_leaves_nothing_behind(cuda, failure):
    graphs, owner = captured(), nn.Module()
    graphs.run(owner, "good", lambda numbers: numbers + 1, table(1), idle)
    cuda.fail = failure
    try:
        graphs.run(owner, "bad", lambda numbers: numbers + 1, table(1), idle)
    except KeyboardInterrupt:
        assert "bad" not in graphs._of[owner]
    cuda.fail = None

    assert cuda.stream_now == "default"
    assert cuda.capturing == [], "or the allocator would never give memory back again"
    assert cuda.released == [0]
    assert not cuda.generator.capturing
    assert int(graphs.run(owner, "good", lambda numbers: numbers, table(2), idle)[0, 0]) == 3
    assert int(graphs.run(owner, "next", lambda numbers: numbers + 2, table(2), idle)[0, 0]) == 4
    assert cuda.begun == [0, 0, 1]
    assert len(cuda.graphs) == 2


def test_a_function_that_fails_in_a_capture_that_ends_well_keeps_the_pool(cuda):
    """As where the memory runs out. What the others left in the pool is needed then more than ever."""
    graphs, owner, calls = captured(), nn.Module(), []

    def fails_later(numbers: Tensor) -> Tensor:
        calls.append(1)
        if len(calls) == 2:
            raise torch.OutOfMemoryError
        return numbers + 1

    assert int(graphs.run(owner, "bad", fails_later, table(1), idle)[0, 0]) == 2
    assert int(graphs.run(owner, "next", lambda numbers: numbers + 2, table(2), idle)[0, 0]) == 4

    assert graphs.plain == 1
    assert cuda.begun == [0, 0]
    assert cuda.released == []
    assert not cuda.generator.capturing


def test_a_function_that_fails_before_it_is_captured_may_try_again(cuda):
    graphs, owner, calls = captured(), nn.Module(), []

    def fails_once(numbers: Tensor) -> Tensor:
        calls.append(1)
        if len(calls) == 1:
            raise torch.OutOfMemoryError
        return numbers + 1

    with pytest.raises(torch.OutOfMemoryError):
        graphs.run(owner, "key", fails_once, table(1), idle)

    assert int(graphs.run(owner, "key", fails_once, table(1), idle)[0, 0]) == 2
    assert (graphs.count, graphs.plain) == (1, 0)


def test_captures_of_several_threads_do_not_overlap(cuda):
    """An engine decodes while another thread tries a decoder."""

    def slow(numbers: Tensor) -> Tensor:
        time.sleep(0.02)
        return numbers + 1

    def run(graphs: Graphs) -> list[int]:
        owner = nn.Module()
        return [int(graphs.run(owner, key, slow, table(key), idle)[0, 0]) for key in range(4)]

    with ThreadPoolExecutor() as pool:
        found = list(pool.map(run, [captured() for _ in range(3)]))

    assert found == [[1, 2, 3, 4]] * 3
    assert len(cuda.graphs) == 12


@pytest.mark.parametrize("fails", [False, True], ids=["captured", "plain"])
def test_functions_die_with_their_owner(cuda, fails, caplog):
    caplog.set_level(logging.CRITICAL)  # pytest's log would hold on to the frames of a failure
    graphs, owner = captured(), nn.Linear(2, 2)
    cuda.fail = RuntimeError() if fails else None
    graphs.run(owner, "key", lambda numbers, layer=owner: layer(numbers.float()), table(1), idle)
    cuda.graphs.clear()  # the stand-in holds on to what it wrote down
    cuda.fail = None
    gone = weakref.ref(owner)

    del owner
    gc.collect()

    assert gone() is None
    assert not graphs._of


def test_decoders_with_the_same_head_share_what_is_captured_of_it(chat):
    engine = make_engine(chat, others=OTHERS, row_buckets=(1, 4))
    graphs = engine.loop.runner.graphs

    engine.generate([request(3, decoder=name, n_supervision=2) for name in (None, *OTHERS)])

    models = {decoder.model for decoder in engine.decoders.values()}
    heads = {model.head for model in models}
    of_heads = [key for head in heads for key in graphs._of[head]]
    assert len(heads) < len(models)
    assert {name for name, *_ in of_heads} <= {"pick", "head"}
    assert not {name for model in models for name, *_ in graphs._of[model]} & {"pick", "head"}


def test_the_backbone_is_not_captured_anew_for_every_mix_of_decoders(chat, monkeypatch):
    """Once for each set of layers that decoders have read so far, which only grows."""
    engine = make_engine(chat, others=("wide",), row_buckets=(4,))
    first, wide = request(3, ignore_eos=True), request(3, decoder="wide", ignore_eos=True)

    keys: list[Any] = []
    run = Graphs.run

    def noted(self: Graphs, owner: Any, key: Any, *rest: Any) -> Tensor:
        keys.append(key)
        return run(self, owner, key, *rest)

    monkeypatch.setattr(Graphs, "run", noted)

    for mix in ([first], [first, wide], [first], [wide]):
        engine.generate(mix)

    read = [layers for name, *_, layers in keys if name == "backbone"]
    assert [layers for layers, _ in groupby(read)] == [(1,), (0, 1)]


def test_too_little_memory_at_the_start_is_an_error_with_a_remedy(chat, monkeypatch):
    def no_room(numbers: Tensor) -> Tensor:
        raise torch.OutOfMemoryError

    run = Graphs.run

    def small_only(self: Graphs, owner: Any, key: Any, function: Any, *rest: Any) -> Tensor:
        return run(self, owner, key, no_room if key[1] > 3 else function, *rest)

    monkeypatch.setattr(Graphs, "run", small_only)

    with pytest.raises(ConfigError, match=r"4 rows.*--max-rows.*--row-buckets.*--kv-cache-bytes"):
        make_engine(chat, row_buckets=(1, 4), max_rows=4, draft=0)


def test_a_decoder_that_finds_too_little_memory_is_refused(chat, monkeypatch):
    engine = make_engine(chat, others=("state",), row_buckets=(1, 4))
    second = engine.unload("state")

    def no_room(*args: Any) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(Runner, "__init__", no_room)

    with pytest.raises(ConfigError, match="lower --max-rows"):
        engine.load("state", second)


def test_costs_are_those_of_replays_that_are_waited_for(cuda, monkeypatch):
    runner, waited = StaticRunner(make_model(), 1, 16, 4, buckets=(1, 4)), []
    captured(runner.graphs)
    fastest = runner_module._fastest

    def replayed(*args: Any) -> float:
        before = runner.graphs.count
        found = fastest(*args)
        assert runner.graphs.count == before > 0
        return found

    monkeypatch.setattr(runner_module, "_fastest", replayed)
    monkeypatch.setattr(runner_module, "wait_for", waited.append)

    runner.measure()

    assert len(waited) == 3 * 3 * 2 * COST_REPEATS, "before and after each call of each kind and size"


def test_the_buckets_of_a_start_are_prepared_from_the_largest(monkeypatch):
    sizes: list[int] = []
    run = Graphs.run

    def noted(self: Graphs, owner: Any, key: Any, *rest: Any) -> Tensor:
        sizes.append(key[1])
        return run(self, owner, key, *rest)

    monkeypatch.setattr(Graphs, "run", noted)

    StaticRunner(make_model(), 4, 16, 4, buckets=(1, 2, 4)).prepare()

    assert list(dict.fromkeys(sizes)) == [4, 2, 1]
