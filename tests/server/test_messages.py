"""POST /v1/messages and count_tokens: chat in Anthropic's shapes, whole and streamed."""

import json

import pytest

from server.errors import Unavailable
from tests.server.conftest import END_ID, MODEL, byte_ids, say
from trm.engine.request import Event, Usage
from trm.errors import Overloaded
from trm.tools import written

pytestmark = pytest.mark.anyio

URL = "/v1/messages"
COUNT = "/v1/messages/count_tokens"
ADD = {
    "name": "add",
    "description": "Adds.",
    "input_schema": {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]},
}
NOW = {"name": "now", "input_schema": {"type": "object", "properties": None, "required": None}}
CALLED = written("add", '{"a": 1}')


@pytest.fixture
def body():
    """The smallest request, and more fields if given."""
    return lambda **fields: {"max_tokens": 64, "messages": [{"role": "user", "content": "2+2?"}], **fields}


async def read(client, body):
    """The events of a stream: each one's name is its type, and nothing comes behind them."""
    response = await client.post(URL, json={**body, "stream": True})
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    *events, rest = response.text.split("\n\n")
    assert rest == ""
    told = []
    for event in events:
        name, data = event.split("\n")
        told.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {told[-1]['type']}"
    return told


@pytest.mark.parametrize("url", [URL, COUNT])
@pytest.mark.parametrize("more", [{}, {"max_tokens": "x"}], ids=["answered", "refused"])
async def test_the_requests_id_has_the_name_that_anthropics_clients_look_for(url, more, client, body):
    response = await client.post(url, json=body(**more), headers={"X-Request-Id": "abc"})

    assert response.headers["request-id"] == response.headers["x-request-id"] == "abc"


async def test_it_has_that_name_there_only(client, chat_body):
    assert "request-id" not in (await client.post("/v1/chat/completions", json=chat_body())).headers


def joined(events):
    """The message that a stream tells, as Anthropic's clients put it together."""
    start, *middle, delta, stop = events
    assert (start["type"], delta["type"], stop) == ("message_start", "message_delta", {"type": "message_stop"})
    message = start["message"]
    assert message["content"] == []
    open_, inputs = None, {}
    for event in middle:
        index = event["index"]
        if event["type"] == "content_block_start":
            assert (open_, index) == (None, len(message["content"]))
            open_ = index
            message["content"].append(event["content_block"])
        elif event["type"] == "content_block_stop":
            assert open_ == index
            open_ = None
        elif event["delta"]["type"] == "text_delta":
            assert open_ == index
            message["content"][index]["text"] += event["delta"]["text"]
        else:
            assert (open_, event["delta"]["type"]) == (index, "input_json_delta")
            inputs[index] = inputs.get(index, "") + event["delta"]["partial_json"]
    assert open_ is None
    for index, text in inputs.items():
        message["content"][index]["input"] = json.loads(text)
    return message | delta["delta"] | {"usage": delta["usage"]}


def without_ids(message):
    """A message without what is new in every reply; tools' calls have ids of their own."""
    ids = [block.pop("id") for block in message["content"] if block["type"] == "tool_use"]
    assert message.pop("id").startswith("msg_")
    assert len(set(ids)) == len(ids)
    assert all(id_.startswith("toolu_") for id_ in ids)
    return message


def text(said):
    return {"type": "text", "text": said}


def tool_use(name, **arguments):
    return {"type": "tool_use", "name": name, "input": arguments}


@pytest.mark.parametrize(
    ("pieces", "fields", "content", "stop_reason"),
    [
        (["so ", "it is 4"], {}, [text("so it is 4")], "end_turn"),
        ([], {}, [], "end_turn"),
        (["It is 3.\n"], {"tools": [ADD]}, [text("It is 3.\n")], "end_turn"),
        (["<tool", "_call"], {"tools": [ADD]}, [text("<tool_call")], "end_turn"),
        ([CALLED], {}, [text(CALLED)], "end_turn"),
        ([CALLED[:30], CALLED[30:]], {"tools": [ADD]}, [tool_use("add", a=1)], "tool_use"),
        (
            ["So\n", *CALLED, "\n", written("now", "{}")],
            {"tools": [ADD, NOW]},
            [text("So"), tool_use("add", a=1), tool_use("now")],
            "tool_use",
        ),
    ],
    ids=["text", "nothing", "no call", "almost a call", "no tools", "call", "text and calls"],
)
async def test_a_message_whole_and_streamed(client, engine, body, pieces, fields, content, stop_reason):
    engine.script = say(*pieces)

    whole = (await client.post(URL, json=body(**fields))).json()
    streamed = joined(await read(client, body(**fields)))

    assert without_ids(whole) == without_ids(streamed)
    assert whole.pop("usage")["output_tokens"] == len(pieces) + 1
    assert whole == {
        "type": "message",
        "role": "assistant",
        "model": MODEL,
        "content": content,
        "stop_reason": stop_reason,
        "stop_sequence": None,
    }


