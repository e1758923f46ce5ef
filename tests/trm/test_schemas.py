"""Schemas as the library gets them: what is endless left out, unknown formats dropped, and values left alone."""

import copy
import itertools
import json
import random
import time
from functools import lru_cache
from typing import Any

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.trm.grammars import BYTES, begins, is_text, nested
from trm.engine import schemas
from trm.engine.grammar import Form
from trm.errors import BadRequest

PROPERTY = settings(max_examples=150, deadline=None, derandomize=True)
# Schemas that no finite text meets

ENDLESS: dict[str, dict[str, Any]] = {
    "itself": {"$ref": "#"},
    "a property": {"type": "object", "properties": {"n": {"$ref": "#"}}, "required": ["n"]},
    "any property": {"type": "object", "required": ["n"], "additionalProperties": {"$ref": "#"}},
    "some property": {"type": "object", "minProperties": 1, "additionalProperties": {"$ref": "#"}},
    "items": {"type": "array", "items": {"$ref": "#"}, "minItems": 1},
    "the second item": {"type": "array", "prefixItems": [{}, {"$ref": "#"}], "minItems": 2},
    "items of old drafts": {"type": "array", "items": [{}, {"$ref": "#"}], "minItems": 2},
    "alternatives": {"anyOf": [{"type": "array", "items": {"$ref": "#"}, "minItems": n} for n in (1, 2)]},
    "one of": {"oneOf": [{"type": "array", "items": {"$ref": "#"}, "minItems": 1}, False]},
    "mutual": {
        "$defs": {
            "a/b": {"type": "array", "items": {"$ref": "#/$defs/c%20d"}, "minItems": 1},
            "c d": {"type": "object", "properties": {"a": {"$ref": "#/$defs/a~1b"}}, "required": ["a"]},
        },
        "$ref": "#/$defs/a~1b",
    },
    "parts": {"allOf": [{"type": "object", "properties": {"n": {"$ref": "#"}}}, {"required": ["n"]}]},
    "alternative properties": {
        "type": "object",
        "required": ["n"],
        "anyOf": [
            {"properties": {"n": {"$ref": "#"}}},
            {"properties": {"n": {"type": "array", "items": {"$ref": "#"}, "minItems": 2}}},
        ],
        "properties": {"n": {"type": ["array", "object"]}},
    },
    "deeper down": {
        "type": "object",
        "properties": {"a": {"type": "array", "items": {"$ref": "#/$defs/n"}, "minItems": 3}},
        "required": ["a"],
        "$defs": {"n": {"type": "object", "properties": {"n": {"$ref": "#/$defs/n"}}, "required": ["n"]}},
    },
    "no value of the type": {
        "anyOf": [{"type": "string", "enum": [1]}, {"type": "array", "items": {"$ref": "#"}, "minItems": 1}]
    },
    "nothing allowed": {"type": "object", "required": ["a"], "properties": {"a": False}},
    "nothing left": {"type": "object", "required": ["a"], "additionalProperties": False},
}
NODE = ENDLESS["deeper down"]["$defs"]["n"]


@pytest.mark.parametrize("name", ENDLESS)
def test_schema_that_no_finite_text_meets_is_refused(name):
    with pytest.raises(BadRequest, match="no finite text meets the schema"):
        BYTES.compile(Form.json(ENDLESS[name]))


