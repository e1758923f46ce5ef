"""The engine: every reply exactly as if its request were alone, and every request ended exactly once.

Promises P2, P7, P8 and P9 of the design, against the slow reference in float64; failures, cancellation,
overload and shutdown; threads. Waiting is bounded by `TIMEOUT_S`, and nothing sleeps.
"""

import copy
import queue
import random
import threading
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.conftest import make_model
from tests.trm.conftest import END, NEAR_TIE, assert_same_tokens, exact_model, solo, some_prompt
from trm import reference
from trm.chat import ChatFormat
from trm.engine import Engine, EngineConfig, Event, Handle, Reply, Request, SamplingParams
from trm.errors import BadRequest, ConfigError, DeviceError, Overloaded

TIMEOUT_S = 60
KV_SOURCES = ("context", "state")


def request(length: int = 4, seed: int = 0, **params: Any) -> Request:
    """A random prompt for `exact_model`."""
    prompt = some_prompt(length, seed, vocab_size=16)
    return Request(tuple(prompt), SamplingParams(**({"max_tokens": 5} | params)))


def make_engine(chat: ChatFormat, kv_source: str = "context", **config: Any) -> Engine:
    return Engine(exact_model(kv_source), chat, EngineConfig(**({"max_rows": 4, "max_model_len": 64} | config)))


def expected(engine: Engine, one: Request) -> reference.ReferenceReply:
    return solo(engine.model.config.kv_source, one.prompt_ids, one.params)


def run(engine: Engine) -> None:
    while engine.step():
        pass