async def test_a_reply_that_was_cut(client, engine, body):
    engine.script = say("so", finish="length")
    cut = (await client.post(URL, json=body())).json()
    beyond = (await client.post(URL, json=body(max_tokens=1000))).json()
    engine.script = say(written("add", '{"a": 1, "b": "xyz"}')[:-22], finish="length")
    call = (await client.post(URL, json=body(tools=[ADD]))).json()
    streamed = await read(client, body(tools=[ADD]))

    assert cut["stop_reason"] == "max_tokens"
    assert beyond["stop_reason"] == "model_context_window_exceeded"
    assert (call["stop_reason"], call["content"][0]["input"]) == ("max_tokens", {"a": 1})
    assert streamed[-2]["delta"]["stop_reason"] == "max_tokens"
    assert [event["type"] for event in streamed[-3:]] == ["content_block_stop", "message_delta", "message_stop"]


async def test_the_stop_sequence_that_ended_it_is_named(client, engine, body):
    def script(request):
        yield Event((10,), "so ")
        yield Event((11,), "", "stop", Usage(len(request.prompt_ids), 2, 8), stop="END")

    engine.script = script

    whole = (await client.post(URL, json=body(stop_sequences=["STOP", "END"]))).json()
    streamed = joined(await read(client, body(stop_sequences=["STOP", "END"])))

    for message in (whole, streamed):
        assert (message["stop_reason"], message["stop_sequence"]) == ("stop_sequence", "END")
    assert {request.params.stop for request in engine.requests} == {("STOP", "END")}


async def test_what_others_computed_is_counted_apart(client, engine, body):
    engine.script = lambda request: [Event((END_ID,), "", "stop", Usage(len(request.prompt_ids), 1, 4, 5))]

    counted = (await client.post(COUNT, json={"messages": body()["messages"], "tools": [ADD]})).json()
    whole = (await client.post(URL, json=body(tools=[ADD]))).json()["usage"]
    streamed = joined(await read(client, body(tools=[ADD])))["usage"]

    assert whole == streamed
    assert whole["cache_read_input_tokens"] == 5
    assert counted == {"input_tokens": whole["input_tokens"] + 5}
    assert engine.chat.tools[0] == engine.chat.tools[1] != []


