"""Grammars: masks compared with every text that there is, and texts with what the grammars describe."""

import itertools
import json
import random
import re
from collections.abc import Iterator, Sequence
from typing import Any

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.token_bytes import TokenBytes
from tests.trm.conftest import END
from tests.trm.engines import TEXTS
from tests.trm.grammars import allowed, nested
from trm.engine import grammar as grammars
from trm.engine.grammar import CompiledGrammar, Form, GrammarCompiler
from trm.engine.request import Follow
from trm.errors import BadRequest

PROPERTY = settings(max_examples=150, deadline=None, derandomize=True)
SMALL = GrammarCompiler(TEXTS, END)
TREE = {
    "$defs": {"node": {"type": "object", "properties": {"v": {"type": "integer"}, "next": {"$ref": "#/$defs/node"}}}},
    "$ref": "#/$defs/node",
}
SCHEMAS: dict[str, dict[str, Any]] = {
    "object": {
        "type": "object",
        "properties": {
            "answer": {"type": "integer"},
            "unit": {"enum": ["kg", "m\u00b2", '"']},
            "ok": {"type": "boolean"},
        },
        "required": ["answer", "unit"],
        "additionalProperties": False,
    },
    "steps": {
        "type": "array",
        "items": {"type": "object", "properties": {"say": {"type": "string", "maxLength": 9}}, "required": ["say"]},
        "minItems": 1,
        "maxItems": 3,
    },
    "numbers": {"type": "array", "items": {"type": "number", "minimum": -2, "exclusiveMaximum": 10.5}, "maxItems": 4},
    "either": {"anyOf": [{"type": "null"}, {"type": "integer", "multipleOf": 7}, {"const": [1, {"a": "\\"}]}]},
    "pattern": {"type": "string", "pattern": "^[a-c]{2}-[0-9]+$"},
    "date": {"type": "string", "format": "date"},
    "tree": TREE,
}


def text_of(tokens: Sequence[int], texts: Sequence[bytes | None] = TEXTS) -> bytes:
    return b"".join(texts[token] or b"" for token in tokens)


def walk(grammar: CompiledGrammar, texts: Sequence[bytes | None], end: int, seed: int) -> str:
    """The text of tokens drawn evenly from what may follow, hurrying towards the end."""
    rng, matcher, tokens = random.Random(seed), grammar.matcher(may_end=True), list[int]()
    for _ in range(300):
        follow = matcher.follow()
        assert follow.failure is None, follow.failure
        choices = sorted(allowed(follow, len(texts)))
        closing = [token for token in choices if token == end or (texts[token] or b"")[-1:] in b'"]},']
        token = rng.choice(closing if closing and rng.random() < 0.4 else choices)
        if token == end:
            return text_of(tokens, texts).decode()
        tokens.append(token)
        matcher.advance(token)
    raise AssertionError(f"no end in sight: {text_of(tokens, texts)!r}")


@pytest.fixture(scope="module")
def bundled(tokenizer: Any) -> tuple[GrammarCompiler, list[bytes | None], int]:
    texts = TokenBytes(tokenizer).texts(len(tokenizer))
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    return GrammarCompiler(texts, end), texts, end


# What may follow


def assert_masks(grammar: CompiledGrammar, language: set[bytes], rng: random.Random) -> None:
    """Along one way through the grammar: a token may follow if some text of the language goes on like that."""
    matcher, tokens = grammar.matcher(may_end=True), list[int]()
    while True:
        text = text_of(tokens)
        want = {
            token
            for token, piece in enumerate(TEXTS)
            if piece and any(one.startswith(text + piece) for one in language)
        }
        complete = not want
        want |= {END} if text in language else set()
        follow = matcher.follow()
        assert allowed(follow, len(TEXTS)) == want
        assert (follow.complete, follow.failure) == (complete, None)
        if complete:
            return
        tokens.append(rng.choice(sorted(want - {END})))
        matcher.advance(tokens[-1])


@PROPERTY
@given(
    options=st.lists(st.text("ab12 {}", min_size=1, max_size=6), min_size=1, max_size=5),
    rng=st.randoms(use_true_random=False),
)
def test_choice_lets_follow_what_continues_an_option(options, rng):
    assert_masks(SMALL.compile(Form.choice(options)), {option.encode() for option in options}, rng)


@pytest.mark.parametrize("pattern", ["(a|b){1,4}", "a?b?1?2", "(ab|ba|12){2}", "[^ab]{1,2}", "(?i)AB+?1|a.{2}", "^a$"])
@pytest.mark.parametrize("seed", range(5))
def test_regex_lets_follow_what_continues_a_match(pattern, seed):
    texts = ("".join(letters) for size in range(1, 7) for letters in itertools.product('ab12 {}":,', repeat=size))
    language = {text.encode() for text in itertools.islice(texts, 120_000) if re.fullmatch(pattern, text)}

    assert_masks(SMALL.compile(Form.regex(pattern)), language, random.Random(seed))