class Listener:
    """Collects the events of requests submitted through it, and checks that each ends exactly once."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.events: dict[int, list[Event]] = defaultdict(list)
        self.handles: dict[int, Handle] = {}

    def submit(self, *requests: Request) -> list[int]:
        """Submit all together; returns their numbers."""
        first = len(self.handles)
        handles = self.engine.submit(requests, lambda index, event: self.events[first + index].append(event))
        numbers = list(range(first, first + len(handles)))
        self.handles |= dict(zip(numbers, handles, strict=True))
        return numbers

    def reply(self, number: int) -> Reply:
        """The whole reply. Fails unless the request has ended exactly once."""
        events = self.events[number]
        assert [event.finish_reason is not None for event in events] == [False] * (len(events) - 1) + [True]
        last = events[-1]
        assert (last.error is not None) == (last.finish_reason == "error")
        assert last.usage is not None, "usage comes with the finish_reason"
        ids = tuple(token for event in events for token in event.token_ids)
        return Reply(ids, "".join(event.text for event in events), last.finish_reason or "error", last.usage)


def assert_empty(engine: Engine) -> None:
    """Every slot is free again and nothing is remembered."""
    assert engine.scheduler.running == []
    assert not engine.scheduler.waiting
    assert sorted(engine.scheduler._free) == list(range(engine.config.max_rows))
    assert not engine._streams
    assert not engine.step()


def find_ending(kv_source: str, *, seed: int = 0, **params: Any) -> Request:
    """A request whose reply reaches the end token, though not at once."""
    for length in range(1, 60):
        one = request(length, seed, **({"max_tokens": 12} | params))
        reply = solo(kv_source, one.prompt_ids, replace(one.params, ignore_eos=False)).token_ids
        if reply[-1] == END and 3 <= len(reply) < 12:
            return one
    raise AssertionError("no prompt of this model ends")


# P2 and P9: as if alone


@dataclass(frozen=True)
class Case:
    request: Request
    arrival: int
    cancel_at: int | None


SAMPLED = st.fixed_dictionaries(
    {
        "temperature": st.sampled_from([0.3, 1.0, 2.0]),
        "top_p": st.sampled_from([1.0, 0.9, 0.5]),
        "top_k": st.sampled_from([0, 1, 3]),
        "min_p": st.sampled_from([0.0, 0.1]),
        "seed": st.integers(0, 5),
        "sample_index": st.integers(0, 2),
    }
)
PARAMS = st.builds(
    lambda common, sampled: SamplingParams(**common, **sampled),
    st.fixed_dictionaries(
        {
            "max_tokens": st.integers(1, 6),
            "n_supervision": st.sampled_from([None, 0, 1, 2, 3, 4]),
            "ignore_eos": st.booleans(),
        }
    ),
    st.one_of(st.just({}), SAMPLED),
)
CASES = st.builds(
    Case,
    st.builds(
        lambda length, seed, params: Request(tuple(some_prompt(length, seed, 16)), params),
        st.sampled_from([1, 2, 3, 5, 8, 13, 21]),
        st.integers(0, 2),
        PARAMS,
    ),
    arrival=st.integers(0, 12),
    cancel_at=st.one_of(st.none(), st.none(), st.integers(0, 16)),
)


@pytest.mark.parametrize("kv_source", KV_SOURCES)
@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    cases=st.lists(CASES, min_size=1, max_size=7),
    max_rows=st.integers(1, 4),
    prefill_chunk=st.sampled_from([1, 3, 7, 256]),
)
def test_every_reply_is_as_if_alone(chat, kv_source, cases, max_rows, prefill_chunk):
    """Whatever arrives when, is cancelled, waits, or shares a slot, a tick or a prefill with whatever else."""
    engine = make_engine(chat, kv_source, max_rows=max_rows, prefill_chunk=prefill_chunk)
    listener = Listener(engine)
    numbers: dict[int, int] = {}
    busy, now = True, 0
    while busy or now <= max(case.arrival for case in cases):
        for index, case in enumerate(cases):
            if case.arrival == now:
                [numbers[index]] = listener.submit(case.request)
            if case.cancel_at is not None and case.arrival <= case.cancel_at == now:
                listener.handles[numbers[index]].cancel()
        busy, now = engine.step(), now + 1

    for index, case in enumerate(cases):
        reply, want = listener.reply(numbers[index]), expected(engine, case.request)
        params = case.request.params
        steps = 2 if params.n_supervision is None else params.n_supervision
        assert reply.text == chat.decode(reply.token_ids)
        assert reply.usage.prompt_tokens == len(case.request.prompt_ids)
        assert reply.usage.completion_tokens == len(reply.token_ids)
        if reply.finish_reason == "cancelled":
            assert case.cancel_at is not None
            assert reply.token_ids == want.token_ids[: len(reply.token_ids)]
        else:
            assert reply.token_ids == want.token_ids
            ended = want.token_ids[-1] == END and not params.ignore_eos
            assert reply.finish_reason == ("stop" if ended else "length")
            assert reply.usage.supervision_steps == steps * len(reply.token_ids)
    assert_empty(engine)


@pytest.mark.parametrize("params", [{}, {"temperature": 1.0, "seed": 7}], ids=["greedy", "sampled"])
def test_request_is_the_same_alone_and_among_64_others(params, chat, kv_source):
    one = request(9, max_tokens=8, **params)
    crowd = [
        request(1 + index % 23, index, max_tokens=1 + index % 7, n_supervision=index % 5, temperature=float(index % 2))
        for index in range(64)
    ]
    engine = make_engine(chat, kv_source, max_rows=8)

    replies = engine.generate([*crowd[:40], one, *crowd[40:]])

    assert replies[40] == make_engine(chat, kv_source, max_rows=1).generate([one])[0]
    assert replies[40].token_ids == expected(engine, one).token_ids


def test_float32_replies_equal_the_reference_but_for_near_ties(chat, kv_source):
    model = make_model(kv_source=kv_source)
    engine = Engine(model, chat, EngineConfig(max_rows=8, max_model_len=256, prefill_chunk=64))
    lengths = [1, 200, 3, 150, 1, 64, 63, 65, 20, 7, 100, 2]
    requests = [Request(tuple(some_prompt(n)), SamplingParams(max_tokens=5)) for n in lengths]

    for one, reply in zip(requests, engine.generate(requests), strict=True):
        assert_same_tokens(reply.token_ids, reference.decode(model, one.prompt_ids, one.params, END), NEAR_TIE)


@pytest.mark.parametrize("family", ["qwen2", "llama"])
@pytest.mark.parametrize("n_layers", [1, 2], ids=["L1", "L2"])
def test_layers_and_families_equal_the_reference(family, n_layers, chat, kv_source):
    model = make_model(family, kv_source=kv_source, scale=1.0, n_layers=n_layers).double()
    engine = Engine(model, chat, EngineConfig(max_rows=2, max_model_len=64, prefill_chunk=5))
    requests = [
        Request(tuple(some_prompt(n)), SamplingParams(max_tokens=4, n_supervision=n % 4)) for n in (3, 14, 1, 6)
    ]

    for one, reply in zip(requests, engine.generate(requests), strict=True):
        assert reply.token_ids == reference.decode(model, one.prompt_ids, one.params, END).token_ids


def test_seed_sample_and_only_they_change_a_sampled_reply(chat):
    engine = make_engine(chat)
    keys = [{"seed": 1}, {"seed": 1}, {"seed": 2}, {"seed": 1, "sample_index": 1}]

    first, same, other_seed, other_sample = engine.generate(
        [request(5, max_tokens=12, temperature=1.5, ignore_eos=True, **key) for key in keys]
    )

    assert first == same
    assert len({first.token_ids, other_seed.token_ids, other_sample.token_ids}) == 3


# P7: the end


def test_end_token_is_in_the_ids_and_not_in_the_text(chat, kv_source):
    engine = make_engine(chat, kv_source)

    [reply] = engine.generate([find_ending(kv_source)])

    assert reply.finish_reason == "stop"
    assert reply.token_ids[-1] == END
    assert reply.token_ids.count(END) == 1
    assert reply.text == chat.decode(reply.token_ids[:-1])
    assert "<|" not in reply.text


def test_end_token_ends_its_own_row_only(chat, kv_source):
    engine = make_engine(chat, kv_source)
    ending = find_ending(kv_source)
    others = [request(length, max_tokens=14, ignore_eos=True) for length in (3, 8)]

    replies = engine.generate([others[0], ending, others[1]])

    assert [reply.finish_reason for reply in replies] == ["length", "stop", "length"]
    assert [len(reply.token_ids) for reply in replies][::2] == [14, 14]


def test_ignore_eos_goes_on_past_the_end_token(chat, kv_source):
    engine = make_engine(chat, kv_source)
    ending = find_ending(kv_source, ignore_eos=True)

    [reply] = engine.generate([ending])

    assert reply.finish_reason == "length"
    assert len(reply.token_ids) == 12
    assert END in reply.token_ids[:-1]
    assert reply.text == chat.decode(reply.token_ids)


def test_end_token_as_the_last_allowed_token_is_a_stop(chat, kv_source):
    engine = make_engine(chat, kv_source)
    ending = find_ending(kv_source)
    tokens = len(expected(engine, ending).token_ids)

    [exactly, shorter] = engine.generate(
        [Request(ending.prompt_ids, replace(ending.params, max_tokens=n)) for n in (tokens, tokens - 1)]
    )

    assert (exactly.finish_reason, shorter.finish_reason) == ("stop", "length")


# Stop strings


@pytest.mark.parametrize(("start", "length"), [(0, 1), (3, 1), (3, 2), (4, 3), (2, 5)], ids=str)
def test_stop_string_ends_the_reply_and_no_part_of_it_is_streamed(start, length, chat, kv_source):
    engine = make_engine(chat, kv_source)
    free = request(5, seed=3, max_tokens=14, ignore_eos=True)
    whole = expected(engine, free).token_ids
    text = chat.decode(whole)
    stop = text[start : start + length]
    listener = Listener(engine)

    [number] = listener.submit(Request(free.prompt_ids, replace(free.params, stop=("not in there", stop))))
    run(engine)

    reply = listener.reply(number)
    assert reply.finish_reason == "stop"
    assert reply.text == text[: text.index(stop)]
    assert reply.token_ids == whole[: len(reply.token_ids)]
    assert chat.decode(reply.token_ids).endswith(stop), "it ended as soon as the stop string was whole"
    assert reply.usage.completion_tokens == len(reply.token_ids)
    assert_empty(engine)


def test_beginning_of_a_stop_string_is_released_at_the_end(chat):
    engine = make_engine(chat)
    free = request(5, seed=3, max_tokens=6, ignore_eos=True)
    text = chat.decode(expected(engine, free).token_ids)

    [reply] = engine.generate([Request(free.prompt_ids, replace(free.params, stop=(text[-2:] + "never",)))])

    assert reply.text == text
    assert reply.finish_reason == "length"


# What is refused


def test_impossible_request_is_refused_with_the_arithmetic(chat):
    engine = make_engine(chat, max_model_len=20)

    with pytest.raises(BadRequest, match=r"14 tokens.*max_tokens is 7.*together 21.*takes 20") as caught:
        engine.submit([request(14, max_tokens=7)])

    assert caught.value.code == "context_length_exceeded"
    assert caught.value.param == "messages"
    assert_empty(engine)


def test_request_that_just_fits_is_served_exactly(chat, kv_source):
    engine = make_engine(chat, kv_source, max_model_len=20, max_rows=1)
    one = request(14, max_tokens=6, ignore_eos=True)

    [reply] = engine.generate([one])

    assert len(reply.token_ids) == 6
    assert reply.token_ids == expected(engine, one).token_ids


@pytest.mark.parametrize(
    ("prompt", "params", "message", "param"),
    [
        ((), {}, "empty", "messages"),
        ((3, 16), {}, "outside 0 to 15", "prompt"),
        ((3, -1), {}, "outside 0 to 15", "prompt"),
        ((3,), {"n_supervision": 5}, "5.*0 to 4", "supervision_steps"),
        ((3,), {"n_supervision": -1}, "-1.*0 to 4", "supervision_steps"),
    ],
    ids=["empty", "token-too-large", "token-negative", "effort-too-high", "effort-negative"],
)
def test_request_that_could_never_be_served_is_refused(prompt, params, message, param, chat):
    engine = make_engine(chat)

    with pytest.raises(BadRequest, match=message) as caught:
        engine.submit([request(), Request(prompt, SamplingParams(max_tokens=5, **params))])

    assert caught.value.param == param
    assert_empty(engine)


def test_overload_is_immediate_and_leaves_the_accepted_alone(chat):
    engine = make_engine(chat, max_rows=1, max_queue=2)
    listener = Listener(engine)
    accepted = listener.submit(request(3), request(4), request(5))

    with pytest.raises(Overloaded):
        listener.submit(request(6))

    run(engine)
    for number in accepted:
        assert listener.reply(number).token_ids == expected(engine, listener.handles[number].request).token_ids
    assert listener.events.keys() == set(accepted)
    listener.submit(request(6))


def test_samples_are_accepted_all_or_none(chat):
    engine = make_engine(chat, max_rows=1, max_queue=2)
    listener = Listener(engine)
    listener.submit(request(3))

    with pytest.raises(Overloaded):
        listener.submit(*[request(4, temperature=1.0, sample_index=index) for index in range(3)])
    assert len(engine.scheduler.waiting) == 1
    assert len(engine._streams) == 1

    run(engine)
    assert listener.events.keys() == {0}


def test_generate_takes_more_requests_than_the_queue_holds(chat):
    """So says its docstring."""
    engine = make_engine(chat, max_rows=2, max_queue=1)
    requests = [request(length) for length in range(1, 11)]

    replies = engine.generate(requests)

    assert [reply.token_ids for reply in replies] == [expected(engine, one).token_ids for one in requests]


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


@pytest.mark.parametrize("call", ["prefill", "feed", "tick", "logits"])
def test_failing_model_call_fails_its_rows_and_no_others(call, chat, kv_source, monkeypatch):
    engine = make_engine(chat, kv_source, max_rows=2)
    listener = Listener(engine)
    original = getattr(engine.runner, call)
    left = [True]

    def fail_once(*args: Any) -> Any:
        if left and left.pop():
            raise RuntimeError("CUDA error: an illegal memory access, of someone's secret prompt")
        return original(*args)

    monkeypatch.setattr(engine.runner, call, fail_once)
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


def test_failure_in_one_stage_spares_rows_in_another(chat, kv_source, monkeypatch):
    """A row that is being prefilled has no part in a tick that fails, and the other way round."""
    engine = make_engine(chat, kv_source, max_rows=2, prefill_chunk=2)
    listener = Listener(engine)
    [thinking] = listener.submit(request(1, max_tokens=30, ignore_eos=True))
    engine.step()
    [prefilling] = listener.submit(request(21))
    engine.step()
    with monkeypatch.context() as patch:
        patch.setattr(engine.runner, "tick", lambda *args: 1 / 0)
        engine.step()
    run(engine)

    assert listener.reply(thinking).finish_reason == "error"
    assert listener.reply(prefilling).token_ids == expected(engine, listener.handles[prefilling].request).token_ids


POISON = 15


def poison(engine: Engine, monkeypatch: pytest.MonkeyPatch, *, backbone: bool = True) -> None:
    """Whoever has POISON in the cached part of its prompt gets keys and values that overflowed.

    `backbone` False: only those of the recursion.
    """
    runner, original = engine.runner, engine.runner.prefill

    def prefill(chunks: Any, steps: Any) -> None:
        original(chunks, steps)
        for chunk in chunks:
            for offset, token in enumerate(chunk.tokens):
                if token == POISON:
                    for table in (runner.backbone_slots, runner.slots) if backbone else (runner.slots,):
                        table.keys[:, chunk.slot, :, chunk.start + offset] = float("nan")
                        table.values[:, chunk.slot, :, chunk.start + offset] = float("inf")

    monkeypatch.setattr(runner, "prefill", prefill)


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
    runner = make_engine(chat, kv_source).runner

    for table in (runner.backbone_slots, runner.slots):
        assert not table.keys.any()
        assert not table.values.any()


# Batching in depth


def test_high_effort_never_slows_low_effort(chat, kv_source):
    """In lockstep decoding every row would pay for the deepest."""
    engine = make_engine(chat, kv_source)
    listener = Listener(engine)
    low, high = listener.submit(
        request(1, n_supervision=1, max_tokens=8, ignore_eos=True),
        request(1, n_supervision=4, max_tokens=8, ignore_eos=True),
    )

    for _ in range(8):
        engine.step()

    assert listener.reply(low).finish_reason == "length", "one token per tick"
    assert len(listener.events[high]) == 2, "one token per four ticks"


def test_rows_at_different_steps_share_a_tick(chat, kv_source):
    engine = make_engine(chat, kv_source)
    efforts = (1, 2, 4, 3)

    engine.generate([request(1, n_supervision=effort, max_tokens=12 // effort, ignore_eos=True) for effort in efforts])

    stats = engine.stats()
    assert stats.row_steps == 4 * 12
    assert stats.ticks == 12


def test_long_prompt_does_not_stall_running_rows(chat, kv_source):
    engine = make_engine(chat, kv_source, prefill_chunk=2)
    listener = Listener(engine)
    [running] = listener.submit(request(1, n_supervision=1, max_tokens=20, ignore_eos=True))
    engine.step()
    [long] = listener.submit(request(21))

    for _ in range(9):
        engine.step()

    assert len(listener.events[running]) == 10
    assert not listener.events[long]


def test_statistics_add_up(chat, kv_source):
    engine = make_engine(chat, kv_source, max_rows=3)
    requests = [request(length, n_supervision=length % 5, max_tokens=4) for length in (1, 3, 8, 21, 2, 5)]

    listener = Listener(engine)
    listener.submit(*requests)
    engine.step()
    stats = engine.stats()
    assert (stats.requests_running, stats.requests_waiting) == (3, 3)
    assert stats.kv_cache_usage_ratio == pytest.approx(sum(one.positions for one in requests[:3]) / (3 * 64))
    run(engine)

    stats = engine.stats()
    replies = [listener.reply(number) for number in listener.handles]
    assert (stats.requests_running, stats.requests_waiting, stats.kv_cache_usage_ratio) == (0, 0, 0)
    assert stats.prompt_tokens == sum(len(one.prompt_ids) for one in requests)
    assert stats.generation_tokens == sum(len(reply.token_ids) for reply in replies)
    assert stats.row_steps == sum(reply.usage.supervision_steps for reply in replies)
    tables = (engine.runner.backbone_slots, engine.runner.slots)
    assert stats.kv_cache_bytes == sum(table.keys.nbytes + table.values.nbytes for table in tables)


# Sizes


@pytest.mark.parametrize("name", ["max_rows", "max_queue", "prefill_chunk", "max_model_len", "kv_cache_bytes"])
def test_impossible_sizes_are_refused_by_name(name):
    with pytest.raises(ConfigError, match=f"{name} is -1; it must be at least"):
        EngineConfig(**{name: -1})


def test_cache_too_small_is_refused_with_the_arithmetic(chat):
    per_token = make_engine(chat).bytes_per_token

    with pytest.raises(
        ConfigError, match=rf"holds 9 positions for each of 4 rows.*{per_token} bytes each.*10 are needed"
    ):
        make_engine(chat, max_model_len=10, kv_cache_bytes=9 * 4 * per_token)
    make_engine(chat, max_model_len=10, kv_cache_bytes=10 * 4 * per_token)


def test_length_follows_the_cache_and_never_exceeds_the_model(chat):
    per_token = make_engine(chat).bytes_per_token

    assert make_engine(chat, max_model_len=None, kv_cache_bytes=100 * 4 * per_token).max_model_len == 100
    assert make_engine(chat, max_model_len=None, kv_cache_bytes=10_000 * 4 * per_token).max_model_len == 512
    with pytest.raises(ConfigError, match="max_model_len is 513; the model has positions for 512"):
        make_engine(chat, max_model_len=513)


def test_keys_from_the_state_cost_cache_for_every_call(chat):
    """Two heads of eight numbers, keys and values, in float64: the backbone's layer, then the recursion's entries."""
    entry = 2 * 2 * 8 * 8

    assert make_engine(chat, "context").bytes_per_token == entry * (1 + 1)
    assert make_engine(chat, "state").bytes_per_token == entry * (1 + 4 * 2 * 2)  # up to twice the trained effort


# Any mixture of failures


class ErraticRunner:
    """Stands for the model: gives random logits, fails now and then, and knows which slots were cleared."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.failing = True

    def call(self, *args: Any) -> None:
        if self.failing and self.rng.random() < 0.03:
            raise RuntimeError("device lost")

    prefill = feed = tick = call

    def logits(self, slots: Sequence[int]) -> torch.Tensor:
        self.call()
        scores = torch.tensor([[self.rng.random() for _ in range(16)] for _ in slots])
        for row in scores:
            if self.rng.random() < 0.02:
                row[self.rng.randrange(16)] = self.rng.choice([float("nan"), float("inf"), -float("inf")])
        return scores

    def clear(self, slot: int) -> None:
        """Nothing is kept."""


