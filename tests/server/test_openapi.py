"""The document at /openapi.json says what the server takes."""

import re

import jsonschema
import pytest

from server.openapi import up_to

pytestmark = pytest.mark.anyio


@pytest.fixture
async def described(client):
    return (await client.get("/openapi.json")).json()


def accepts(described, name, body):
    schema = {"$ref": f"#/components/schemas/{name}", "components": described["components"]}
    return jsonschema.Draft202012Validator(schema).is_valid(body)


@pytest.mark.parametrize("largest", [0, 7, 9, 10, 99, 100, 109, 2047, 151935])
def test_ids_up_to_the_largest(largest):
    pattern = re.compile(up_to(largest))
    around = {*range(120), *range(max(0, largest - 1100), largest + 1100), 10 * largest}

    assert [number for number in around if pattern.fullmatch(str(number))] == [n for n in around if n <= largest]
    assert not pattern.fullmatch("")
    assert not pattern.fullmatch("00")


async def test_its_version_is_the_servers(described, client):
    assert described["info"]["version"] == (await client.get("/version")).json()["version"]


@pytest.mark.parametrize(
    ("fields", "valid"),
    [
        ({}, True),
        ({"temperature": 2}, True),
        ({"temperature": 2.5}, False),
        ({"top_p": -0.1}, False),
        ({"halt_threshold": 1}, False),
        ({"n": 12.0}, True),
        ({"n": 13}, False),
        ({"n": 0}, False),
        ({"max_completion_tokens": 0}, False),
        ({"top_logprobs": -1, "logprobs": True}, False),
        ({"trace": 0}, False),
        ({"supervision_steps": 16}, True),
        ({"supervision_steps": 3, "reasoning_effort": None}, True),
        ({"supervision_steps": 3, "reasoning_effort": "low"}, False),
        ({"top_logprobs": 3, "logprobs": True}, True),
        ({"top_logprobs": 0}, True),
        ({"top_logprobs": 1}, False),
        ({"stream_options": {"include_usage": True}, "stream": True}, True),
        ({"stream_options": {}}, False),
        ({"stream_options": {"continuous_usage_stats": True}, "stream": True}, False),
        ({"max_tokens": 3, "max_completion_tokens": 3}, False),
        ({"stop": ["a", "b"]}, True),
        ({"stop": ""}, False),
        ({"stop": ["a"] * 17}, False),
        ({"logit_bias": {"0": 100}}, True),
        ({"logit_bias": {"0": 101}}, False),
        ({"messages": []}, False),
        ({"messages": [{"role": "user", "content": []}]}, False),
        ({"work": "none"}, True),
        ({"work": None}, True),
        ({"work": "some"}, False),
        ({"work": "none", "messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}, True),
        ({"work": None, "messages": [{"role": "system", "content": "a"}]}, True),
        ({"model": "other"}, False),
        ({"unknown": 1}, False),
    ],
    ids=str,
)
async def test_what_the_document_takes_the_server_takes(client, described, chat_body, fields, valid):
    response = await client.post("/v1/chat/completions", json=chat_body() | fields)

    assert accepts(described, "ChatRequest", chat_body() | fields) == valid
    assert (response.status_code == 200) == valid, response.text


@pytest.mark.parametrize(
    ("fields", "valid"),
    [
        ({}, True),
        ({"n": 3}, True),
        ({"n": 3, "temperature": 0}, False),
        ({"n": 1, "temperature": 0}, True),
        ({"work": "equations"}, True),
        ({"work": "some"}, False),
        ({"question": " "}, False),
        ({"question": []}, False),
    ],
    ids=str,
)
async def test_the_same_of_questions(client, described, fields, valid):
    body = {"question": "2+2?"} | fields

    assert accepts(described, "SolveRequest", body) == valid
    assert ((await client.post("/solve", json=body)).status_code == 200) == valid


@pytest.mark.parametrize(
    ("fields", "valid"),
    [
        ({}, True),
        ({"input": [{"role": "user", "content": "a"}]}, True),
        ({"input": []}, False),
        ({"input": [{"type": "reasoning"}]}, False),
        ({"input": [{"type": "reasoning"}], "instructions": "b"}, True),
        ({"input": [{"type": "reasoning"}, {"role": "user", "content": "a"}]}, True),
        ({"input": [{"type": "item_reference", "id": "a"}]}, False),
        ({"max_output_tokens": 0}, False),
        ({"temperature": 2.5}, False),
        ({"supervision_steps": 3, "reasoning": {"effort": "low"}}, False),
        ({"supervision_steps": 3, "reasoning": {"effort": None}}, True),
        ({"supervision_steps": 3, "reasoning": None}, True),
        ({"reasoning": {"effort": "low", "summary": "auto"}}, True),
        ({"work": "none", "instructions": "b"}, False),
        ({"text": {"format": {"type": "json_schema", "name": "a", "schema": {}}}}, True),
        ({"text": {"format": {"type": "json_schema"}}}, False),
        ({"tools": [{"type": "function", "name": "a"}], "tool_choice": {"type": "function", "name": "a"}}, True),
        ({"tools": [{"type": "web_search"}]}, False),
        ({"stream": True, "stream_options": {}}, True),
        ({"stream_options": {}}, False),
        ({"store": True}, False),
        ({"n": 1}, False),
    ],
    ids=str,
)
async def test_the_same_of_responses(client, described, fields, valid):
    body = {"input": "a"} | fields

    assert accepts(described, "ResponsesRequest", body) == valid
    assert ((await client.post("/v1/responses", json=body)).status_code == 200) == valid


async def test_what_only_the_engine_checks_is_documented_too(described, chat_body):
    assert not accepts(described, "ChatRequest", chat_body(supervision_steps=17))
    assert not accepts(described, "ChatRequest", chat_body(logit_bias={"99999999": 1}))
    assert not accepts(described, "DetokenizeRequest", {"tokens": [99999999]})
    assert not accepts(described, "DetokenizeRequest", {"tokens": [-1]})
    assert not accepts(described, "CompletionRequest", {"prompt": [[99999999]]})


async def test_what_tools_cannot_make_requests_from_is_said_in_words(described):
    """`work` not beside a system message: the server refuses it (tests/server/test_chat.py), the field says so."""
    for name in ("ChatRequest", "TokenizeRequest"):
        schema = described["components"]["schemas"][name]
        assert "system message" in schema["properties"]["work"]["description"]
        assert {} not in schema["allOf"]


async def test_every_error_is_documented_in_our_shape(described):
    posted = described["paths"]["/v1/completions"]["post"]["responses"]
    assert posted.keys() == {"200", "400", "404", "408", "413", "415", "429", "431", "500", "503", "504"}
    assert posted["400"]["content"]["application/json"]["schema"] == {"$ref": "#/components/schemas/ErrorBody"}
    assert posted["200"]["content"].keys() == {"application/json", "text/event-stream"}
    assert described["paths"]["/version"]["get"]["responses"].keys() == {"200", "431", "500", "503"}
    assert "HTTPValidationError" not in described["components"]["schemas"]
    assert "security" not in described


async def test_keys_are_documented_where_they_are_asked_for(make_app, connect):
    async with connect(make_app(api_key=["key"], public_paths=["/metrics"])) as client:
        described = (await client.get("/openapi.json", headers={"Authorization": "Bearer key"})).json()

    assert described["security"] == [{"key": []}]
    assert "401" in described["paths"]["/solve"]["post"]["responses"]
    open_paths = [
        path for path, operations in described["paths"].items() if operations.get("get", {}).get("security") == []
    ]
    assert sorted(open_paths) == ["/health", "/metrics", "/ready"]