def test_empty_text_may_end_at_once():
    assert END in allowed(SMALL.compile(Form.regex("a*")).matcher(may_end=True).follow(), len(TEXTS))


def test_reply_that_may_not_end_goes_on_until_nothing_follows():
    matcher = SMALL.compile(Form.regex("a{0,2}")).matcher(may_end=False)

    assert allowed(matcher.follow(), len(TEXTS)) == {TEXTS.index(b"a")}
    matcher.advance(TEXTS.index(b"a"))
    assert allowed(matcher.follow(), len(TEXTS)) == {TEXTS.index(b"a")}
    matcher.advance(TEXTS.index(b"a"))
    assert matcher.follow().complete


def test_a_token_without_text_never_follows(bundled, tokenizer):
    """Special tokens, ids beyond the tokenizer, and what spells like a special token."""
    _, texts, end = bundled
    compiler = GrammarCompiler([*texts, *[None] * 45], end)

    anything = allowed(compiler.compile(Form.regex("(?s).*")).matcher(may_end=True).follow(), len(texts) + 45)
    inside = compiler.compile(Form.regex(r"<\|im_(start|end)\|>")).matcher(may_end=True)

    assert set(tokenizer.all_special_ids) & anything == {end}
    assert max(anything) < len(texts)
    assert allowed(inside.follow(), len(texts) + 45) == {token for token in anything if texts[token] == b"<"}
    assert walk(compiler.compile(Form.regex(r"<\|im_start\|>")), [*texts, *[None] * 45], end, 0) == "<|im_start|>"


def test_the_large_vocabulary_of_qwen2(qwen2_tokenizer):
    """Its model has more logits than it has tokens, and its tokenizer would normalise a combining accent away."""
    texts = TokenBytes(qwen2_tokenizer).texts(151_936)
    end = qwen2_tokenizer.convert_tokens_to_ids("<|im_end|>")
    compiler = GrammarCompiler(texts, end)

    anything = allowed(compiler.compile(Form.regex("(?s).*")).matcher(may_end=True).follow(), 151_936)

    assert 100_000 < len(anything) <= len(qwen2_tokenizer)
    assert max(anything) < len(qwen2_tokenizer)
    assert set(qwen2_tokenizer.all_special_ids) & anything == {end}
    assert walk(compiler.compile(Form.choice(["e\u0301", "e\u0302"])), texts, end, 0) in ("e\u0301", "e\u0302")
    jsonschema.validate(
        json.loads(walk(compiler.compile(Form.json(SCHEMAS["object"])), texts, end, 0)), SCHEMAS["object"]
    )


# Whole texts


@pytest.mark.parametrize("name", SCHEMAS)
@pytest.mark.parametrize("seed", range(8))
def test_json_is_what_the_schema_describes_and_on_one_line(name, seed, bundled):
    compiler, texts, end = bundled

    text = walk(compiler.compile(Form.json(SCHEMAS[name])), texts, end, seed)

    jsonschema.validate(json.loads(text), SCHEMAS[name], format_checker=jsonschema.FormatChecker())
    assert "\n" not in text
    assert "  " not in re.sub(r'"([^"\\]|\\.)*"', '""', text)


def test_properties_come_in_the_order_of_the_schema(bundled):
    compiler, texts, end = bundled
    properties = {"b": {"type": "null"}, "a": {"type": "null"}}

    text = walk(
        compiler.compile(Form.json({"properties": properties, "required": ["a", "b"], "type": "object"})), texts, end, 3
    )

    assert list(json.loads(text))[:2] == ["b", "a"]


@pytest.mark.parametrize(
    "options",
    [
        ["a b", 'c"d'],
        ["e\\f", "e\\"],
        ["/x/", "//"],
        ["\n\t", "\r\n"],
        ["#~&-", "[<>]"],
        ["\u00e9\u65e5", "\U0001f642"],
        ["\x00\x7f"],
        ["<|im_end|>"],
        ["%llguidance {}\nstart: x"],
        ["a", "ab", "abc"],
    ],
    ids=str,
)
def test_choice_takes_its_options_as_they_are(options, bundled):
    compiler, texts, end = bundled

    assert {walk(compiler.compile(Form.choice(options)), texts, end, seed) for seed in range(40)} == set(options)