@pytest.mark.parametrize("seed", range(3))
def test_every_accepted_request_ends_exactly_once_whatever_happens(seed, chat, caplog):
    rng = random.Random(seed)
    engine = make_engine(chat, max_rows=3, max_queue=4, prefill_chunk=5)
    engine.runner = ErraticRunner(rng)  # type: ignore[assignment]
    listener = Listener(engine)
    refused = 0
    with caplog.at_level("CRITICAL"):
        for _ in range(3000):
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
            used = [row.slot for row in engine.scheduler.running]
            assert sorted([*used, *engine.scheduler._free]) == [0, 1, 2]
        engine.close()

    reasons = [listener.reply(number).finish_reason for number in listener.handles]
    assert set(reasons) == {"stop", "length", "cancelled", "error"}
    assert refused
    assert_empty(engine)


# Threads


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
    monkeypatch.setattr(engine.runner, "feed", lambda *args: 1 / 0)
    [handle] = engine.submit([request(3)])

    with pytest.raises(DeviceError, match="ZeroDivisionError"):
        in_threads(handle.result)
    assert engine.alive(), "the next request may well succeed"


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
        original = engine.runner.tick

        def tick(*args: Any) -> None:
            self.reached.set()
            assert self.opened.wait(TIMEOUT_S)
            original(*args)

        monkeypatch.setattr(engine.runner, "tick", tick)

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
        engine._changed.wait_for(lambda: all(row.cancelled for row in engine.scheduler.waiting), TIMEOUT_S)
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


