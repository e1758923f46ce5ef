"""Traces: what every step would have said, beside the tokens, which they leave as they are."""

import pytest
import torch

from tests.conftest import make_model
from tests.trm.engines import KV_SOURCES, Listener, assert_empty, expected, find_ending, make_engine, request, run
from trm.engine import Engine, EngineConfig, Request, SamplingParams
from trm.engine.request import MAX_TRACE
from trm.errors import BadRequest


def recomputed(model, prompt, effort, num):
    """The candidates after steps 0 to `effort` for the token behind `prompt`, from passes over all of it."""
    ids = torch.tensor([prompt])
    with torch.inference_mode():
        own = model(ids, n_supervision=0, logits_to_keep=1).logits
        deeper = model(ids, n_supervision=effort, logits_to_keep=1, return_all_steps=True).all_logits
    logits = torch.stack([own, *(deeper if deeper is not None else [])])[:, 0, -1]
    top = logits.log_softmax(dim=-1).topk(num)
    steps = zip(top.indices.tolist(), top.values.tolist(), strict=True)
    return [[*zip(tokens, logprobs, strict=True)] for tokens, logprobs in steps]


def assert_traced(engine, one, reply):
    """The reply's traces are those of `forward` at every prefix; to float32, in which they are reported."""
    assert len(reply.traces) == len(reply.token_ids)
    for place, trace in enumerate(reply.traces):
        prefix = [*one.prompt_ids, *reply.token_ids[:place]]
        want = recomputed(engine.model, prefix, len(trace) - 1, one.params.trace)
        assert [[token for token, _ in step] for step in trace] == [[token for token, _ in step] for step in want]
        for step, wanted in zip(trace, want, strict=True):
            assert [logprob for _, logprob in step] == pytest.approx([logprob for _, logprob in wanted], abs=1e-5)


@pytest.mark.parametrize("kv_source", KV_SOURCES)
@pytest.mark.parametrize("effort", [0, 1, 3])
def test_every_step_is_that_of_the_model(kv_source, effort, chat):
    engine = make_engine(chat, kv_source)
    one = request(5, n_supervision=effort, ignore_eos=True, trace=4)

    [reply] = engine.generate([one])

    assert_traced(engine, one, reply)
    assert effort == 0 or any(trace[0] != trace[-1] for trace in reply.traces), "the recursion says something else"
    assert [len(trace) for trace in reply.traces] == [1 + effort] * 5
    assert tuple(trace[-1][0][0] for trace in reply.traces) == reply.token_ids == expected(engine, one).token_ids
    assert_empty(engine)


@pytest.mark.parametrize("kv_source", KV_SOURCES)
@pytest.mark.parametrize("draft", [0, 4])
def test_tracing_changes_nobodys_tokens(kv_source, draft, chat):
    """Rows of many depths, three of them traced, two of those drawn; drafts are for the others only."""
    engine = make_engine(chat, kv_source, draft=draft)
    asked = [
        {"n_supervision": 3, "trace": 3},
        {"n_supervision": 4},
        {"n_supervision": 2, "temperature": 1.0, "seed": 3},
        {"n_supervision": 2, "temperature": 1.0, "seed": 3, "sample_index": 1, "trace": MAX_TRACE},
        {"n_supervision": 2, "temperature": 1.0, "seed": 3, "sample_index": 2, "trace": 1},
        {"n_supervision": 0, "trace": 2},
        {"n_supervision": 1},
    ]
    requests = [request(4, max_tokens=9, ignore_eos=True, **params) for params in asked]

    replies = engine.generate(requests)

    for one, reply in zip(requests, replies, strict=True):
        assert reply.token_ids == expected(engine, one).token_ids
        if one.params.trace:
            assert_traced(engine, one, reply)
            assert reply.usage.draft_tokens == 0
        else:
            assert reply.traces == ()
            assert (reply.usage.draft_tokens > 0) == (draft > 0)
    assert_empty(engine)


def test_a_token_that_halts_has_the_steps_it_took(chat):
    engine = make_engine(chat)
    one = request(5, n_supervision=4, max_tokens=10, ignore_eos=True, halt_tolerance=0.3, trace=2)

    [reply] = engine.generate([one, request(7, n_supervision=4, max_tokens=8, ignore_eos=True)])[:1]

    taken = [len(trace) - 1 for trace in reply.traces]
    assert tuple(taken) == expected(engine, one).steps
    assert len(set(taken)) > 1, "some tokens halt, at various depths"
    assert_traced(engine, one, reply)


def test_traces_come_with_their_tokens_and_the_end_token_has_one(chat):
    engine = make_engine(chat)
    listener = Listener(engine)
    one = find_ending("context", n_supervision=2, trace=2)

    [number] = listener.submit(one)
    run(engine)

    assert all(len(event.traces) == len(event.token_ids) for event in listener.events[number])
    assert listener.reply(number).finish_reason == "stop"
    assert_traced(engine, one, listener.reply(number))


def test_only_traced_rows_are_read_out_before_they_answer(chat, monkeypatch):
    engine = make_engine(chat)
    read: list[int] = []
    logits = engine.loop.runner.logits

    def count(slots, *args, **kwargs):
        read.append(len(slots))
        return logits(slots, *args, **kwargs)

    monkeypatch.setattr(engine.loop.runner, "logits", count)
    plain = [request(length, n_supervision=4, max_tokens=3, ignore_eos=True) for length in (3, 4, 5)]

    engine.generate(plain)
    without = sum(read)
    read.clear()
    engine.generate([*plain, request(6, n_supervision=2, max_tokens=3, ignore_eos=True, trace=1)])

    assert without == 3 * 3
    assert sum(read) == without + 3 * (1 + 2)


@pytest.mark.parametrize("num", [-1, 0, MAX_TRACE + 1])
def test_a_trace_has_limits(num):
    with pytest.raises(BadRequest, match=f"at least 1 and at most {MAX_TRACE}") as caught:
        SamplingParams(trace=num)

    assert caught.value.param == "trace"


def test_no_more_candidates_than_the_model_knows_tokens(chat):
    engine = Engine(make_model(sizes={"vocab_size": 8}), chat, EngineConfig(max_rows=1, max_model_len=64))

    with pytest.raises(BadRequest, match="8 tokens") as caught:
        engine.submit([Request((3, 4), SamplingParams(max_tokens=1, trace=9))])

    assert caught.value.param == "trace"