@pytest.mark.parametrize(
    ("schema", "good", "bad"),
    [
        ({"properties": {"n": {"$ref": "#/$defs/n"}}, "$defs": {"n": NODE}}, ["{}", '{"m":1}', "1"], ['{"n"']),
        ({"anyOf": [{"$ref": "#/$defs/n"}, {"type": "null"}], "$defs": {"n": NODE}}, ["null"], ["{"]),
        ({"type": "array", "items": {"$ref": "#/$defs/n"}, "$defs": {"n": NODE}}, ["[]"], ["[{"]),
        ({"type": "array", "prefixItems": [{}, {"$ref": "#/$defs/n"}], "$defs": {"n": NODE}}, ["[1]"], ["[1,"]),
        ({"type": "object", "additionalProperties": {"$ref": "#/$defs/n"}, "$defs": {"n": NODE}}, ["{}"], ['{"']),
        (
            {"type": "object", "patternProperties": {"^a": {"$ref": "#/$defs/n"}}, "$defs": {"n": NODE}},
            ['{"b":1}'],
            ['{"a"'],
        ),
        ({"properties": {"a": {"$ref": "#/$defs/no"}}, "$defs": {"no": False}}, ["{}"], ['{"a"']),
        (
            {  # what is inside of an endless schema can still be meant
                "type": "object",
                "properties": {"n": {"$ref": "#/$defs/n"}, "v": {"$ref": "#/$defs/n/properties/v"}},
                "$defs": {"n": NODE | {"properties": {"n": {"$ref": "#/$defs/n"}, "v": {"type": "null"}}}},
            },
            ["{}", '{"v":null}'],
            ['{"n"', '{"v":1'],
        ),
        (
            {
                "type": "object",
                "required": ["n"],
                "anyOf": [{"properties": {"n": {"$ref": "#/$defs/n"}}}, {"properties": {"n": {"type": "null"}}}],
                "$defs": {"n": NODE},
            },
            ['{"n":null}'],
            ['{"n":{'],
        ),
    ],
    ids=lambda value: str(value)[:60],
)
def test_an_endless_part_is_left_out(schema, good, bad):
    grammar = BYTES.compile(Form.json(schema))

    assert [text for text in good if not is_text(grammar, text)] == []
    assert [text for text in bad if begins(grammar, text)] == []


@pytest.mark.parametrize(
    "schema",
    [
        {"properties": {"n": {"$ref": "#"}}, "required": ["n"]},
        {"type": ["object", "null"], "properties": {"n": {"$ref": "#"}}, "required": ["n"]},
        {"type": "array", "items": {"$ref": "#"}},
        {
            "type": "object",
            "patternProperties": {"^n": {"type": "null"}},
            "required": ["n"],
            "additionalProperties": False,
        },
        {"type": "object", "minProperties": 1, "patternProperties": {"^n": {}}, "additionalProperties": False},
        {"$ref": "#tree", "$defs": {"a": {"$anchor": "tree", "type": "null"}}},
        {"$ref": "b", "$defs": {"a": {"$id": "b", "$ref": "#/c", "c": {"type": "null"}}}, "c": False},
        {"$schema": "http://json-schema.org/draft-07/schema#", "prefixItems": [False], "minItems": 1, "type": "array"},
        {"properties": {"$ref": {"type": "null"}, "required": {}, "enum": {"type": "null"}}, "type": "object"},
        {"const": {"$ref": "#"}},
        nested(126, "items"),
    ],
    ids=lambda schema: str(schema)[:60],
)
def test_schema_that_only_looks_endless_is_served(schema):
    BYTES.compile(Form.json(schema))


SCALARS: list[Any] = [None, True, 1, "a", [], {}]


def instances(inside: list[Any]) -> list[Any]:
    pairs = list(itertools.product(inside[:7], repeat=2))
    lists = [*([value] for value in inside), *map(list, pairs)]
    return [
        *SCALARS,
        *lists,
        *({name: value} for name in "ab" for value in inside),
        *({"a": a, "b": b} for a, b in pairs),
    ]


INSTANCES = instances(instances(SCALARS)[:20])


def some_schema(rng: random.Random, depth: int) -> Any:
    """Of keywords that can make a schema endless, with $refs to `$defs` a and b and to the whole."""
    if depth == 0 or rng.random() < 0.35:
        return {"$ref": rng.choice(["#", "#/$defs/a", "#/$defs/b"])} if rng.random() < 0.6 else rng.choice(LEAVES)
    schema: dict[str, Any] = {}
    for keyword in rng.sample(sorted(KEYWORDS), rng.randint(1, 4)):
        schema[keyword] = KEYWORDS[keyword](rng, depth - 1)
    return schema


