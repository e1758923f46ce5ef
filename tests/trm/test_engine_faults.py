"""Cancellation and failure: every accepted request ends exactly once, and nobody else notices."""

import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from tests.trm.conftest import some_prompt
from tests.trm.engines import Listener, assert_empty, expected, make_engine, request, run
from trm.engine import Engine, Reply, Request, SamplingParams
from trm.engine.detokenizer import TextStream
from trm.engine.runner import Chunk
from trm.engine.sampling import choose
from trm.errors import DeviceError, InternalError, Overloaded

# Cancelling


def test_cancelled_while_waiting_never_runs(chat):
    engine = make_engine(chat, max_rows=1)
    listener = Listener(engine)
    first, second = listener.submit(request(3), request(4))
    listener.handles[second].cancel()

    run(engine)

    assert listener.reply(second) == Reply((), "", "cancelled", listener.reply(second).usage)
    assert listener.reply(second).usage.completion_tokens == 0
    assert listener.reply(first).finish_reason == "length"


def test_cancelled_row_leaves_before_the_next_tick(chat, kv_source):
    engine = make_engine(chat, kv_source)
    listener = Listener(engine)
    [number] = listener.submit(request(3, max_tokens=40, ignore_eos=True))
    for _ in range(5):
        engine.step()
    row_steps = engine.stats().row_steps

    listener.handles[number].cancel()
    run(engine)

    assert engine.stats().row_steps == row_steps
    assert listener.reply(number).finish_reason == "cancelled"
    assert_empty(engine)


def test_cancelling_what_has_ended_is_harmless(chat):
    engine = make_engine(chat)
    listener = Listener(engine)
    [number] = listener.submit(request(3))
    run(engine)

    listener.handles[number].cancel()
    listener.handles[number].cancel()
    run(engine)

    assert listener.reply(number).finish_reason == "length"


@pytest.mark.parametrize("steps_before", range(7))
def test_next_tenant_of_a_cancelled_rows_slot_is_right(steps_before, chat, kv_source):
    engine = make_engine(chat, kv_source, max_rows=1, prefill_chunk=4)
    listener = Listener(engine)
    [gone, stays] = listener.submit(request(21, max_tokens=20, ignore_eos=True), request(2, seed=5, max_tokens=9))
    for _ in range(steps_before):
        engine.step()
    listener.handles[gone].cancel()
    run(engine)

    assert listener.reply(gone).finish_reason == "cancelled"
    assert listener.reply(stays).token_ids == expected(engine, listener.handles[stays].request).token_ids


# Failures


@pytest.mark.parametrize("call", ["encode", "tick", "logits"])
def test_failing_model_call_fails_its_rows_and_no_others(call, chat, kv_source, monkeypatch):
    engine = make_engine(chat, kv_source, max_rows=2)
    listener = Listener(engine)
    original = getattr(engine.loop.runner, call)
    left = [True]

    def fail_once(*args: Any, **kwargs: Any) -> Any:
        if left and left.pop():
            raise RuntimeError("CUDA error: an illegal memory access, of someone's secret prompt")
        return original(*args, **kwargs)

    monkeypatch.setattr(engine.loop.runner, call, fail_once)
    numbers = listener.submit(*[request(length, max_tokens=6) for length in (5, 9, 4, 7)])
    run(engine)

    assert [listener.reply(number).finish_reason == "error" for number in numbers] == [True, True, False, False]
    for number in numbers[:2]:
        error = listener.events[number][-1].error
        assert isinstance(error, DeviceError)
        assert "secret" not in str(error)
    for number in numbers[2:]:
        assert listener.reply(number).token_ids == expected(engine, listener.handles[number].request).token_ids
    assert_empty(engine)