@pytest.mark.parametrize(
    "pattern", [r"\d{1,3}(,\d{3})*", r"[A-Z]\w{0,7}/[a-z]", r"(\\|\.|\n)+?-", r"[\p{Greek}&&[\u0370-\u03ff]]{2}\s"]
)
def test_text_is_what_the_regular_expression_matches(pattern, bundled):
    compiler, texts, end = bundled

    for seed in range(8):
        text = walk(compiler.compile(Form.regex(pattern)), texts, end, seed)
        assert re.fullmatch(pattern.replace(r"[\p{Greek}&&[\u0370-\u03ff]]", "[\u0370-\u03ff]"), text)


# Looking ahead


@PROPERTY
@given(st.data())
def test_what_follows_depends_on_the_tokens_alone(data):
    """Whatever was asked before, and however far drafts went that came to nothing."""
    grammar = SMALL.compile(Form.regex("(a|b|12){0,9}( 1*)?"))
    matcher, reply = grammar.matcher(may_end=True), list[int]()
    for _ in range(data.draw(st.integers(1, 8))):
        draft = data.draw(st.lists(st.sampled_from(some_way(grammar, reply) or [0]), max_size=1))
        for _ in range(data.draw(st.integers(0, 3)) if draft else 0):
            draft += data.draw(st.lists(st.sampled_from(some_way(grammar, reply + draft) or [0]), max_size=1))
        draft = [token for token in draft if token]
        assert matcher.follow(draft) == afresh(grammar, reply + draft)
        assert matcher.follow() == afresh(grammar, reply)
        if not some_way(grammar, reply):
            break
        token = draft[0] if draft and data.draw(st.booleans()) else data.draw(st.sampled_from(some_way(grammar, reply)))
        reply.append(token)
        matcher.advance(token)


def afresh(grammar: CompiledGrammar, tokens: Sequence[int]) -> Follow:
    matcher = grammar.matcher(may_end=True)
    for token in tokens:
        matcher.advance(token)
    return matcher.follow()


def some_way(grammar: CompiledGrammar, tokens: Sequence[int]) -> list[int]:
    return sorted(allowed(afresh(grammar, tokens), len(TEXTS)) - {END})


# Limits


def test_full_lexer_is_started_afresh_and_changes_nothing(monkeypatch, bundled):
    """What others have used up must not show."""
    _, texts, end = bundled
    pattern = r"(\w|\s){5,400}\."

    def replies(compiler: GrammarCompiler) -> Iterator[list[bytes]]:
        grammar = compiler.compile(Form.regex(pattern))
        for seed in range(3):
            rng, matcher, masks = random.Random(seed), grammar.matcher(may_end=True), []
            for _ in range(40):
                masks.append(matcher.follow().mask)
                assert matcher.follow().failure is None
                matcher.advance(rng.choice(sorted(allowed(matcher.follow(), len(texts)) - {end})))
            yield masks

    roomy = list(replies(GrammarCompiler(texts, end)))
    monkeypatch.setattr(grammars, "LIMITS", grammars.LLParserLimits(max_lexer_states=400, verbose_errors=False))
    renewed = []
    monkeypatch.setattr(CompiledGrammar, "renew", count_calls(CompiledGrammar.renew, renewed))

    assert list(replies(GrammarCompiler(texts, end))) == roomy
    assert len(renewed) > 3


def count_calls(function: Any, calls: list[Any]) -> Any:
    def counted(*args: Any) -> Any:
        calls.append(args)
        return function(*args)

    return counted


def test_grammar_that_is_too_much_in_the_middle_says_so_and_spoils_nothing(monkeypatch, bundled):
    _, texts, end = bundled
    monkeypatch.setattr(grammars, "LIMITS", grammars.LLParserLimits(max_lexer_states=80, verbose_errors=False))
    grammar = GrammarCompiler(texts, end).compile(Form.regex(r"a(b|c\w{400})"))
    good, bad = grammar.matcher(may_end=True), grammar.matcher(may_end=True)
    a, b, c = (texts.index(letter) for letter in (b"a", b"b", b"c"))
    good.advance(a)
    bad.advance(a)

    for _ in range(100):  # each needs a state of its own
        if bad.follow().failure is None:
            bad.advance(c)

    assert "too many states" in (bad.follow().failure or "")
    assert not any(bad.follow().mask)
    good.advance(b)
    assert good.follow().complete


def test_dead_end_says_so():
    matcher = SMALL.compile(Form.choice(["a3", "b"])).matcher(may_end=True)

    matcher.advance(TEXTS.index(b"a"))

    assert matcher.follow() == Follow(bytes(len(matcher.follow().mask)), failure="no token of this model may follow")


