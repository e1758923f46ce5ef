"""Replies that follow a grammar: as if alone, with drafts and without, and nothing but what the grammar describes.

`test_engine.py` mixes grammars into every schedule; here is what only grammars do.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import jsonschema
import pytest

from server.token_bytes import TokenBytes
from tests.conftest import byte_fallback_tokenizer, make_model
from tests.trm.conftest import END, NEAR_TIE, assert_same_tokens, some_prompt
from tests.trm.engines import TEXTS, Listener, assert_empty, bundled_engine, expected, make_engine, request, run
from trm import reference
from trm.chat import ChatFormat, solve_messages
from trm.engine import Engine, EngineConfig, Request, SamplingParams
from trm.engine.grammar import CompiledGrammar, Form, GrammarCompiler, GrammarMatcher
from trm.engine.request import Follow, Matcher
from trm.errors import BadRequest, InternalError
from trm.tools import Function, Tools

SMALL = GrammarCompiler(TEXTS, END)
LONG = SMALL.compile(Form.regex("((a|b){2}1){9}2"))


def text_of(tokens: Sequence[int]) -> str:
    return b"".join(TEXTS[token] or b"" for token in tokens).decode()


# The end


def test_reply_ends_where_nothing_may_follow_without_an_end_token(chat, kv_source):
    engine = make_engine(chat, kv_source)
    one = request(5, max_tokens=20, grammar=SMALL.compile(Form.choice(["ab12", "ba12"])))

    replies = engine.generate([one, replace(one, params=replace(one.params, ignore_eos=True))])

    for reply in replies:
        assert text_of(reply.token_ids) in ("ab12", "ba12")
        assert END not in reply.token_ids
        assert reply.finish_reason == "stop"
        assert reply.usage.completion_tokens == len(reply.token_ids)
    assert_empty(engine)


def test_reply_that_is_cut_says_so_and_one_that_just_fits_does_not(chat):
    engine = make_engine(chat)
    one = request(5, max_tokens=40, grammar=SMALL.compile(Form.regex("(a|b){8}")))
    [whole] = engine.generate([one])
    count = len(whole.token_ids)

    exactly, shorter = engine.generate(
        [replace(one, params=replace(one.params, max_tokens=n)) for n in (count, count - 1)]
    )

    assert (exactly.finish_reason, exactly.token_ids) == ("stop", whole.token_ids)
    assert (shorter.finish_reason, shorter.token_ids) == ("length", whole.token_ids[:-1])


def test_end_token_ends_a_reply_that_could_go_on(chat):
    engine = make_engine(chat)
    one = request(5, max_tokens=20, logit_bias=((END, 100.0),), grammar=SMALL.compile(Form.regex("aa?b*")))

    [reply] = engine.generate([one])

    assert [TEXTS[token] for token in reply.token_ids[:-1]] in ([b"a"], [b"ab"]), "the end is not allowed at once"
    assert reply.token_ids[-1] == END
    assert reply.finish_reason == "stop"


def test_ignored_end_token_is_not_allowed(chat):
    engine = make_engine(chat)
    one = request(5, max_tokens=9, ignore_eos=True, logit_bias=((END, 100.0),), grammar=SMALL.compile(Form.regex("b*")))

    [reply] = engine.generate([one])

    assert set(reply.token_ids) == {TEXTS.index(b"b")}
    assert (reply.finish_reason, len(reply.token_ids)) == ("length", 9)


def test_stop_string_ends_the_reply_earlier(chat):
    engine = make_engine(chat)
    one = request(5, max_tokens=40, grammar=LONG)
    [whole] = engine.generate([one])
    stop = chat.decode(whole.token_ids[:4])[-1]

    [reply] = engine.generate([replace(one, params=replace(one.params, stop=(stop,)))])

    assert reply.finish_reason == "stop"
    assert reply.token_ids == whole.token_ids[: len(reply.token_ids)] != whole.token_ids


# Beside the other parameters


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_bias_moves_allowed_tokens_only(temperature, chat):
    engine = make_engine(chat)
    bias = ((TEXTS.index(b"2"), 100.0), (TEXTS.index(b"a"), -100.0), (TEXTS.index(b"ab"), 50.0))
    one = request(5, max_tokens=3, temperature=temperature, logit_bias=bias, grammar=SMALL.compile(Form.regex("[ab]+")))

    [reply] = engine.generate([one])

    assert reply.token_ids == (TEXTS.index(b"ab"),) * 3


def test_a_single_allowed_token_is_chosen_whatever_filters_and_penalties_say(chat):
    engine = make_engine(chat)
    params = {"top_k": 1, "min_p": 1.0, "top_p": 1e-9, "repetition_penalty": 2.0, "frequency_penalty": 2.0}
    one = request(5, max_tokens=40, temperature=2.0, **params, grammar=SMALL.compile(Form.regex(":{20}")))

    [reply] = engine.generate([one])

    assert text_of(reply.token_ids) == ":" * 20


def test_log_probabilities_are_the_models_own(chat, kv_source):
    engine = make_engine(chat, kv_source)
    bound = request(5, max_tokens=6, logprobs=16, grammar=LONG)

    bound_reply, free_reply = engine.generate([bound, replace(bound, grammar=None)])

    assert dict(bound_reply.logprobs[0].top) == pytest.approx(dict(free_reply.logprobs[0].top))
    assert len(bound_reply.logprobs) == len(bound_reply.token_ids)
    for token, said in zip(bound_reply.token_ids, bound_reply.logprobs, strict=True):
        assert dict(said.top)[token] == said.logprob
        assert sum(2.718281828**logprob for _, logprob in said.top) == pytest.approx(1, abs=1e-4)


# P4: drafts


@pytest.mark.parametrize("draft", [1, 3, 7])
@pytest.mark.parametrize("params", [{}, {"temperature": 1.0, "seed": 3}], ids=["greedy", "sampled"])
def test_reply_with_drafts_is_the_reply_without(params, draft, chat, kv_source):
    requests = [
        request(length, max_tokens=30, n_supervision=1 + length % 4, grammar=grammar, **params)
        for length, grammar in enumerate(
            [LONG, SMALL.compile(Form.regex("[^{]*")), None, LONG, SMALL.compile(Form.json({}))], 3
        )
    ]
    engine = make_engine(chat, kv_source, draft=draft)

    replies = engine.generate(requests)

    assert [reply.token_ids for reply in replies] == [expected(engine, one).token_ids for one in requests]
    for index in (0, 3):
        assert re.fullmatch("((a|b){2}1){9}2", text_of(replies[index].token_ids))
        assert replies[index].usage.accepted_tokens > 0
    assert engine.stats().accepted_tokens < engine.stats().draft_tokens
    assert_empty(engine)


def test_untrained_decoder_accepts_every_draft(chat, kv_source):
    """P1: it is the backbone, so what is drafted under the grammar is what is chosen under it."""
    model = make_model(kv_source=kv_source, scale=0.0, sizes={"vocab_size": 16}).double()
    engine = Engine(model, chat, EngineConfig(max_rows=1, max_model_len=64, max_draft_tokens=5))
    engine.decoders[None].drafter.length = lambda rows, num_running: 5
    one = Request(
        tuple(some_prompt(6, 0, 16)), SamplingParams(max_tokens=12, temperature=1.0), SMALL.compile(Form.regex("a{12}"))
    )

    [reply] = engine.generate([one])

    assert text_of(reply.token_ids) == "a" * 12
    assert reply.usage.draft_tokens == reply.usage.accepted_tokens == 10
    assert engine.stats().ticks == 2 * model.config.n_supervision, "two passes of six tokens each"


def test_nothing_is_drafted_behind_the_end_of_the_grammar(chat):
    model = make_model(scale=0.0, sizes={"vocab_size": 16}).double()
    engine = Engine(model, chat, EngineConfig(max_rows=1, max_model_len=64, max_draft_tokens=7))
    engine.decoders[None].drafter.length = lambda rows, num_running: 7
    one = Request(tuple(some_prompt(6, 0, 16)), SamplingParams(max_tokens=40), SMALL.compile(Form.regex(":{4}")))

    [reply] = engine.generate([one])

    assert len(reply.token_ids) == reply.usage.draft_tokens == reply.usage.accepted_tokens == 4
    assert engine.stats().ticks == model.config.n_supervision


# Failure


@pytest.mark.parametrize("draft", [0, 3])
def test_dead_end_fails_its_own_request(draft, chat, kv_source):
    """And only where the reply goes there, not where a draft does: "3" is no token of this model."""
    grammar = SMALL.compile(Form.choice(["a" + "1" * 8, "b3"]))
    engine = make_engine(chat, kv_source, draft=draft)
    listener = Listener(engine)
    requests = [request(length, max_tokens=20, grammar=grammar) for length in range(1, 20)]
    numbers = listener.submit(*requests)
    [neighbour] = listener.submit(request(30, max_tokens=20))
    run(engine)

    dead = SMALL.compile(Form.choice(["a", "b"]))
    ended = {"stop": 0, "error": 0}
    for number, one in zip(numbers, requests, strict=True):
        reply = listener.reply(number)
        first = expected(engine, replace(one, grammar=dead)).token_ids[0]
        ended[reply.finish_reason] += 1
        if TEXTS[first] == b"b":
            error = listener.events[number][-1].error
            assert isinstance(error, BadRequest)
            assert error.param == "response_format"
            assert str(error) == "response_format: after 1 tokens no token of this model may follow"
            assert reply.token_ids == (first,)
        else:
            assert reply.token_ids == expected(engine, one).token_ids
            assert text_of(reply.token_ids) == "a" + "1" * 8
    assert min(ended.values()) > 2, ended
    assert listener.reply(neighbour).token_ids == expected(engine, listener.handles[neighbour].request).token_ids
    assert_empty(engine)


@pytest.mark.parametrize(
    ("form", "required", "field"),
    [(None, True, "tools"), (Form.regex("ab"), True, "tools"), (Form.regex("ab"), False, "response_format")],
)
def test_dead_end_is_blamed_on_what_asks_for_it(form, required, field, chat):
    """No token of this model ends an object, and none is a "b"."""
    texts = [None, None, None, b"<tool_call>", b'\n{"name": "f', b'", "arguments": {', b"a", *[None] * 9]
    tools = Tools((Function("f"),), (Function("f"),), required)
    engine = make_engine(chat)
    listener = Listener(engine)

    grammar = GrammarCompiler(texts, END).compile(form, tools)
    [number] = listener.submit(request(5, max_tokens=9, logit_bias=((6, 100.0),), grammar=grammar))
    run(engine)

    error = listener.events[number][-1].error
    assert isinstance(error, BadRequest)
    assert error.param == field
    tokens = 3 if required else 1
    assert str(error) == f"{field}: after {tokens} tokens no token of this model may follow"


@dataclass(frozen=True)
class BrokenGrammar:
    """Raises after some tokens, as a library with a bug would."""

    inner: CompiledGrammar
    after: int
    ahead: bool  # only for a draft

    def matcher(self, may_end: bool) -> Matcher:
        inner = self.inner.matcher(may_end)

        class Broken(GrammarMatcher):
            def __init__(self, after: int, ahead: bool) -> None:
                self.left, self.ahead = after, ahead

            def follow(self, draft: Sequence[int] = ()) -> Follow:
                if self.left <= 0 and (draft or not self.ahead):
                    raise RuntimeError("a bug")
                return inner.follow(draft)

            def advance(self, token: int) -> None:
                self.left -= 1
                inner.advance(token)

        return Broken(self.after, self.ahead)


@pytest.mark.parametrize("ahead", [False, True])
def test_matcher_that_raises_fails_its_own_request(ahead, chat, kv_source):
    engine = make_engine(chat, kv_source, draft=3)
    listener = Listener(engine)
    broken: Any = BrokenGrammar(LONG, 2, ahead)
    good = [request(4, max_tokens=20), request(9, max_tokens=30, grammar=LONG)]

    before, bad, after = listener.submit(good[0], request(6, max_tokens=20, grammar=broken), good[1])
    run(engine)

    assert [event.finish_reason for event in listener.events[bad] if event.finish_reason] == ["error"]
    assert isinstance(listener.events[bad][-1].error, InternalError)
    for number, one in ((before, good[0]), (after, good[1])):
        assert listener.reply(number).token_ids == expected(engine, one).token_ids
    assert_empty(engine)


# The bundled model


@pytest.fixture(scope="module")
def bundled() -> tuple[Engine, GrammarCompiler]:
    engine = bundled_engine(max_rows=16, max_model_len=400)
    texts = TokenBytes(engine.chat.tokenizer).texts(engine.model.config.vocab_size)
    return engine, GrammarCompiler(texts, engine.chat.end_id)


def ask(engine: Engine, grammar: CompiledGrammar, index: int, **params: Any) -> Request:
    question = f"Tom has {index + 3} apples and buys {2 * index + 1} more. How many apples does he have now?"
    prompt = tuple(engine.chat.encode(solve_messages(question)))
    return Request(prompt, SamplingParams(**({"max_tokens": 250} | params)), grammar)


SCHEMA = {
    "type": "object",
    "properties": {
        "steps": {"type": "array", "items": {"type": "string", "maxLength": 20}, "maxItems": 3},
        "answer": {"type": "integer", "minimum": -99, "maximum": 999},
        "unit": {"enum": ["apples", "pens", "\u20ac"]},
        "sure": {"type": ["boolean", "null"]},
    },
    "required": ["steps", "answer", "unit", "sure"],
    "additionalProperties": False,
}
PATTERN = r"-?[1-9]\d{0,3}(\.\d{1,2})? (apples|\p{Lu}[a-z]{1,9})!"
OPTIONS = ["yes", "yes, of course", "no", "nobody knows: \u221e"]


@pytest.mark.parametrize("kind", ["schema", "pattern", "options"])
def test_sampled_replies_are_what_the_grammar_describes(kind, bundled):
    engine, compiler = bundled
    grammar = {
        "schema": lambda: compiler.compile(Form.json(SCHEMA)),
        "pattern": lambda: compiler.compile(Form.regex(PATTERN)),
        "options": lambda: compiler.compile(Form.choice(OPTIONS)),
    }[kind]()
    requests = [ask(engine, grammar, seed % 4, temperature=1.5, seed=seed, n_supervision=1) for seed in range(48)]

    replies = engine.generate(requests)

    assert [reply.finish_reason for reply in replies] == ["stop"] * len(replies)
    assert len({reply.text for reply in replies}) >= (20 if kind != "options" else 3)
    for reply in replies:
        if kind == "schema":
            jsonschema.validate(json.loads(reply.text), SCHEMA)
        elif kind == "pattern":
            assert re.fullmatch(PATTERN.replace(r"\p{Lu}", r"[^\W\d_a-z]"), reply.text)
        else:
            assert reply.text in OPTIONS


@pytest.mark.parametrize("type_", ["integer", "number"])
@pytest.mark.parametrize("bias", [0.0, 100.0])
def test_a_number_ends_long_before_the_tokens_do(type_, bias, bundled):
    """`{"answer": integer}`, the first thing that anybody asks for, even of a model that loves digits."""
    engine, compiler = bundled
    schema = {"type": "object", "properties": {"answer": {"type": type_}}, "required": ["answer"]}
    grammar = compiler.compile(Form.json(schema | {"additionalProperties": False}))
    texts = TokenBytes(engine.chat.tokenizer).texts(engine.model.config.vocab_size)
    digits = tuple((token, bias) for token, text in enumerate(texts) if text and text.isdigit())
    requests = [
        ask(engine, grammar, index, temperature=float(index % 2), seed=index, max_tokens=64, logit_bias=digits)
        for index in range(8)
    ]

    replies = engine.generate(requests)

    assert [reply.finish_reason for reply in replies] == ["stop"] * 8
    for reply in replies:
        jsonschema.validate(json.loads(reply.text), schema)


def test_any_json_object_is_one_unless_it_is_cut(bundled):
    engine, compiler = bundled
    grammars = [compiler.compile(Form.json({"type": "object", "minProperties": least})) for least in (0, 2)]
    requests = [
        ask(engine, grammars[seed % 2], seed % 4, temperature=1.0, seed=seed, n_supervision=1, max_tokens=40)
        for seed in range(16)
    ]

    replies = engine.generate(requests)

    assert {reply.finish_reason for reply in replies} == {"stop", "length"}
    for reply in replies:
        assert reply.text.startswith("{")
        if reply.finish_reason == "stop":
            assert isinstance(json.loads(reply.text), dict)


def test_replies_equal_the_reference_but_for_near_ties(bundled):
    engine, compiler = bundled
    grammars = [
        compiler.compile(Form.json(SCHEMA)),
        compiler.compile(Form.regex(PATTERN)),
        compiler.compile(Form.choice(OPTIONS)),
    ]
    requests = [
        ask(engine, grammars[index % 3], index, max_tokens=24, temperature=float(index % 2), seed=index)
        for index in range(6)
    ]

    for one, reply in zip(requests, engine.generate(requests), strict=True):
        solo = reference.decode(engine.model, one.prompt_ids, one.params, engine.chat.end_id, one.grammar)
        assert_same_tokens(reply.token_ids, solo, NEAR_TIE)
    assert engine.stats().accepted_tokens > 0


@pytest.mark.parametrize("draft", [0, 3])
def test_grammar_of_a_tokenizer_that_falls_back_on_bytes_gives_whole_characters(draft):
    """What is one character to the grammar is some bytes to the decoder, in a run that must be right as a whole."""
    bytes_ = ("<0xE2>", "<0x82>", "<0xAC>", "<0xFF>", "<0x0A>", "<0xC3>", "<0xA9>", "<0x41>")
    chat = ChatFormat(byte_fallback_tokenizer(*bytes_, "\u2581", "a", "\u2581A", "\u20ac", "\u00e9a"))
    engine = make_engine(chat, draft=draft)
    compiler = GrammarCompiler(TokenBytes(chat.tokenizer).texts(16), chat.end_id)
    pattern = "[aA](\u20ac|\u00e9| |\\n|A){3,5}"

    replies = engine.generate(
        [
            Request(
                tuple(some_prompt(3, n, 16)),
                SamplingParams(40, 2.0, seed=n),
                grammar=compiler.compile(Form.regex(pattern)),
            )
            for n in range(40)
        ]
    )

    seen = {token for reply in replies for token in reply.token_ids}
    assert {*chat.tokenizer.convert_tokens_to_ids(["<0xE2>", "<0x0A>", "<0xA9>", "\u20ac"])} <= seen
    for reply in replies:
        assert re.fullmatch(pattern, reply.text)
        assert reply.finish_reason == "stop"
