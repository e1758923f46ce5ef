"""The engine: every reply exactly as if its request were alone.

Promises P2, P7, P8 and P9 of the design, under every schedule, against the slow reference in float64.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.conftest import byte_fallback_tokenizer, make_model
from tests.trm.conftest import END, NEAR_TIE, assert_same_tokens, some_prompt
from tests.trm.engines import (
    TEXTS,
    Listener,
    assert_empty,
    bundled_engine,
    expected,
    find_ending,
    make_engine,
    request,
    run,
)
from trm import reference
from trm.chat import ChatFormat, solve_messages
from trm.engine import Engine, EngineConfig, Request, SamplingParams
from trm.engine.grammar import Form, GrammarCompiler

# P2 and P9: as if alone


@dataclass(frozen=True)
class Case:
    request: Request
    halting: dict[str, float | None]  # where the decoder can
    decoder: int  # of those that there are
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
PENALTIES = st.fixed_dictionaries(
    {
        "repetition_penalty": st.sampled_from([1.0, 0.8, 1.3]),
        "presence_penalty": st.sampled_from([0.0, -0.5, 0.7]),
        "frequency_penalty": st.sampled_from([0.0, -0.2, 0.3]),
        "logit_bias": st.sampled_from([(), ((5, 1.5),), ((4, -100.0), (7, 0.5))]),
    }
)
HALTING = st.fixed_dictionaries(
    {
        "halt_threshold": st.sampled_from([None, 0.3, 0.5]),
        "halt_tolerance": st.sampled_from([None, 0.05, 0.2, 0.5]),
    }
)
PARAMS = st.builds(
    lambda common, sampled, penalties: SamplingParams(**common, **sampled, **penalties),
    st.fixed_dictionaries(
        {
            "max_tokens": st.integers(1, 6),
            "n_supervision": st.sampled_from([None, 0, 1, 2, 3, 4]),
            "ignore_eos": st.booleans(),
        }
    ),
    st.one_of(st.just({}), SAMPLED),
    st.one_of(st.just({}), PENALTIES),
)
STORY = tuple(some_prompt(21, 0, 16))
PROMPTS = st.one_of(  # many of them begin alike
    st.builds(
        lambda length, seed: tuple(some_prompt(length, seed, 16)), st.sampled_from([1, 2, 3, 8]), st.integers(0, 2)
    ),
    st.builds(lambda shared, rest: STORY[:shared] + rest, st.integers(1, 21), st.sampled_from([(), (3,), (4, 5, 6)])),
)
SMALL = GrammarCompiler(TEXTS, END)
GRAMMARS = st.sampled_from(
    [None] * 4
    + [
        SMALL.compile(form)
        for form in (
            Form.regex("(a|b){2,4}( 1*)?"),
            Form.regex("[^a]*"),
            Form.choice(["ab12", "ba", "b", "{}"]),
            Form.json({"type": "object", "additionalProperties": {"type": "integer"}}),
        )
    ]
)
CASES = st.builds(
    Case,
    st.builds(Request, PROMPTS, PARAMS, GRAMMARS),
    halting=HALTING,
    decoder=st.integers(0, 5),
    arrival=st.integers(0, 12),
    cancel_at=st.one_of(st.none(), st.none(), st.integers(0, 16)),
)


@pytest.mark.parametrize(
    ("kv_source", "others"),
    [("context", []), ("state", []), ("context", ["wide", "state"])],
    ids=["context", "state", "several"],
)
@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    cases=st.lists(CASES, min_size=1, max_size=7),
    max_rows=st.integers(1, 4),
    prefill_chunk=st.sampled_from([1, 3, 7, 256]),
    draft=st.integers(0, 3),
    row_buckets=st.sampled_from([None, None, (1, 2, 4), (2,)]),
)
def test_every_reply_is_as_if_alone(chat, kv_source, others, cases, max_rows, prefill_chunk, draft, row_buckets):
    """Whatever arrives when, waits, is cancelled or drafted, and shares a prefix, a slot or a tick with whomever.

    Also beside rows of other decoders on the same backbone, which differ in depth, layers, the source of their keys,
    the states that they read and the head.
    """
    sizes = {"max_rows": max_rows, "prefill_chunk": prefill_chunk, "row_buckets": row_buckets}
    engine = make_engine(chat, kv_source, others=others, draft=draft, **sizes)
    names = list(engine.decoders)
    for index, case in enumerate(cases):
        name, params = names[case.decoder % len(names)], case.request.params
        if not engine.decoders[name].depth_matters:
            params = replace(params, **case.halting)
        cases[index] = replace(case, request=replace(case.request, params=params, decoder=name))
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
        assert reply.text == chat.decode(reply.token_ids)
        assert reply.usage.prompt_tokens == len(case.request.prompt_ids)
        assert reply.usage.completion_tokens == len(reply.token_ids)
        if reply.finish_reason == "cancelled":
            assert case.cancel_at is not None
            assert reply.token_ids == want.token_ids[: len(reply.token_ids)]
        else:
            assert reply.token_ids == want.token_ids
            ended = (want.token_ids[-1] == END and not params.ignore_eos) or completes(case.request, want.token_ids)
            assert reply.finish_reason == ("stop" if ended else "length")
            assert reply.usage.supervision_steps == sum(want.steps)
    assert_empty(engine)


def completes(one: Request, token_ids: Sequence[int]) -> bool:
    """Whether its grammar lets nothing follow those tokens."""
    if one.grammar is None or token_ids[-1] == END:
        return False
    matcher = one.grammar.matcher(may_end=True)
    for token in token_ids:
        matcher.advance(token)
    return matcher.follow().complete


@pytest.mark.parametrize("params", [{}, {"temperature": 1.0, "seed": 7}], ids=["greedy", "sampled"])
def test_request_is_the_same_alone_and_among_64_others(params, chat, kv_source):
    one = request(9, max_tokens=8, **params)
    crowd = [
        request(1 + index % 23, index, max_tokens=1 + index % 7, n_supervision=index % 5, temperature=float(index % 2))
        for index in range(64)
    ]
    engine = make_engine(chat, kv_source, max_rows=8)

    replies = engine.generate([*crowd[:40], one, *crowd[40:]])

    [alone] = make_engine(chat, kv_source, max_rows=1).generate([one])
    assert (replies[40].token_ids, replies[40].text) == (alone.token_ids, alone.text)
    assert replies[40].token_ids == expected(engine, one).token_ids


def test_float32_replies_equal_the_reference_but_for_near_ties(chat, kv_source):
    model = make_model(kv_source=kv_source)
    engine = Engine(model, chat, EngineConfig(max_rows=8, max_model_len=256, prefill_chunk=64))
    lengths = [1, 200, 3, 150, 1, 64, 63, 65, 20, 7, 100, 2]
    requests = [Request(tuple(some_prompt(n)), SamplingParams(max_tokens=5)) for n in lengths]

    for one, reply in zip(requests, engine.generate(requests), strict=True):
        assert_same_tokens(reply.token_ids, reference.decode(model, one.prompt_ids, one.params, END), NEAR_TIE)


def test_bundled_model_replies_equal_the_reference_but_for_near_ties():
    """At every effort."""
    engine = bundled_engine(max_rows=5, max_model_len=256)
    model, chat = engine.model, engine.chat
    stories = [
        "Tom has 12 apples and buys 7 more.",
        "Each of 4 boxes holds 6 pens.",
        "Ann had 30 eggs. She gives 9 away.",
    ]
    requests = [
        Request(
            tuple(chat.encode(solve_messages(f"{stories[index % 3]} How many are there now?"))),
            SamplingParams(max_tokens=24, n_supervision=effort, temperature=float(index % 2), seed=index),
        )
        for index, effort in enumerate([0, 1, 2, 4, 8, 16, 4, 4])
    ]

    for one, reply in zip(requests, engine.generate(requests), strict=True):
        solo = reference.decode(model, one.prompt_ids, one.params, chat.end_id)
        assert_same_tokens(reply.token_ids, solo, NEAR_TIE)
    assert engine.stats().accepted_tokens > 0
    assert engine.stats().cached_tokens > 0


@pytest.mark.parametrize("context_layers", [[0, 2], [0, 1, 2]], ids=str)
def test_a_mixed_context_equals_the_reference(context_layers, chat):
    model = make_model(scale=1.0, context_layers=context_layers).double()
    engine = Engine(model, chat, EngineConfig(max_rows=2, max_model_len=64, prefill_chunk=5))
    requests = [
        Request(tuple(some_prompt(n)), SamplingParams(max_tokens=6, n_supervision=n % 4)) for n in (3, 14, 1, 6)
    ]

    for one, reply in zip(requests, engine.generate(requests), strict=True):
        assert reply.token_ids == reference.decode(model, one.prompt_ids, one.params, END).token_ids


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

    assert first.token_ids == same.token_ids
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
    assert (reply.finish_reason, reply.stop) == ("stop", stop)
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
    assert (reply.finish_reason, reply.stop) == ("length", None)


# Tokenizers that fall back on bytes

BYTES = (
    "<0xE2>",
    "<0x82>",
    "<0xAC>",
    "<0xFF>",
    "<0x0A>",
    "<0x20>",
    "<0x41>",
    "\u2581",
    "a",
    "\u2581b",
    "\u2581\u2581",
    "\u20ac",
    "12",
)


@pytest.mark.parametrize("draft", [0, 3])
def test_sampled_replies_in_bytes_are_their_tokens_decoded(draft):
    """Bytes in any order are mostly no characters. A run of them that turned out wrong used to end in an error."""
    chat = ChatFormat(byte_fallback_tokenizer(*BYTES))
    engine = make_engine(chat, draft=draft)
    requests = [
        Request(tuple(some_prompt(3, n, 16)), SamplingParams(12, 2.0, seed=n, stop=("\n",) if n % 2 else ()))
        for n in range(40)
    ]

    replies = engine.generate(requests)

    assert {reply.finish_reason for reply in replies} == {"stop", "length"}
    for one, reply in zip(requests, replies, strict=True):
        whole = chat.decode(reply.token_ids)
        assert reply.text == (whole.split("\n")[0] if one.params.stop else whole)
    assert sum("\ufffd" in reply.text for reply in replies) > 10


def test_stop_string_that_only_the_end_completes_is_a_stop():
    """What is no whole character becomes text when nothing can follow any more."""
    chat = ChatFormat(byte_fallback_tokenizer(*BYTES))
    engine = make_engine(chat)
    half = ((chat.tokenizer.convert_tokens_to_ids("<0xE2>"), 100.0),)

    [reply] = engine.generate([request(3, max_tokens=1, logit_bias=half, stop=("\ufffd",))])

    assert (reply.text, reply.finish_reason, reply.stop, len(reply.token_ids)) == ("", "stop", "\ufffd", 1)