async def test_turns_come_to_the_model_as_in_chat(client, engine, body):
    hint = {"cache_control": {"type": "ephemeral", "ttl": "1h"}}
    use = {"type": "tool_use", "id": "toolu_1", "name": "add", "input": {"a": 1}, "caller": {"type": "direct"}}
    turns = [
        {"role": "user", "content": [{**text("1+2?"), **hint}, text("Think.")]},
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "Hm.", "signature": "s"},
                {"type": "redacted_thinking", "data": "x"},
                {**text("So"), "citations": None},
                use | hint,
            ],
        },
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": "toolu_1", "content": [text("3")], **hint},
                {"type": "tool_result", "tool_use_id": "toolu_2", "is_error": True},
                text("And?"),
            ],
        },
        {"role": "assistant", "content": [use]},
        {"role": "assistant", "content": []},
        {"role": "system", "content": "Short."},
        {"role": "user", "content": "?"},
    ]
    fields = {"messages": turns, "system": [{**text("Be"), **hint}, text("kind.")], "tools": [ADD | hint]}
    response = await client.post(URL, json=body(**fields))
    assert response.status_code == 200, response.text
    assert (await client.post(COUNT, json=fields)).status_code == 200

    made = {"id": "toolu_1", "type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    assert engine.chat.conversations[0] == engine.chat.conversations[1]
    assert engine.chat.conversations[0] == [
        {"role": "system", "content": "Be\nkind."},
        {"role": "user", "content": "1+2?\nThink."},
        {"role": "assistant", "content": "So", "tool_calls": [made]},
        {"role": "tool", "content": "3", "tool_call_id": "toolu_1"},
        {"role": "tool", "content": "", "tool_call_id": "toolu_2"},
        {"role": "user", "content": "And?"},
        {"role": "assistant", "content": "", "tool_calls": [made]},
        {"role": "assistant", "content": ""},
        {"role": "system", "content": "Short."},
        {"role": "user", "content": "?"},
    ]
    function = {"name": "add", "description": "Adds.", "parameters": ADD["input_schema"]}
    assert engine.chat.tools[0] == [{"type": "function", "function": function}]


async def test_a_request_decodes_as_its_chat_request(client, engine, body):
    as_chat = {"reasoning_effort": "low", "temperature": 0.5, "top_p": 0.9, "top_k": 3, "stop": ["a"]}
    fields = {"output_config": {"effort": "low"}, "temperature": 0.5, "top_p": 0.9, "top_k": 3, "stop_sequences": ["a"]}

    await client.post(URL, json=body(**fields))
    await client.post("/v1/chat/completions", json=body(**as_chat, seed=engine.requests[0].params.seed))

    assert engine.requests[0] == engine.requests[1]


@pytest.mark.parametrize(
    "neutral",
    [
        {"system": ""},
        {"system": []},
        {"thinking": {"type": "disabled"}},
        {"thinking": {"type": "adaptive"}},
        {"thinking": {"type": "enabled", "budget_tokens": 1024, "display": "omitted"}},
        {"metadata": {"user_id": "a"}, "service_tier": "auto", "cache_control": {"type": "ephemeral"}},
        {"service_tier": "standard_only", "container": None, "inference_geo": None, "speed": "standard"},
        {"tools": [], "tool_choice": {"type": "auto"}},
        {"tools": [ADD], "tool_choice": {"type": "none"}},
        {
            "diagnostics": {"previous_message_id": None},
            "output_config": {},
            "user_profile_id": "b",
            "stop_sequences": [],
        },
        {"temperature": 0.0, "top_p": 1, "top_k": 0, "stream": False, "model": MODEL},
    ],
    ids=str,
)
async def test_what_asks_for_nothing_changes_nothing(client, engine, body, neutral):
    for fields in ({}, neutral):
        response = await client.post(URL, json=body(**fields))
        assert response.status_code == 200, response.text

    assert engine.requests[0] == engine.requests[1]


@pytest.mark.parametrize(
    ("choice", "taken", "refused"),
    [
        ({"type": "auto"}, ["3", CALLED, f"{CALLED}\n{CALLED}"], [written("add", "{}")]),
        ({"type": "any", "disable_parallel_tool_use": True}, [CALLED], ["3", f"{CALLED}\n{CALLED}"]),
        ({"type": "tool", "name": "now"}, [written("now", "{}")], ["3", CALLED]),
    ],
    ids=str,
)
async def test_tool_choices(client, engine, body, choice, taken, refused):
    await client.post(URL, json=body(tools=[ADD, NOW], tool_choice=choice))

    assert [said for said in taken if not follows(engine, said)] == []
    assert [said for said in refused if follows(engine, said)] == []


async def test_output_of_a_form(client, engine, body):
    described = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}

    await client.post(URL, json=body(output_config={"format": {"type": "json_schema", "schema": described}}))

    assert follows(engine, '{"a": 1}')
    assert not follows(engine, "3")


def follows(engine, said):
    """Whether the first request's reply may be this."""
    matcher = engine.requests[0].grammar.matcher(may_end=True)
    for token in byte_ids(said.encode()):
        if not matcher.follow().allows(token):
            return False
        matcher.advance(token)
    return matcher.follow().allows(END_ID)


IMAGE = {"type": "image", "source": {"type": "url", "url": "http://x"}}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"max_tokens": None}, "max_tokens: "),
        ({"max_tokens": 0}, "max_tokens: "),
        ({"temperature": 1.5}, "temperature: "),
        ({"stop_sequences": ["a"] * 17}, "stop_sequences holds 17 strings"),
        ({"stop_sequences": [""]}, "stop_sequences.0: "),
        (
            {"output_config": {"format": {"type": "json_schema", "schema": {"not": {"type": "string"}}}}},
            "output_config.format cannot be served: ",
        ),
        ({"messages": []}, "messages: "),
        ({"messages": [{"role": "user", "content": []}]}, "messages.0.content: "),
        ({"messages": [{"role": "user", "content": [IMAGE]}]}, "messages.0.content.0: this model reads no block"),
        (
            {
                "messages": [
                    {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "a", "content": [IMAGE]}]}
                ]
            },
            "messages.0.content.0.content.0: this model reads no block of type image, only text",
        ),
        ({"messages": [{"role": "assistant", "content": "It is"}]}, "the last message is the assistant's"),
        (
            {"tools": [{"type": "web_search_20250305", "name": "web_search"}]},
            "tools.0: web_search_20250305 is a tool of",
        ),
        ({"tools": [ADD, ADD]}, "two of the tools have the same name"),
        ({"tools": [ADD], "tool_choice": {"type": "tool", "name": "sub"}}, "tool_choice names sub"),
        ({"tools": [ADD], "tool_choice": "auto"}, "tool_choice: Input should be an object"),
        ({"tools": [ADD], "tool_choice": {"type": "required"}}, "tool_choice.type: should be one of auto, any, tool"),
        ({"tools": [ADD | {"defer_loading": True}]}, "tools.0.defer_loading: the model is shown all tools at once"),
        ({"tools": [ADD | {"input_examples": [{"a": 1}]}]}, "tools.0.input_examples: the model is shown no examples"),
        ({"container": "c"}, "container: there are no containers"),
        ({"speed": "fast"}, "speed: there is one speed"),
        ({"echo": True}, "echo: unknown or unsupported field"),
        ({"messages": [{"role": "user", "content": "a" * 500}]}, "the prompt has "),
    ],
    ids=lambda value: str(value)[:60],
)
async def test_what_is_refused_is_named_in_anthropics_shape(client, engine, body, fields, message):
    response = await client.post(URL, json=body(**fields))

    error = response.json()
    assert response.status_code == 400
    assert error == {"type": "error", "error": {"type": "invalid_request_error", "message": error["error"]["message"]}}
    assert error["error"]["message"].startswith(message)
    assert not engine.requests


