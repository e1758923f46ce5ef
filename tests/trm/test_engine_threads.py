"""The engine's thread: many callers, draining, closing, dying. Waiting is bounded, and nothing sleeps."""

import copy
import queue
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.trm.conftest import exact_model
from tests.trm.engines import Listener, assert_empty, expected, make_engine, request
from trm.chat import ChatFormat
from trm.engine import Engine, EngineConfig, Event, Reply, Request
from trm.errors import DeviceError, InternalError

TIMEOUT_S = 60


def in_threads(*work: Callable[[], Any]) -> list[Any]:
    """Results of functions run side by side; fails instead of waiting for ever."""
    results: queue.Queue[tuple[int, Any]] = queue.Queue()

    def call(index: int, function: Callable[[], Any]) -> None:
        try:
            results.put((index, function()))
        except BaseException as error:  # noqa: BLE001 - raised again where it is seen
            results.put((index, error))

    for index, function in enumerate(work):
        threading.Thread(target=call, args=(index, function), daemon=True).start()
    found = dict(results.get(timeout=TIMEOUT_S) for _ in work)
    for result in found.values():
        if isinstance(result, BaseException):
            raise result
    return [found[index] for index in range(len(work))]


@pytest.fixture
def started(chat: ChatFormat) -> Any:
    """A function that starts an engine; it is closed after the test."""
    engines = []

    def start(**config: Any) -> Engine:
        engine = make_engine(chat, **config)
        engine.start()
        engines.append(engine)
        return engine

    yield start
    for engine in engines:
        in_threads(engine.close)


def test_concurrent_submitters_get_their_own_replies(started):
    engine = started(max_rows=3)

    def submit(worker: int) -> list[tuple[Request, Reply]]:
        requests = [request(1 + (worker + turn) % 9, worker, temperature=float(turn % 2)) for turn in range(3)]
        return [(one, engine.generate([one])[0]) for one in requests] + list(
            zip(requests, engine.generate(requests), strict=True)
        )

    for pairs in in_threads(*[lambda worker=worker: submit(worker) for worker in range(6)]):
        for one, reply in pairs:
            assert reply.token_ids == expected(engine, one).token_ids
    assert engine.alive()


def test_events_stream_while_the_request_runs(started):
    engine = started()
    [handle] = engine.submit([request(3, max_tokens=6, ignore_eos=True)])

    [events] = in_threads(lambda: list(handle))

    assert [len(event.token_ids) for event in events] == [1] * 6
    assert [event.finish_reason for event in events] == [None] * 5 + ["length"]


def test_failed_request_raises_its_error(started, monkeypatch):
    engine = started()
    monkeypatch.setattr(engine.loop.runner, "encode", lambda *args: 1 / 0)
    [handle] = engine.submit([request(3)])

    with pytest.raises(InternalError, match="ZeroDivisionError"):
        in_threads(handle.result)
    assert engine.alive(), "the next request may well succeed"


def test_result_may_be_asked_for_again(started):
    engine = started()
    [handle] = engine.submit([request(3)])

    [first] = in_threads(handle.result)
    [second] = in_threads(handle.result)

    assert first == second


def test_events_that_go_to_a_listener_are_not_waited_for(started):
    engine = started()
    [handle] = engine.submit([request(3)], lambda index, event: None)

    with pytest.raises(RuntimeError, match="listener"):
        in_threads(handle.result)


def test_engine_is_started_once(started):
    engine = started()

    with pytest.raises(RuntimeError, match="started already"):
        engine.start()


def test_listener_that_raises_even_what_is_no_exception_leaves_nobody_waiting(started, monkeypatch):
    engine = started(max_rows=2)
    gate = Gate(engine, monkeypatch)

    def bad(index: int, event: Event) -> None:
        raise SystemExit

    engine.submit([request(3)], bad)
    [handle] = engine.submit([request(4)])
    gate.wait()
    gate.opened.set()

    [reply] = in_threads(handle.result)
    assert reply.token_ids == expected(engine, request(4)).token_ids
    assert engine.alive()


