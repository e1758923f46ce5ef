"""GET /api/tags and POST /api/chat: chat in Ollama's shapes, whole and line by line."""

import json
from importlib.metadata import version

import pytest

from server.errors import Unavailable
from server.routes.ollama import spelt_size
from tests.server.conftest import MODEL, say
from trm.errors import Overloaded
from trm.tools import written

pytestmark = pytest.mark.anyio

URL = "/api/chat"
ADD = {
    "type": "function",
    "function": {"name": "add", "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}}},
}
NOW = {"type": "function", "function": {"name": "now"}}
CALLED = written("add", '{"a": 1}')
DETAILS = {
    "parent_model": "",
    "format": "safetensors",
    "family": "trm",
    "families": ["trm"],
    "parameter_size": "1.2M",
    "quantization_level": "F32",
}
DURATIONS = {"total_duration", "load_duration", "prompt_eval_duration", "eval_duration"}


@pytest.fixture
def body():
    """The smallest request, and more fields if given."""
    return lambda **fields: {"model": MODEL, "messages": [{"role": "user", "content": "2+2?"}], **fields}


async def read(client, body):
    """The lines of a stream."""
    response = await client.post(URL, json=body)
    assert response.status_code == 200, response.text
    assert response.headers["content-type"] == "application/x-ndjson"
    assert response.text.isascii()
    assert response.text.endswith("}\n")
    return [json.loads(line) for line in response.text.splitlines()]


async def test_tags_lists_the_models(client):
    [model] = (await client.get("/api/tags")).json()["models"]

    assert model.pop("name") == model.pop("model") == MODEL
    assert model.pop("modified_at").endswith("Z")
    assert model == {"size": 4_938_268, "digest": "ab" * 32, "details": DETAILS}


async def test_show_says_what_is_known_of_a_model(client, engine):
    shown = (await client.post("/api/show", json={"model": MODEL})).json()

    assert shown.pop("modified_at").endswith("Z")
    assert shown == {
        "details": DETAILS,
        "template": engine.chat.template,
        "capabilities": ["completion", "tools"],
        "model_info": {
            "general.architecture": "trm",
            "general.parameter_count": 1_234_567,
            "trm.context_length": 400,
            "trm.embedding_length": engine.model.config.hidden_size,
            "trm.vocab_size": engine.model.config.vocab_size,
        },
    }
    assert (await client.post("/api/show", json={"model": MODEL, "verbose": True})).status_code == 200


async def test_a_model_whose_template_knows_no_tools_does_not_show_them(client, engine):
    engine.chat.knows_tools = False

    assert (await client.post("/api/show", json={"model": MODEL})).json()["capabilities"] == ["completion"]


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        ({"model": "other"}, 404, "model 'other' does not exist"),
        ({}, 400, "model: "),
        ({"model": MODEL, "system": "Be kind."}, 400, "system: unknown or unsupported field"),
    ],
    ids=str,
)
async def test_what_cannot_be_shown_is_refused(client, body, status, message):
    response = await client.post("/api/show", json=body)

    assert response.status_code == status
    assert response.json()["error"].startswith(message)


async def test_version_is_that_of_this_package(client):
    assert (await client.get("/api/version")).json() == {"version": version("qwen-trm")}


@pytest.mark.parametrize(
    ("count", "said"),
    [(999, "999"), (1000, "1.0K"), (136_000, "136.0K"), (494_032_768, "494.0M"), (7_615_616_512, "7.6B")],
)
def test_sizes_are_spelt_as_ollama_does(count, said):
    assert spelt_size(count) == said


@pytest.mark.parametrize(
    ("pieces", "fields", "content", "calls"),
    [
        (["so ", "it is 4\u2028"], {}, "so it is 4\u2028", []),
        ([], {}, "", []),
        (["<tool", "_call"], {"tools": [ADD]}, "<tool_call", []),
        (["So\n", *CALLED, "\n", written("now", "{}")], {"tools": [ADD, NOW]}, "So", [("add", {"a": 1}), ("now", {})]),
    ],
    ids=["text", "nothing", "almost a call", "text and calls"],
)
async def test_a_message_whole_and_line_by_line(client, engine, body, pieces, fields, content, calls):
    engine.script = say(*pieces)

    whole = (await client.post(URL, json=body(stream=False, **fields))).json()
    *lines, last = await read(client, body(**fields))

    assert all((line["done"], line["model"]) == (False, MODEL) for line in lines)
    assert "".join(line["message"]["content"] for line in lines) == whole["message"]["content"] == content
    for said in ([whole], lines):
        made = [call["function"] for line in said for call in line["message"].get("tool_calls", [])]
        assert [(call["name"], call["arguments"]) for call in made] == calls
    assert last["message"] == {"role": "assistant", "content": ""}
    for end in (whole, last):
        assert (end["done"], end["done_reason"]) == (True, "stop")
        assert end["prompt_eval_count"] == len(engine.requests[0].prompt_ids)
        assert end["eval_count"] == len(pieces) + 1
        assert all(isinstance(end[name], int) for name in DURATIONS)
        assert end["total_duration"] >= end["prompt_eval_duration"] + end["eval_duration"] > 0