@pytest.mark.parametrize(
    ("schema", "reason"),
    [
        ({"not": {"type": "string"}}, 'Unimplemented keys: ["not"]'),
        ({"type": "array", "uniqueItems": True}, 'Unimplemented keys: ["uniqueItems"]'),
        ({"type": "array", "contains": {}}, 'Unimplemented keys: ["contains"]'),
        ({"if": {}, "then": {}}, "Unimplemented keys"),
        ({"items": {"dependentRequired": {"a": ["b"]}}}, "Unimplemented keys"),
        ({"not": {}, "x-guidance": {"lenient": True}}, "Unimplemented keys"),
        ({"type": "strin"}, "Invalid type: strin"),
        ({"type": "string", "format": 3}, "Expected string for 'format', got 3"),
        ({"type": "string", "pattern": "(?=a)"}, "look-around"),
        ({"$ref": "#/$defs/a"}, "does not exist"),
        ({"$ref": "https://example.com/a.json"}, "not present"),
        ({"$ref": "#/properties/9"}, "does not exist"),
        ({"const": 3}, "no token"),
        ({"type": "integer", "minimum": 5, "maximum": 3}, "minimum (5) is greater than maximum (3)"),
        ({"oneOf": [{"type": "number"}, {"type": "integer"}]}, "oneOf constraints are not supported; use anyOf"),
        ({"type": "integer", "multipleOf": 10_007}, "multipleOf"),
        ({"allOf": [{"type": "number", "multipleOf": n} for n in (0.97, 89, 8.3)]}, "multipleOf"),
        ({"multipleOf": True}, "Expected f64 for 'multipleOf', got true"),
        ({"multipleOf": 0}, "multiple"),
        ({"$ref": "#a", "$defs": {"a": {"$anchor": "a", "multipleOf": 10_007}}}, "multipleOf"),
        ({"$ref": "b#/c", "$defs": {"a": {"$id": "b", "c": {"multipleOf": 10_007}}}}, "multipleOf"),
        ({"$ref": "#/a", "a": {"multipleOf": 10_007}}, "multipleOf"),
        ({"enum": ["a" * 70_000]}, "70014 characters; the limit is 65536"),
        ({"enum": [[{"a": 2**53 + 1}]]}, "9007199254740993 has more digits than a double keeps"),
        ({"const": 10**4000}, "more digits than a double keeps"),
        pytest.param({"const": 10**5000}, "too long to be read", id="long"),
        ({"maximum": float("inf")}, "infinite"),
        (nested(127, "items"), "nests more than 127 levels deep"),
        pytest.param(nested(10_000, "items"), "nests more than 127 levels deep", id="deep"),
        pytest.param({"const": nested(1_000_000, "a")}, "nests more than 127 levels deep", id="deeper"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_schema_that_cannot_be_kept_is_refused_with_its_reason(schema, reason):
    with pytest.raises(BadRequest) as refused:
        SMALL.compile(Form.json(schema))

    assert refused.value.param == "response_format"
    assert reason in str(refused.value)
    assert len(str(refused.value).splitlines()) == 1
    assert "llguidance" not in str(refused.value)


@pytest.mark.parametrize(
    ("pattern", "reason"),
    [
        ("a(", "unclosed group"),
        ("(?=a)b", "look-around"),
        (r"(a)\1", "backreferences are not supported"),
        (r"\bfoo", "lookarounds not supported"),
        ("[b-a]", "invalid character class range"),
        ("a\\", "lone backslash"),
        ("", "only the empty text"),
        ("a{0}", "only the empty text"),
        ("3", "no token"),
        ("a" * 70_000, "the limit is"),
        ("(" * 5000 + ")" * 5000, "nest"),
    ],
    ids=lambda value: value[:20],
)
def test_regular_expression_that_cannot_be_kept_is_refused_with_its_reason(pattern, reason):
    with pytest.raises(BadRequest) as refused:
        SMALL.compile(Form.regex(pattern))

    assert refused.value.param == "response_format"
    assert reason in str(refused.value)
    assert len(str(refused.value)) < 400
    assert len(str(refused.value).splitlines()) == 1


@pytest.mark.parametrize(
    "schema", [{"properties": {"multipleOf": {"type": "integer"}}}, {"multipleOf": 0.01}, {}, TREE]
)
def test_schema_that_only_looks_difficult_is_served(schema):
    assert SMALL.compile(Form.json(schema)).matcher(may_end=True).follow().failure is None


def test_equal_grammars_are_compiled_once_and_old_ones_forgotten():
    compiler = GrammarCompiler(TEXTS, END)
    first = compiler.compile(Form.regex("a+"))

    assert compiler.compile(Form.regex("a+")) is first
    assert compiler.compile(Form.json({"type": "object"})) is compiler.compile(Form.json({"type": "object"}))
    for number in range(grammars.MAX_CACHED):
        compiler.compile(Form.regex(f"a{{1,{number + 2}}}"))
    assert compiler.compile(Form.regex("a+")) is not first