def test_draining_lets_accepted_requests_finish(started):
    engine = started(max_rows=1)
    handles = engine.submit([request(length) for length in (3, 4, 5)])

    in_threads(lambda: engine.close(drain_s=TIMEOUT_S))

    for reply in in_threads(*[handle.result for handle in handles]):
        assert reply.finish_reason in ("length", "stop")
    assert not engine.alive()


class Gate:
    """Holds the engine's thread inside a tick until it is opened."""

    def __init__(self, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
        self.reached, self.opened = threading.Event(), threading.Event()
        original = engine.loop.runner.tick

        def tick(*args: Any) -> Any:
            self.reached.set()
            assert self.opened.wait(TIMEOUT_S)
            return original(*args)

        monkeypatch.setattr(engine.loop.runner, "tick", tick)

    def wait(self) -> None:
        assert self.reached.wait(TIMEOUT_S)


def test_closing_cancels_what_has_not_finished(started, monkeypatch):
    engine = started(max_rows=1)
    gate = Gate(engine, monkeypatch)
    events: queue.Queue[tuple[int, Event]] = queue.Queue()
    engine.submit(
        [request(3, max_tokens=50, ignore_eos=True), request(4)], lambda index, event: events.put((index, event))
    )
    gate.wait()

    closing = threading.Thread(target=engine.close, daemon=True)
    closing.start()
    with engine._changed:
        engine._changed.wait_for(lambda: all(row.cancelled for row in engine.loop.scheduler.waiting), TIMEOUT_S)
    gate.opened.set()
    closing.join(TIMEOUT_S)

    assert not closing.is_alive()
    seen = defaultdict(list)
    while not events.empty():
        index, event = events.get()
        seen[index].append(event.finish_reason)
    for reasons in seen.values():
        assert reasons[-1] == "cancelled"
        assert not any(reasons[:-1])
    assert seen.keys() == {0, 1}


@pytest.mark.parametrize("drain_s", [0.0, 0.2])
def test_closing_does_not_wait_for_a_device_call_that_hangs(drain_s, started, monkeypatch):
    monkeypatch.setattr("trm.engine.engine.CLOSE_S", 0.3)
    engine = started(max_rows=1)
    gate = Gate(engine, monkeypatch)
    [handle] = engine.submit([request(3)])
    gate.wait()
    began = time.monotonic()

    [ended] = in_threads(lambda: engine.close(drain_s))

    assert ended is False
    assert drain_s + 0.3 <= time.monotonic() - began < drain_s + 5
    gate.opened.set()
    assert in_threads(handle.result)[0].finish_reason == "cancelled"
    assert in_threads(engine.close) == [True]


def test_closed_engine_takes_no_more_requests(started):
    engine = started()
    assert engine.close() is True

    with pytest.raises(DeviceError, match="shut down"):
        engine.submit([request()])
    assert not engine.alive()
    engine.close()


def test_engine_that_was_never_started_closes_too(chat):
    engine = make_engine(chat)
    listener = Listener(engine)
    running, waiting = listener.submit(request(3, max_tokens=30, ignore_eos=True), request(4))
    engine.step()

    assert engine.close() is True

    assert listener.reply(running).finish_reason == listener.reply(waiting).finish_reason == "cancelled"
    assert not engine.alive()
    assert_empty(engine)


def test_device_that_computes_no_more_ends_the_engine(started, monkeypatch):
    """A call fails, then the smallest sum does: no row can be served, not even those that had no part in it."""
    engine = started(max_rows=1)
    gate = Gate(engine, monkeypatch)
    handles = engine.submit([request(3), request(4)])
    gate.wait()
    engine.loop.runner.device = torch.device("meta")  # which holds no numbers to add
    monkeypatch.setattr(engine.loop.runner, "logits", lambda *args, **kwargs: 1 / 0)
    gate.opened.set()

    for handle in handles:
        with pytest.raises(DeviceError, match="engine died"):
            in_threads(handle.result)
    engine._thread.join(TIMEOUT_S)
    assert not engine.alive()
    with pytest.raises(DeviceError):
        engine.reserve(1)


def fail(error: Exception) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        raise error

    return call


@pytest.mark.parametrize(
    ("failure", "error"), [(RuntimeError("CUDA error"), DeviceError), (KeyError("a bug"), InternalError)]
)
def test_dead_device_ends_every_request_and_takes_no_more(failure, error, started, monkeypatch):
    """Even clearing a slot fails: nothing can be served any more, and nobody may wait for ever."""
    engine = started(max_rows=1)
    gate = Gate(engine, monkeypatch)
    events: queue.Queue[tuple[int, Event]] = queue.Queue()
    engine.submit([request(3), request(4)], lambda index, event: events.put((index, event)))
    gate.wait()
    monkeypatch.setattr(engine.loop.runner, "clear", fail(failure))
    monkeypatch.setattr(engine.loop.runner, "logits", fail(failure))
    gate.opened.set()

    last = dict(events.get(timeout=TIMEOUT_S) for _ in range(2))

    assert last.keys() == {0, 1}
    for event in last.values():
        assert event.finish_reason == "error"
        assert type(event.error) is error
        assert event.usage is not None, "usage comes with the finish_reason"
    assert events.empty()
    engine._thread.join(TIMEOUT_S)
    assert not engine.alive()
    with pytest.raises(DeviceError):
        engine.submit([request()])


def test_listener_that_raises_leaves_nobody_waiting(started, monkeypatch):
    engine = started(max_rows=2)
    gate = Gate(engine, monkeypatch)
    good: queue.Queue[Event] = queue.Queue()

    def bad(index: int, event: Event) -> None:
        raise ValueError("a bug in somebody's listener")

    engine.submit([request(3)], bad)
    engine.submit([request(4), request(5)], lambda index, event: good.put(event) if event.finish_reason else None)
    gate.wait()
    gate.opened.set()

    finals = [good.get(timeout=60) for _ in range(2)]

    assert all(event.finish_reason for event in finals)


def test_listener_may_submit_and_cancel(started):
    """It runs in the engine's thread, which must not wait for itself."""
    engine = started()
    finals: queue.Queue[tuple[str, Event]] = queue.Queue()
    follow_up = request(6)

    def second(index: int, event: Event) -> None:
        if event.finish_reason:
            finals.put(("second", event))

    def first(index: int, event: Event) -> None:
        if event.finish_reason:
            engine.submit([follow_up], second)
            finals.put(("first", event))

    engine.submit([request(3)], first)

    assert [finals.get(timeout=TIMEOUT_S)[0] for _ in range(2)] == ["first", "second"]


def test_model_is_left_as_it_was(chat, kv_source):
    """The engine borrows it: training may go on afterwards."""
    model = copy.deepcopy(exact_model(kv_source))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    Engine(model, chat, EngineConfig(max_rows=2, max_model_len=32)).generate([request(3), request(9)])

    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_an_engine_whose_step_never_ends_is_not_alive_until_it_does(started):
    engine = started(max_step_s=0.05)
    encode, reached, held = engine.loop.runner.encode, threading.Event(), threading.Event()

    def hang(*args: Any) -> None:
        reached.set()
        held.wait(TIMEOUT_S)
        encode(*args)

    engine.loop.runner.encode = hang
    assert engine.alive()
    [handle] = engine.submit([request(3)])
    reached.wait(TIMEOUT_S)
    held.wait(0.1)
    assert not engine.alive()

    held.set()
    assert handle.result().finish_reason == "length"
    assert any(engine.alive() or threading.Event().wait(0.01) for _ in range(1000)), "the last step has ended"