async def test_a_reply_that_was_cut(client, engine, body):
    engine.script = say(written("add", '{"a": 1, "b": "xyz"}')[:-22], finish="length")

    whole = (await client.post(URL, json=body(tools=[ADD], stream=False))).json()
    *_, call, last = await read(client, body(tools=[ADD]))

    assert whole["done_reason"] == last["done_reason"] == "length"
    assert call["message"]["tool_calls"] == whole["message"]["tool_calls"]
    assert call["message"]["tool_calls"][0]["function"] == {"name": "add", "arguments": {"a": 1}}


async def test_turns_come_to_the_model_as_in_chat(client, engine, body):
    turns = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "1+2?", "images": []},
        {"role": "assistant", "thinking": "Hm.", "tool_calls": [{"function": {"name": "add", "arguments": {"a": 1}}}]},
        {"role": "tool", "content": "3", "tool_name": "add"},
    ]
    response = await client.post(URL, json=body(messages=turns, tools=[ADD]))
    assert response.status_code == 200, response.text

    made = {"id": "", "type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    assert engine.chat.conversations[0] == [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "1+2?"},
        {"role": "assistant", "content": "", "tool_calls": [made]},
        {"role": "tool", "content": "3", "name": "add", "tool_call_id": ""},
    ]


@pytest.mark.parametrize(
    ("fields", "as_chat"),
    [
        ({"options": {"temperature": 0.5, "seed": 3, "top_k": 4, "top_p": 0.9, "min_p": 0.1}}, None),
        ({"options": {"repeat_penalty": 1.1, "stop": "a"}}, {"repetition_penalty": 1.1, "stop": ["a"]}),
        ({"options": {"num_predict": 7, "num_ctx": 4096}}, {"max_tokens": 7}),
        ({"options": {"num_predict": -1}}, {"max_tokens": 400}),
        ({"think": "low"}, {"reasoning_effort": "low"}),
        ({"think": True, "keep_alive": "5m", "format": "", "options": {}}, {}),
        ({"think": False, "keep_alive": -1, "format": None, "options": None}, {}),
    ],
    ids=str,
)
async def test_a_request_decodes_as_its_chat_request(client, engine, body, fields, as_chat):
    assert (await client.post(URL, json=body(**fields))).status_code == 200
    await client.post("/v1/chat/completions", json=body(**(fields["options"] if as_chat is None else as_chat)))

    assert engine.requests[0] == engine.requests[1]


async def test_formats(client, engine, body):
    described = {"type": "object", "properties": {"a": {"type": "integer"}}}
    for format_ in ("json", described, ""):
        assert (await client.post(URL, json=body(format=format_))).status_code == 200

    assert [request.grammar is None for request in engine.requests] == [False, False, True]


@pytest.mark.parametrize(
    ("fields", "status", "message"),
    [
        ({"model": "other"}, 404, "model 'other' does not exist"),
        ({"messages": []}, 400, "messages: "),
        (
            {"messages": [{"role": "user", "content": "a", "images": ["aaaa"]}]},
            400,
            "messages.0.images: this model reads",
        ),
        ({"options": {"temperature": 3}}, 400, "temperature is 3"),
        ({"options": {"num_predict": 0}}, 400, "options.num_predict: "),
        ({"options": {"mirostat": 1}}, 400, "options.mirostat: unknown or unsupported field"),
        ({"format": {"else": []}}, 400, "format cannot be served: "),
        ({"format": "yaml"}, 400, 'format: should be "json" or a JSON schema'),
        ({"think": "hard"}, 400, "think: "),
    ],
    ids=str,
)
async def test_what_is_refused_is_named_in_ollamas_shape(client, engine, body, fields, status, message):
    response = await client.post(URL, json=body(**fields))

    assert response.status_code == status
    assert response.json().keys() == {"error"}
    assert response.json()["error"].startswith(message)
    assert not engine.requests


async def test_errors_before_and_in_mid_stream(client, engine, body):
    engine.script = say("so ", finish="error", error=Unavailable("the device failed", "device_failed"))
    last = (await read(client, body()))[-1]
    engine.refuse = Overloaded("full", 3)
    refused = await client.post(URL, json=body())

    assert last == {"error": "the device failed"}
    assert (refused.status_code, refused.json()) == (429, {"error": "full"})
