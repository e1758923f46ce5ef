"""A prompt's beginning is computed once, however many requests share it, and every reply stays as if alone."""

from collections.abc import Sequence
from typing import Any

import pytest

from tests.trm.conftest import some_prompt
from tests.trm.engines import Listener, assert_empty, expected, make_engine, request, run
from trm.engine import Engine, Request, SamplingParams
from trm.engine.runner import Chunk

PROMPT = tuple(some_prompt(21, vocab_size=16))


def ask(*tail: int, head: int = 20, **params: Any) -> Request:
    """A prompt that begins like PROMPT."""
    return Request((*PROMPT[:head], *tail), SamplingParams(**({"max_tokens": 4, "ignore_eos": True} | params)))


def count_prefilled(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Tokens that pass through prefill from now on, one entry for each piece."""
    counts: list[int] = []
    original = engine.loop.runner.encode

    def encode(chunks: Sequence[Chunk]) -> None:
        counts.extend(len(chunk.tokens) for chunk in chunks if chunk.place is None)
        original(chunks)

    monkeypatch.setattr(engine.loop.runner, "encode", encode)
    return counts


def test_samples_of_one_prompt_pay_for_one_prefill(chat, kv_source, monkeypatch):
    engine = make_engine(chat, kv_source, prefill_chunk=6)
    prefilled = count_prefilled(engine, monkeypatch)
    samples = [ask(3, temperature=1.0, seed=5, sample_index=index) for index in range(7)]

    replies = engine.generate(samples)

    assert sum(prefilled) == 20
    assert [reply.token_ids for reply in replies] == [expected(engine, one).token_ids for one in samples]
    assert sorted(reply.usage.cached_tokens for reply in replies) == [0] + [20] * 6
    assert engine.stats().cached_tokens == 6 * 20
    assert_empty(engine)


def test_common_beginning_is_computed_once_across_requests(chat, kv_source, monkeypatch):
    engine = make_engine(chat, kv_source, max_rows=2)
    prefilled = count_prefilled(engine, monkeypatch)
    first, second, third = ask(3, 4, head=12), ask(5, 6, 7, head=12), ask(head=21)

    replies = [engine.generate([one])[0] for one in (first, second, third)]

    assert [reply.usage.cached_tokens for reply in replies] == [0, 12, 12]
    assert prefilled == [13, 2, 8]
    assert [reply.token_ids for reply in replies] == [expected(engine, one).token_ids for one in (first, second, third)]


def test_next_turn_of_a_conversation_finds_prompt_and_reply(chat, kv_source):
    engine = make_engine(chat, kv_source)
    [said] = engine.generate([ask(3)])
    again = Request((*ask(3).prompt_ids, *said.token_ids, 4, 5), SamplingParams(max_tokens=4))

    [reply] = engine.generate([again])

    assert reply.usage.cached_tokens == 21 + len(said.token_ids) - 1, "all but the last token, which was never fed"
    assert reply.token_ids == expected(engine, again).token_ids


def test_drafted_tokens_that_were_wrong_are_no_prefix(chat, kv_source):
    engine = make_engine(chat, kv_source, draft=5)
    [said] = engine.generate([ask(3, max_tokens=9)])
    again = Request((*ask(3).prompt_ids, *said.token_ids, 4), SamplingParams(max_tokens=6))

    [reply] = engine.generate([again])

    assert reply.usage.cached_tokens >= 21
    assert reply.token_ids == expected(engine, again).token_ids


def test_keys_from_the_state_serve_only_shallower_rows(chat):
    engine = make_engine(chat, "state")
    order = [ask(3, n_supervision=2), ask(4, n_supervision=4), ask(5, n_supervision=1), ask(6, n_supervision=0)]

    replies = [engine.generate([one])[0] for one in order]

    assert [reply.usage.cached_tokens for reply in replies] == [0, 0, 20, 20]
    assert [reply.token_ids for reply in replies] == [expected(engine, one).token_ids for one in order]


def test_keys_from_the_context_serve_any_depth(chat):
    engine = make_engine(chat, "context")
    order = [ask(3, n_supervision=1), ask(4, n_supervision=4), ask(5, n_supervision=0), ask(6, n_supervision=2)]

    replies = [engine.generate([one])[0] for one in order]

    assert [reply.usage.cached_tokens for reply in replies] == [0, 20, 20, 20]
    assert [reply.token_ids for reply in replies] == [expected(engine, one).token_ids for one in order]


def test_slot_that_was_used_long_ago_is_given_up_first(chat):
    engine = make_engine(chat, max_rows=2)
    other = request(10, seed=8)

    engine.generate([ask(3)])
    engine.generate([other])
    engine.generate([ask(4)])  # takes the older slot, from itself
    [kept] = engine.generate([other])

    assert kept.usage.cached_tokens == 9


def test_row_whose_source_fails_computes_its_own_prefix(chat, kv_source, monkeypatch):
    engine = make_engine(chat, kv_source, prefill_chunk=4)
    original = engine.loop.runner.encode
    calls = iter(range(100))

    def encode(*args: Any) -> None:
        if next(calls) == 2:
            raise RuntimeError("device lost")
        original(*args)

    monkeypatch.setattr(engine.loop.runner, "encode", encode)
    listener = Listener(engine)
    first, second = listener.submit(ask(3), ask(3, temperature=1.0))
    run(engine)

    assert listener.reply(first).finish_reason == "error"
    assert listener.reply(second).token_ids == expected(engine, listener.handles[second].request).token_ids


def test_row_whose_source_is_cancelled_goes_on(chat, kv_source):
    engine = make_engine(chat, kv_source, prefill_chunk=4)
    listener = Listener(engine)
    first, second = listener.submit(ask(3), ask(3, temperature=1.0))
    engine.step()
    engine.step()
    listener.handles[first].cancel()
    run(engine)

    assert listener.reply(first).finish_reason == "cancelled"
    assert listener.reply(second).token_ids == expected(engine, listener.handles[second].request).token_ids


def test_prefix_that_is_not_finite_is_not_taken_over(chat, kv_source):
    """The row that has it fails when its own logits show it; whoever begins alike must not fail with it."""
    engine = make_engine(chat, kv_source)
    listener = Listener(engine)
    [bad] = listener.submit(ask(3, n_supervision=4, max_tokens=9))
    engine.step()
    slot = engine.loop.scheduler.running[0].slot
    engine.loop.runner.backbone_slots.keys[:, slot, :, 7] = float("nan")

    [good] = listener.submit(ask(4))
    run(engine)

    assert listener.reply(bad).finish_reason == "error"
    assert listener.reply(good).usage.cached_tokens == 0
    assert listener.reply(good).token_ids == expected(engine, listener.handles[good].request).token_ids


def test_cancelled_rows_prefix_serves_the_next(chat, kv_source):
    """Voting stops early by cancelling; the question may well come again."""
    engine = make_engine(chat, kv_source, max_rows=1)
    listener = Listener(engine)
    [gone] = listener.submit(ask(3, max_tokens=20))
    while len(listener.events[gone]) < 2:
        engine.step()
    listener.handles[gone].cancel()
    run(engine)

    [reply] = engine.generate([ask(4)])

    assert reply.usage.cached_tokens == 20
    assert reply.token_ids == expected(engine, ask(4)).token_ids
