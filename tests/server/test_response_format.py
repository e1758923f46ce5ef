"""response_format: what becomes of it on its way to the engine, and what is refused."""

import json
import threading
from enum import Enum
from pathlib import Path

import anyio
import pytest
from pydantic import BaseModel, SecretStr

from tests.server.conftest import END_ID, byte_ids, read_stream
from trm.engine.grammar import GrammarCompiler
from trm.engine.request import Event, Usage
from trm.errors import BadRequest

pytestmark = pytest.mark.anyio

URLS = {"/v1/chat/completions": {"messages": [{"role": "user", "content": "2+2?"}]}, "/v1/completions": {"prompt": "4"}}


class Unit(Enum):
    KG = "kg"
    M = "m"


class Step(BaseModel):
    says: str


class Answer(BaseModel):
    """What an OpenAI client sends of this is its `model_json_schema`."""

    steps: list[Step]
    value: float
    unit: Unit | None = None


def schema_format(schema, **more):
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, **more}}


def is_text_of(grammar, text):
    """Whether the grammar takes the bytes of `text`, one token each, and lets the reply end there."""
    matcher = grammar.matcher(may_end=True)
    for token in byte_ids(text.encode()):
        if not matcher.follow().allows(token):
            return False
        matcher.advance(token)
    return matcher.follow().allows(END_ID)


@pytest.mark.parametrize("url", URLS)
@pytest.mark.parametrize(
    ("wanted", "right", "wrong"),
    [
        ({"type": "json_object"}, '{"a": [1, null]}', "[1]"),
        ({"type": "json_object"}, "{}", '{\n  "a": 1\n}'),
        (schema_format({"type": "integer"}), "-12", "1.5"),
        (schema_format({"type": "integer"}, strict=True, description="a number"), "0", "null"),
        (schema_format({"type": "integer"}, strict=False), "7", '"7"'),
        (schema_format({}), '["a", {"b": 1e3}]', "a"),
        (
            schema_format(Answer.model_json_schema()),
            '{"steps": [{"says": "\\"4\\" \u221e"}], "value": 4, "unit": "kg"}',
            '{"steps": [], "value": "4"}',
        ),
        (schema_format(Answer.model_json_schema()), '{"steps":[],"value":4.5,"unit":null}', '{"value":4,"steps":[]}'),
        ({"type": "regex", "regex": "[0-9]{2}:[0-9]{2}"}, "12:30", "12:3"),
        ({"type": "choice", "choice": ["yes", "no"]}, "no", "nob"),
    ],
    ids=lambda value: str(value)[:50],
)
async def test_the_engine_is_given_the_grammar(client, engine, url, wanted, right, wrong):
    response = await client.post(url, json=URLS[url] | {"response_format": wanted, "n": 2})

    assert response.status_code == 200, response.text
    first, second = (request.grammar for request in engine.requests)
    assert first is second
    assert is_text_of(first, right)
    assert not is_text_of(first, wrong)


@pytest.mark.parametrize("url", URLS)
@pytest.mark.parametrize("wanted", [None, {"type": "text"}])
async def test_text_needs_no_grammar(client, engine, url, wanted):
    response = await client.post(url, json=URLS[url] | {"response_format": wanted})

    assert response.status_code == 200
    assert engine.requests[0].grammar is None


@pytest.mark.parametrize("url", URLS)
async def test_what_cannot_be_kept_is_refused_with_the_reason_and_gives_its_place_back(client, engine, url):
    body = URLS[url] | {"response_format": schema_format({"items": {"uniqueItems": True}}), "n": 12}

    for _ in range(3):  # each reserves all places that there are
        response = await client.post(url, json=body)
        assert response.status_code == 400
        error = response.json()["error"]
        assert error["param"] == "response_format"
        assert error["message"] == 'response_format cannot be served: Unimplemented keys: ["uniqueItems"]'
    assert (await client.post(url, json=URLS[url] | {"n": 12})).status_code == 200
    assert len(engine.requests) == 12


