"""P4: drafting by the backbone changes how fast a reply comes, and nothing else."""

from dataclasses import replace

import pytest

from tests.conftest import make_model
from tests.trm.conftest import END, NEAR_TIE, assert_same_tokens, some_prompt
from tests.trm.engines import Listener, assert_empty, expected, find_ending, make_engine, request, run
from trm import reference
from trm.engine import Engine, EngineConfig, Request, SamplingParams


@pytest.mark.parametrize("draft", [1, 2, 7])
@pytest.mark.parametrize("params", [{}, {"temperature": 1.0, "seed": 3}], ids=["greedy", "sampled"])
def test_reply_with_drafts_is_the_reply_without(params, draft, chat, kv_source):
    requests = [
        request(length, max_tokens=12, n_supervision=1 + length % 4, ignore_eos=True, **params)
        for length in (1, 5, 9, 14)
    ]
    engine = make_engine(chat, kv_source, draft=draft)

    replies = engine.generate(requests)

    assert [reply.token_ids for reply in replies] == [expected(engine, one).token_ids for one in requests]
    stats = engine.stats()
    assert 0 < stats.accepted_tokens < stats.draft_tokens, "some drafts were right and some were not"
    assert stats.draft_tokens == sum(reply.usage.draft_tokens for reply in replies)
    assert stats.accepted_tokens == sum(reply.usage.accepted_tokens for reply in replies)
    assert_empty(engine)


def test_untrained_decoder_accepts_every_draft_in_one_pass(chat, kv_source):
    """P1: it is the backbone, whatever the effort."""
    model = make_model(kv_source=kv_source, scale=0.0).double()
    engine = Engine(model, chat, EngineConfig(max_rows=1, max_model_len=64, max_draft_tokens=5))
    engine.decoders[None].drafter.length = lambda rows, num_running: 5

    [reply] = engine.generate([Request(tuple(some_prompt(6)), SamplingParams(max_tokens=12, ignore_eos=True))])

    assert reply.usage.draft_tokens == reply.usage.accepted_tokens == 10
    assert reply.usage.supervision_steps == 12 * model.config.n_supervision
    assert engine.stats().ticks == 2 * model.config.n_supervision, "two passes of six tokens each"


def test_draft_never_reaches_beyond_the_last_token(chat, kv_source):
    """Nor beyond the slot: prompt and reply fill it."""
    engine = make_engine(chat, kv_source, draft=7, max_model_len=20)
    one = request(14, max_tokens=6, ignore_eos=True)

    [reply] = engine.generate([one])

    assert reply.token_ids == expected(engine, one).token_ids


def test_end_token_among_accepted_drafts_ends_the_reply(chat, kv_source):
    engine = make_engine(chat, kv_source, draft=7)
    ending = find_ending(kv_source)

    [reply] = engine.generate([ending])

    assert reply.token_ids == expected(engine, ending).token_ids
    assert reply.token_ids.index(END) == len(reply.token_ids) - 1
    assert reply.finish_reason == "stop"


def test_stop_string_among_accepted_drafts_cuts_the_reply(chat):
    engine = make_engine(chat, draft=7)
    free = request(5, seed=3, max_tokens=14, ignore_eos=True)
    whole = expected(engine, free).token_ids
    stop = chat.decode(whole)[3:5]
    listener = Listener(engine)

    [number] = listener.submit(Request(free.prompt_ids, replace(free.params, stop=(stop,))))
    run(engine)

    reply = listener.reply(number)
    assert reply.finish_reason == "stop"
    assert reply.text == chat.decode(whole).split(stop)[0]
    assert reply.token_ids == whole[: len(reply.token_ids)]


def test_rows_that_draft_and_rows_that_cannot_share_their_calls(chat, kv_source):
    """Effort 0 is the backbone itself, and a last token has nothing behind it."""
    engine = make_engine(chat, kv_source, draft=3)
    requests = [
        request(4, n_supervision=0, max_tokens=8, ignore_eos=True),
        request(6, n_supervision=4, max_tokens=8, ignore_eos=True),
        request(9, n_supervision=4, max_tokens=1),
    ]

    replies = engine.generate(requests)

    assert [reply.token_ids for reply in replies] == [expected(engine, one).token_ids for one in requests]
    assert [reply.usage.draft_tokens > 0 for reply in replies] == [False, True, False]


def test_float32_drafts_equal_the_reference_but_for_near_ties(chat, kv_source):
    model = make_model(kv_source=kv_source)
    engine = Engine(model, chat, EngineConfig(max_rows=3, max_model_len=256, max_draft_tokens=4))
    engine.decoders[None].drafter.length = lambda rows, num_running: 4
    requests = [Request(tuple(some_prompt(n)), SamplingParams(max_tokens=24)) for n in (1, 200, 30, 64, 65, 7)]

    for one, reply in zip(requests, engine.generate(requests), strict=True):
        assert_same_tokens(reply.token_ids, reference.decode(model, one.prompt_ids, one.params, END), NEAR_TIE)


@pytest.mark.parametrize("bad_offset", [1, 2, 3])
def test_draft_that_is_not_finite_costs_its_row_nothing_but_drafts(bad_offset, chat, kv_source, monkeypatch):
    """NaN behind a token poisons it even where it is masked; without the draft it would never have been there."""
    engine = make_engine(chat, kv_source, draft=3)
    requests = [request(5, max_tokens=12, ignore_eos=True), request(9, max_tokens=12, ignore_eos=True)]
    runner, original = engine.loop.runner, engine.loop.runner.encode
    rounds = iter(range(1000))

    def encode(chunks):
        original(chunks)
        slot, position, _, place, _ = chunks[0]
        if place == bad_offset and next(rounds) == 1:
            runner.backbone_slots.keys[:, slot, :, position] = float("nan")
            runner.slots.values[:, slot, :, position] = float("inf")
            runner.state[:, slot, place] = float("nan")

    monkeypatch.setattr(runner, "encode", encode)
    listener = Listener(engine)
    numbers = listener.submit(*requests)
    run(engine)

    for number in numbers:
        assert listener.reply(number).token_ids == expected(engine, listener.handles[number].request).token_ids
    assert engine.stats().prompt_tokens == 5 + 9, "a pass that is repeated counts nothing twice"
    assert_empty(engine)


def test_engine_measures_what_drafting_costs(chat, kv_source):
    engine = make_engine(chat, kv_source, max_draft_tokens=3)

    costs = engine.decoders[None].drafter.costs

    assert costs.positions[0] == 1
    assert all(seconds > 0 for seconds in (*costs.backbone_s, *costs.step_s, *costs.head_s))
    assert not engine.loop.runner.slots.keys.any(), "and leaves no trace"
    assert not engine.loop.runner.backbone_slots.values.any()
    assert not engine.loop.runner.state.any()