@pytest.mark.parametrize(
    ("refusal", "status", "kind"),
    [
        (Overloaded("full", 3), 429, "rate_limit_error"),
        (Unavailable("stopping", "draining"), 503, "overloaded_error"),
        (KeyError("a bug"), 500, "api_error"),
    ],
    ids=str,
)
async def test_errors_that_are_no_fault_of_the_request(client, engine, body, refusal, status, kind):
    engine.refuse = refusal

    response = await client.post(URL, json=body())

    assert (response.status_code, response.json()["error"]["type"]) == (status, kind)
    assert response.headers.get("retry-after") == ("3" if status == 429 else None)


@pytest.mark.parametrize("path", [URL, COUNT])
async def test_errors_of_the_server_around_the_route_have_that_shape_too(make_app, connect, body, path):
    async with connect(make_app(max_body_bytes=1000)) as client:
        large = await client.post(path, json=body(system="a" * 2000))
        encoded = await client.post(path, json=body(), headers={"Content-Encoding": "gzip"})
        unknown = await client.post(
            path,
            json={**body(), "model": "other"} if path == URL else {"model": "other"} | {"messages": body()["messages"]},
        )
        wrong = await client.get(path)
        broken = await client.post(path, content=b"{")

    said = [
        (response.status_code, response.json()["type"], response.json()["error"]["type"])
        for response in (large, encoded, unknown, wrong, broken)
    ]
    assert said == [
        (413, "error", "request_too_large"),
        (415, "error", "invalid_request_error"),
        (404, "error", "not_found_error"),
        (405, "error", "invalid_request_error"),
        (400, "error", "invalid_request_error"),
    ]


async def test_an_error_in_mid_stream_is_an_event(client, engine, body):
    engine.script = say("so ", finish="error", error=Unavailable("the device failed", "device_failed"))

    last = (await read(client, body()))[-1]

    assert last == {"type": "error", "error": {"type": "overloaded_error", "message": "the device failed"}}


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"x-api-key": "sesame"}, 200),
        ({"x-api-key": "open"}, 200),
        ({"Authorization": "Bearer sesame"}, 200),
        ({"Authorization": "Bearer none", "x-api-key": "sesame"}, 200),
        ({"Authorization": "Basic sesame"}, 401),
        ({"x-api-key": "Bearer sesame"}, 401),
        ({"x-api-key": ""}, 401),
        ({}, 401),
    ],
    ids=str,
)
async def test_keys(make_app, connect, body, headers, status):
    async with connect(make_app(api_key=["open", "sesame"])) as client:
        response = await client.post(URL, json=body(), headers=headers)
        models = await client.get("/v1/models", headers=headers)

    assert response.status_code == models.status_code == status
    if status == 401:
        assert response.json()["error"]["type"] == "authentication_error"
        assert "param" in models.json()["error"]


async def test_behind_a_prefix_errors_look_the_same(make_app, connect):
    async with connect(make_app(root_path="/llm")) as client:
        for path in (URL, f"/llm{URL}"):
            assert (await client.post(path, json={})).json()["type"] == "error"
        assert "type" not in (await client.post("/llm/v1/completions", json={})).json()


async def test_the_document_knows_the_shape_of_the_errors(client):
    described = (await client.get("/openapi.json")).json()

    def looks(path):
        return described["paths"][path]["post"]["responses"]["400"]["content"]["application/json"]["schema"]["$ref"]

    assert looks(URL) == looks(COUNT) == "#/components/schemas/AnthropicErrorBody"
    assert looks("/v1/completions") == "#/components/schemas/ErrorBody"
    assert {"Tool", "CustomTool"} <= described["components"]["schemas"].keys()