LEAVES: list[Any] = [False, True, {"type": "null"}, {"type": "integer"}, {"enum": [1, "a"]}, {"const": {}}]
KEYWORDS: dict[str, Any] = {
    "type": lambda rng, depth: rng.choice(["object", "array", ["object", "array"], "object", ["array", "null"]]),
    "properties": lambda rng, depth: {name: some_schema(rng, depth) for name in rng.choice(["a", "ab", "b"])},
    "required": lambda rng, depth: rng.choice([["a"], ["b"], ["a", "b"]]),
    "additionalProperties": some_schema,
    "items": some_schema,
    "prefixItems": lambda rng, depth: [some_schema(rng, depth) for _ in range(rng.randint(1, 2))],
    "minItems": lambda rng, depth: rng.randint(1, 2),
    "minProperties": lambda rng, depth: rng.randint(1, 2),
    "anyOf": lambda rng, depth: [some_schema(rng, depth) for _ in range(rng.randint(1, 3))],
    "allOf": lambda rng, depth: [some_schema(rng, depth) for _ in range(rng.randint(1, 2))],
    "$ref": lambda rng, depth: rng.choice(["#/$defs/a", "#/$defs/b"]),
}


PLAIN = ("type", "required", "enum", "const", "minItems", "minProperties")


@lru_cache(None)
def meets_plainly(schema: str, value: str) -> bool:
    return jsonschema.Draft202012Validator(json.loads(schema)).is_valid(json.loads(value))


def meets(schema: Any, value: Any, root: Any, doing: frozenset[int] = frozenset()) -> bool:
    """Whether `value` meets a schema of those keywords. A $ref that leads to itself is not met.

    doing: the schemas that wait for the answer. (jsonschema follows such $refs for ever, or until the stack is full.)
    """
    if isinstance(schema, bool):
        return schema
    if id(schema) in doing:
        return False
    doing |= {id(schema)}
    if "$ref" in schema:
        target = root if schema["$ref"] == "#" else root["$defs"][schema["$ref"][-1]]
        if not meets(target, value, root, doing):
            return False
    if not all(meets(part, value, root, doing) for part in schema.get("allOf", [])):
        return False
    if not any(meets(part, value, root, doing) for part in schema.get("anyOf", [True])):
        return False
    if not meets_plainly(json.dumps({key: schema[key] for key in PLAIN if key in schema}), json.dumps(value)):
        return False
    if isinstance(value, dict):
        properties, others = schema.get("properties", {}), schema.get("additionalProperties", True)
        return all(meets(properties.get(name, others), inside, root) for name, inside in value.items())
    if isinstance(value, list):
        first, others = schema.get("prefixItems", []), schema.get("items", True)
        pairs = itertools.zip_longest(first[: len(value)], value, fillvalue=others)
        return all(meets(item, inside, root) for item, inside in pairs)
    return True


@PROPERTY
@given(st.randoms(use_true_random=False))
def test_no_schema_that_a_text_meets_is_refused_for_being_endless(rng):
    schema = some_schema(rng, 2)
    schema = (schema if isinstance(schema, dict) else {}) | {"$defs": {name: some_schema(rng, 2) for name in "ab"}}
    met = [value for value in INSTANCES if meets(schema, value, schema)]

    prepared = copy.deepcopy(schema)
    try:
        schemas.prepare(prepared)
    except BadRequest:
        prepared = {"allOf": [False]}
    assert [value for value in INSTANCES if meets(prepared, value, prepared)] == met


# Formats


@pytest.mark.parametrize("format_", sorted(schemas.FORMATS - {"unknown"}))
def test_known_format_is_kept(format_):
    assert not begins(BYTES.compile(Form.json({"type": "string", "format": format_})), '"\u00a7')