@pytest.mark.parametrize(
    ("schema", "reason"),
    [
        ({"type": "object", "properties": {"n": {"$ref": "#"}}, "required": ["n"]}, "no finite text meets the schema"),
        ({"enum": [2**53 + 1]}, "9007199254740993 has more digits than a double keeps"),
    ],
)
async def test_schema_that_no_reply_can_meet_is_refused(client, engine, chat_body, schema, reason):
    response = await client.post("/v1/chat/completions", json=chat_body(response_format=schema_format(schema)))

    assert response.status_code == 400
    assert reason in response.json()["error"]["message"]
    assert response.json()["error"]["param"] == "response_format"
    assert engine.requests == []


@pytest.mark.parametrize("levels", [130, 180, 10_000])
@pytest.mark.parametrize(("start", "end"), [('{"items":', "}"), ('{"allOf":[', "]}"), ('{"enum":[', "]}")])
async def test_schema_that_nests_deeply_is_refused(client, chat_body, levels, start, end):
    body = json.dumps(chat_body(response_format=schema_format("deep")))
    body = body.replace('"deep"', start * levels + "{}" + end * levels)

    response = await client.post("/v1/chat/completions", content=body, headers={"content-type": "application/json"})

    assert response.status_code == 400, response.text


async def test_formats_that_are_only_annotations_are_served(client, engine, chat_body):
    class File(BaseModel):
        path: Path
        key: SecretStr
        format: bytes

    schema = File.model_json_schema()
    response = await client.post("/v1/chat/completions", json=chat_body(response_format=schema_format(schema)))

    assert response.status_code == 200, response.text
    assert is_text_of(engine.requests[0].grammar, '{"path":"/tmp","key":"a b","format":"c"}')


async def test_the_loop_answers_while_a_grammar_is_compiled(client, chat_body, monkeypatch):
    started, go_on = threading.Event(), threading.Event()
    original = GrammarCompiler.compile

    def slow(self, form, tools):
        started.set()
        assert go_on.wait(10)
        return original(self, form, tools)

    monkeypatch.setattr(GrammarCompiler, "compile", slow)
    statuses = []

    async def ask():
        body = chat_body(response_format={"type": "regex", "regex": "a+"})
        statuses.append((await client.post("/v1/chat/completions", json=body)).status_code)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(ask)
        with anyio.fail_after(10):
            while not started.is_set():
                await anyio.sleep(0.001)
        assert (await client.get("/health")).status_code == 200
        assert statuses == []
        go_on.set()
    assert statuses == [200]


@pytest.mark.parametrize("stream", [False, True])
async def test_dead_end_in_the_middle_is_the_requests_own_fault(client, engine, chat_body, stream):
    error = BadRequest("response_format: after 1 tokens no token of this model may follow", param="response_format")
    engine.script = lambda request: [
        Event((10,), "a", usage=Usage(3, 1, 4)),
        Event(finish_reason="error", usage=Usage(3, 1, 4), error=error),
    ]
    body = chat_body(response_format={"type": "regex", "regex": "a+"}, stream=stream)

    if stream:
        chunks = await read_stream(client, "/v1/chat/completions", body)
        told = chunks[-1]["error"]
    else:
        response = await client.post("/v1/chat/completions", json=body)
        assert response.status_code == 400
        told = response.json()["error"]

    assert told["param"] == "response_format"
    assert told["type"] == "invalid_request_error"
    assert told["message"] == str(error)


async def test_the_document_describes_every_format(client):
    document = (await client.get("/openapi.json")).json()

    wanted = document["components"]["schemas"]["ChatRequest"]["properties"]["response_format"]["anyOf"][0]
    assert set(wanted["discriminator"]["mapping"]) == {"text", "json_object", "json_schema", "regex", "choice"}
    assert len(wanted["oneOf"]) == 5
