"""Numbers in JSON come to an end, whatever the model likes, and what a schema names can still be said."""

import json
import random
import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.trm.grammars import ANYTHING, BYTES, allowed, is_text
from trm.engine.grammar import Form, GrammarCompiler

PROPERTY = settings(max_examples=150, deadline=None, derandomize=True)
DIGIT_TEXTS: list[bytes | None] = [
    *(bytes([byte]) for byte in range(256)),
    b"12",
    b"000",
    b"999999",
    b"0,",
    b'":7',
    None,
]
NUMBERS: list[tuple[dict[str, Any], str]] = [
    ({"type": "integer"}, ""),
    ({"type": "number"}, ""),
    ({"type": ["null", "integer"]}, "-"),
    ({}, ""),
    ({}, '{"a": '),
    ({"type": "object"}, '{"a": 1, "b": [{"c":'),
    ({"type": "object"}, '{"12345678901234567890\\"1": '),
    ({"type": "object", "properties": {"a": {"type": "number"}}}, '{"a":'),
    ({"type": "object", "patternProperties": {"^a": {"type": "integer"}}}, '{"a":'),
    ({"type": "array", "items": {"type": "integer"}}, "[1,"),
    ({"type": "array", "prefixItems": [{"type": "string"}, {"type": "number"}]}, '["\u0031", '),
    ({"anyOf": [{"type": "string"}, {"type": "integer"}]}, ""),
    ({"allOf": [{"type": "number"}, {"minimum": -3}]}, ""),
    ({"$ref": "#/$defs/a", "$defs": {"a": {"type": "array", "items": {"type": "number"}}}}, "[0.5e1,"),
    ({"type": "number", "exclusiveMinimum": 0}, ""),
    ({"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1e-9}, ""),
    ({"type": "number", "maximum": -0.5}, ""),
    ({"type": "integer", "minimum": 10**17}, ""),
    ({"type": "integer", "minimum": 10**15, "maximum": 10**18}, ""),
    ({"type": "integer", "multipleOf": 7}, ""),
    ({"type": "number", "multipleOf": 9973}, ""),
    ({"type": "number", "multipleOf": 0.25}, ""),
    ({"allOf": [{"type": "integer", "multipleOf": 89}, {"multipleOf": 0.5, "exclusiveMinimum": 5}]}, ""),
    ({"anyOf": [{"const": 10**22}, {"type": "integer"}]}, ""),
]


@pytest.mark.parametrize(("schema", "start"), NUMBERS, ids=lambda value: str(value)[:60])
@pytest.mark.parametrize("favourite", ["0", "9", "many", *range(4)])
def test_a_number_ends_however_much_digits_are_liked(schema, start, favourite):
    """Digits wherever they may stand, then whatever makes the number go on."""
    matcher = GrammarCompiler(DIGIT_TEXTS, len(DIGIT_TEXTS) - 1).compile(Form.json(schema)).matcher(may_end=True)
    for byte in start.encode():
        assert matcher.follow().allows(byte), f"{start!r} at {chr(byte)!r}"
        matcher.advance(byte)
    rng, literal = random.Random(str(favourite)), b""
    while True:
        texts = {token: DIGIT_TEXTS[token] or b"" for token in allowed(matcher.follow(), len(DIGIT_TEXTS))}
        ranks = {token: re.search(rb"^([0-9]+$)|^(\.)|^([eE])|^([+-])", text) for token, text in texts.items()}
        best = min((match.lastindex or 9 for match in ranks.values() if match), default=9)
        tokens = [token for token, match in ranks.items() if match and match.lastindex == best]
        if not tokens:
            break
        liked = [token for token in tokens if texts[token].decode() == favourite] or tokens
        liked = [max(tokens, key=lambda token: len(texts[token]))] if favourite == "many" else liked
        token = rng.choice(liked)
        literal += texts[token]
        matcher.advance(token)
        whole, fraction, exponent = re.fullmatch(rb"[ -]*(\d*)\.?(\d*)(?:[eE][+-]?(\d*))?", literal).groups(b"")
        assert len(whole) <= (23 if "const" in str(schema) else 19)
        assert len(fraction) <= 21, "one more where the others are zeros and none may end"
        assert len(exponent) <= 2
    json.loads(literal)


@PROPERTY
@given(
    st.integers(-(2**63), 2**63 - 1)
    | st.floats(-1e99, 1e99).filter(lambda number: not 0 < abs(number) < 1e-83)
    | st.floats(-1, 1).map(lambda number: round(number, 6))
)
def test_every_usual_number_can_be_said(number):
    text = json.dumps(number)

    assert is_text(ANYTHING, text)
    assert is_text(ANYTHING, f'{{"a":[{text},{text}]}}')


@pytest.mark.parametrize(
    ("schema", "text"),
    [
        ({"type": "string"}, '"' + "7" * 99 + '"'),
        ({"type": "object"}, '{"' + "7" * 99 + '":"e' + "7" * 99 + '\\"' + "7" * 99 + '"}'),
        ({"enum": [10**20, 10**25, 1]}, "1" + "0" * 25),
        ({"anyOf": [{"const": 10**30}, {"type": "integer"}]}, "1" + "0" * 30),
        ({"enum": [1.2345678901e-12, 0]}, "0.0000000000012345678901"),
        ({"anyOf": [{"const": 1.5e-30}, {"type": "number"}]}, "0." + "0" * 29 + "15"),
        ({"const": [{"a": 1e300}]}, '[{"a":1' + "0" * 300 + "}]"),
        ({"type": "integer", "minimum": 10**17, "multipleOf": 9973}, str(9973 * (10**17 // 9973 + 1))),
        ({"type": "number", "minimum": 10**18, "maximum": 5 * 10**18, "multipleOf": 2}, "1234567890123456788"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_what_a_schema_names_or_does_not_call_a_number_is_not_bounded(schema, text):
    assert is_text(BYTES.compile(Form.json(schema)), text)


def test_digits_of_other_grammars_are_not_bounded():
    assert is_text(BYTES.compile(Form.regex("[0-9]+")), "7" * 99)


@pytest.mark.parametrize("schema", [{"type": "integer"}, {"type": "number", "exclusiveMinimum": 0}])
def test_drafts_of_digits_are_bounded_like_replies(schema):
    grammar = BYTES.compile(Form.json(schema))
    draft = list(b"0." + b"0" * 20 if "exclusiveMinimum" in schema else b"9" * 19)
    ahead, step = grammar.matcher(may_end=True), grammar.matcher(may_end=True)

    for place, token in enumerate(draft):
        assert ahead.follow(draft[:place]) == step.follow()
        step.advance(token)
    assert ahead.follow(draft) == step.follow()
    assert not step.follow().allows(ord("0"))