def test_closed_engine_takes_no_more_requests(started):
    engine = started()
    engine.close()

    with pytest.raises(DeviceError, match="shut down"):
        engine.submit([request()])
    assert not engine.alive()
    engine.close()


def test_engine_that_was_never_started_closes_too(chat):
    engine = make_engine(chat)
    listener = Listener(engine)
    running, waiting = listener.submit(request(3, max_tokens=30, ignore_eos=True), request(4))
    engine.step()

    engine.close()

    assert listener.reply(running).finish_reason == listener.reply(waiting).finish_reason == "cancelled"
    assert not engine.alive()
    assert_empty(engine)


def test_dead_device_ends_every_request_and_takes_no_more(started, monkeypatch):
    """Even clearing a slot fails: nothing can be served any more, and nobody may wait for ever."""
    engine = started(max_rows=1)
    gate = Gate(engine, monkeypatch)
    events: queue.Queue[tuple[int, Event]] = queue.Queue()
    engine.submit([request(3), request(4)], lambda index, event: events.put((index, event)))
    gate.wait()
    monkeypatch.setattr(engine.runner, "clear", lambda slot: 1 / 0)
    monkeypatch.setattr(engine.runner, "logits", lambda slots: 1 / 0)
    gate.opened.set()

    last = dict(events.get(timeout=TIMEOUT_S) for _ in range(2))

    assert last.keys() == {0, 1}
    for event in last.values():
        assert event.finish_reason == "error"
        assert isinstance(event.error, DeviceError)
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

    finals = [good.get(timeout=5) for _ in range(2)]

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