@pytest.mark.parametrize(
    ("failure", "kind"),
    [
        (RuntimeError("CUDA error: misaligned address"), DeviceError),
        (torch.OutOfMemoryError("out of memory"), DeviceError),
        (MemoryError(), DeviceError),
        (ZeroDivisionError("someone's secret"), InternalError),
        (KeyError("someone's secret"), InternalError),
        (NotImplementedError("someone's secret"), InternalError),
        (RecursionError("someone's secret"), InternalError),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else value.__name__,
)
def test_failures_of_the_device_and_our_own_are_told_apart(failure, kind, chat, monkeypatch):
    def fail(*args: Any) -> None:
        raise failure

    engine = make_engine(chat)
    listener = Listener(engine)
    monkeypatch.setattr(engine.loop.runner, "tick", fail)
    [number] = listener.submit(request(3))
    run(engine)

    error = listener.events[number][-1].error
    assert type(error) is kind
    assert type(failure).__name__ in str(error)
    assert ("device" in str(error)) == (kind is DeviceError)
    assert "secret" not in str(error)


class Panic(BaseException):
    """What a library in Rust raises where it panics is no Exception either."""


@pytest.mark.parametrize("failure", [RuntimeError("secret"), Panic("secret")], ids=["runtime-error", "panic"])
@pytest.mark.parametrize("place", ["push", "finish"])
def test_failures_outside_the_model_are_ours_and_end_one_request(place, failure, chat, monkeypatch):
    """A RuntimeError of plain Python is not the device's."""
    engine = make_engine(chat)
    listener = Listener(engine)
    real, calls = getattr(TextStream, place), []

    def fail_once(self: TextStream, *args: Any) -> Any:
        calls.append(self)
        if self is calls[0]:
            raise failure
        return real(self, *args)

    monkeypatch.setattr(TextStream, place, fail_once)
    numbers = listener.submit(request(3), request(4))
    run(engine)

    ends = [listener.events[number][-1] for number in numbers]
    assert sorted(str(end.finish_reason) for end in ends) == ["error", "length"]
    [error] = [end.error for end in ends if end.error]
    assert type(error) is InternalError
    assert "secret" not in str(error)


def test_row_whose_admission_fails_gets_its_final_event_too(chat, monkeypatch):
    """It must be in a list at every moment: what is in none cannot be told that the engine died."""
    engine = make_engine(chat)
    monkeypatch.setattr(engine.loop.scheduler, "_best_source", lambda row: 1 / 0)
    engine.start()

    handles = engine.submit([request(3), request(4)])

    for handle in handles:
        with pytest.raises(InternalError):
            handle.result()


def test_reply_that_cannot_be_decoded_to_text_is_a_bug_of_ours(chat, monkeypatch):
    engine = make_engine(chat)
    listener = Listener(engine)
    monkeypatch.setattr(TextStream, "finish", lambda self: 1 / 0)
    [number] = listener.submit(request(3))
    run(engine)

    assert type(listener.events[number][-1].error) is InternalError


def test_failure_in_one_stage_spares_rows_in_another(chat, kv_source, monkeypatch):
    """A row that is being prefilled has no part in a tick that fails, and the other way round."""
    engine = make_engine(chat, kv_source, max_rows=2, prefill_chunk=2)
    listener = Listener(engine)
    [thinking] = listener.submit(request(1, max_tokens=30, ignore_eos=True))
    engine.step()
    [prefilling] = listener.submit(request(21))
    engine.step()
    with monkeypatch.context() as patch:
        patch.setattr(engine.loop.runner, "tick", lambda *args: 1 / 0)
        engine.step()
    run(engine)

    assert listener.reply(thinking).finish_reason == "error"
    assert listener.reply(prefilling).token_ids == expected(engine, listener.handles[prefilling].request).token_ids


POISON = 15


def poison(engine: Engine, monkeypatch: pytest.MonkeyPatch, *, backbone: bool = True) -> None:
    """Whoever has POISON in the cached part of its prompt gets keys and values that overflowed.

    `backbone` False: only those of the recursion.
    """
    runner, original = engine.loop.runner, engine.loop.runner.encode

    def encode(chunks: Sequence[Chunk]) -> None:
        original(chunks)
        for chunk in chunks:
            for position, token in enumerate(chunk.tokens, chunk.start):
                if token == POISON and chunk.place is None:
                    for table in (runner.backbone_slots, runner.slots) if backbone else (runner.slots,):
                        table.keys[:, chunk.slot, :, position] = float("nan")
                        table.values[:, chunk.slot, :, position] = float("inf")

    monkeypatch.setattr(runner, "encode", encode)


def poisoned(**params: Any) -> Request:
    return Request((3, 4, 5, 6, 7, 8, POISON, 9, 10, 11), SamplingParams(max_tokens=5, **params))


def clean(length: int, **params: Any) -> Request:
    prompt = [min(token, POISON - 1) for token in some_prompt(length, vocab_size=16)]
    return Request(tuple(prompt), SamplingParams(**({"max_tokens": 6, "ignore_eos": True} | params)))


def test_row_that_is_not_finite_fails_alone(chat, kv_source, monkeypatch):
    engine = make_engine(chat, kv_source, max_rows=4)
    poison(engine, monkeypatch)
    listener = Listener(engine)

    before, bad, after, later = listener.submit(clean(8), poisoned(), clean(12), clean(5))
    run(engine)

    reply = listener.reply(bad)
    assert (reply.finish_reason, reply.token_ids) == ("error", ())
    assert isinstance(listener.events[bad][-1].error, DeviceError)
    assert "finite" in str(listener.events[bad][-1].error)
    for number in (before, after, later):
        assert listener.reply(number).token_ids == expected(engine, listener.handles[number].request).token_ids
    assert_empty(engine)


def test_next_tenant_of_a_failed_rows_slot_is_right(chat, kv_source, monkeypatch):
    """NaN in a masked key still poisons a softmax: the slot must be cleared.

    The long neighbour widens the view, so that the tenant's row reaches over what the failed one has left.
    """
    engine = make_engine(chat, kv_source, max_rows=2)
    poison(engine, monkeypatch)
    listener = Listener(engine)
    neighbour, bad, good = listener.submit(clean(21, max_tokens=20), poisoned(), clean(3))

    run(engine)

    assert listener.reply(bad).finish_reason == "error"
    for number in (good, neighbour):
        assert listener.reply(number).token_ids == expected(engine, listener.handles[number].request).token_ids


@pytest.mark.parametrize("steps_before", [1, 2, 3])
def test_next_tenant_is_right_after_a_row_that_was_cancelled_before_it_could_fail(
    steps_before, chat, kv_source, monkeypatch
):
    """Its keys overflowed in the prefill, and nobody has looked at its logits yet."""
    engine = make_engine(chat, kv_source, max_rows=2)
    poison(engine, monkeypatch)
    listener = Listener(engine)
    neighbour, bad, good = listener.submit(clean(21, max_tokens=20), poisoned(n_supervision=4), clean(3))
    for _ in range(steps_before):
        engine.step()
    assert not listener.events[bad]

    listener.handles[bad].cancel()
    run(engine)

    assert listener.reply(bad).finish_reason == "cancelled"
    for number in (good, neighbour):
        assert listener.reply(number).finish_reason == "length"
        assert listener.reply(number).token_ids == expected(engine, listener.handles[number].request).token_ids


def test_next_tenant_is_right_after_a_row_that_never_looked_at_its_keys(chat, monkeypatch):
    """At effort 0 the context's keys are cached and never read: the reply is fine, what is left in the slot is not."""
    engine = make_engine(chat, max_rows=2)
    poison(engine, monkeypatch, backbone=False)
    listener = Listener(engine)
    numbers = listener.submit(clean(21, max_tokens=20), poisoned(n_supervision=0), clean(3))

    run(engine)

    for number in numbers:
        assert listener.reply(number).finish_reason != "error"
        assert listener.reply(number).token_ids == expected(engine, listener.handles[number].request).token_ids


def test_cache_is_born_as_zeros(chat, kv_source):
    """`torch.empty` may hold NaN, which poisons even where it is masked."""
    runner = make_engine(chat, kv_source).loop.runner

    for table in (runner.backbone_slots, runner.slots):
        assert not table.keys.any()
        assert not table.values.any()


# Any mixture of failures


class ErraticRunner:
    """Stands for the model: gives random logits, fails now and then, and knows which slots were cleared."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng

    def call(self, *args: Any) -> None:
        if self.rng.random() < 0.03:
            raise RuntimeError("out of memory")

    encode = copy = call

    def seat(self, *args: Any) -> None:
        """One decoder is as good as another."""

    leave = seat

    def probe(self) -> None:
        """The device is well."""

    late = False

    def tick(self, *args: Any) -> None:
        self.call()

    def finite(self, *args: Any) -> bool:
        self.call()
        return self.rng.random() < 0.9

    def logits(self, slots: Sequence[int], *args: Any) -> torch.Tensor:
        self.call()
        scores = torch.tensor([[self.rng.random() for _ in range(16)] for _ in slots])
        for row in scores:
            if self.rng.random() < 0.02:
                row[self.rng.randrange(16)] = self.rng.choice([float("nan"), float("inf"), -float("inf")])
        return scores

    def choose(self, slots: Sequence[int], places: Any, asks: Sequence[Any], ahead: Any) -> Any:
        return choose(self.logits(slots), asks)

    def clear(self, slot: int, start: int = 0, end: int | None = None) -> None:
        """Nothing is kept."""


@pytest.mark.parametrize("draft", [0, 2])
@pytest.mark.parametrize("seed", range(3))
def test_every_accepted_request_ends_exactly_once_whatever_happens(seed, draft, chat, caplog):
    rng = random.Random(seed)
    engine = make_engine(chat, draft=draft, max_rows=3, max_queue=4, prefill_chunk=5)
    engine.loop.runner = ErraticRunner(rng)  # type: ignore[assignment]
    listener = Listener(engine)
    refused = 0
    with caplog.at_level("CRITICAL"):
        for _ in range(10_000):
            match rng.randrange(6):
                case 0 | 1:
                    wanted = [
                        request(rng.randint(1, 12), max_tokens=rng.randint(1, 6)) for _ in range(rng.randint(1, 3))
                    ]
                    try:
                        listener.submit(*wanted)
                    except Overloaded:
                        refused += 1
                case 2 if listener.handles:
                    listener.handles[rng.randrange(max(0, len(listener.handles) - 8), len(listener.handles))].cancel()
                case _:
                    engine.step()
            used = [row.slot for row in engine.loop.scheduler.running]
            assert sorted([*used, *engine.loop.scheduler._free]) == [0, 1, 2]
        engine.close()

    reasons = [listener.reply(number).finish_reason for number in listener.handles]
    assert set(reasons) == {"stop", "length", "cancelled", "error"}
    assert refused
    assert_empty(engine)