@pytest.mark.parametrize("format_", ["path", "binary", "password", "byte", "int32", "uri-reference", "Date", ""])
@pytest.mark.parametrize(
    ("where", "text"),
    [
        (lambda schema: schema, '"\u00a7"'),
        (lambda schema: {"type": "array", "items": schema}, '["\u00a7"]'),
        (lambda schema: {"type": "array", "items": [{}, schema]}, '[1,"\u00a7"]'),
        (lambda schema: {"properties": {"format": schema}}, '{"format":"\u00a7"}'),
        (lambda schema: {"additionalProperties": schema}, '{"a":"\u00a7"}'),
        (lambda schema: {"patternProperties": {"a": schema}}, '{"a":"\u00a7"}'),
        (lambda schema: {"anyOf": [{"type": "null"}, {"allOf": [schema]}]}, '"\u00a7"'),
        (lambda schema: {"$ref": "#/$defs/format", "$defs": {"format": schema}}, '"\u00a7"'),
        (lambda schema: {"$ref": "#/else%20where/0", "else where": [schema]}, '"\u00a7"'),
    ],
)
def test_other_formats_are_annotations(format_, where, text):
    for type_ in ({"type": "string"}, {}):
        assert is_text(BYTES.compile(Form.json(where({**type_, "format": format_}))), text)


def test_format_of_a_number_is_an_annotation():
    assert is_text(BYTES.compile(Form.json({"type": "integer", "format": "int32"})), "5")


@pytest.mark.parametrize("names", [{"type": "string"}, {}, True])
def test_names_of_properties_that_may_be_any_are_no_matter(names):
    values = {"type": "object", "propertyNames": names, "additionalProperties": {"type": "string"}}

    assert is_text(BYTES.compile(Form.json({"properties": {"m": values}})), '{"m": {"é": "b"}}')
    with pytest.raises(BadRequest, match="propertyNames"):
        BYTES.compile(Form.json({**values, "propertyNames": {"pattern": "a"}}))


def test_more_optional_properties_than_the_library_looks_at_are_refused_before_decoding():
    def schema(count: int, **more: Any) -> dict[str, Any]:
        return {"type": "object", "properties": {f"p{i}": {"type": "null"} for i in range(count)}, **more}

    whole = BYTES.compile(Form.json(schema(400, additionalProperties=False)))
    assert is_text(whole, '{"p7": null, "p399": null}')
    BYTES.compile(Form.json(schema(1500, required=[f"p{i}" for i in range(1200)])))
    with pytest.raises(BadRequest, match="an object has 401 optional properties; the limit is 400"):
        BYTES.compile(Form.json({"properties": {"a": schema(401)}}))


@pytest.mark.parametrize("keyword", ["enum", "const"])
def test_values_that_look_like_schemas_are_not_touched(keyword):
    value = {"format": "path", "multipleOf": 10_007, "items": {"format": "path"}, "$ref": "#", "allOf": [False]}
    schema = {keyword: [value], "default": value, "examples": [value]}
    before = copy.deepcopy(schema)

    assert is_text(BYTES.compile(Form.json(schema)), json.dumps([value] if keyword == "const" else value))
    assert schema == before


def test_schemas_whose_parts_multiply_are_refused_in_time() -> None:
    wide = {"allOf": [*({} for _ in range(13)), {"required": [f"n{place}" for place in range(2000)]}]}
    branch = {"$ref": "#/$defs/wide", "anyOf": [{} for _ in range(16)]}
    schema = {"$defs": {"wide": wide}, "anyOf": [copy.deepcopy(branch) for _ in range(800)]}
    began = time.process_time()

    with pytest.raises(BadRequest, match="too much to do with one another"):
        schemas.prepare(schema)

    assert time.process_time() - began < 10  # a minute and gigabytes, if nothing stops it
