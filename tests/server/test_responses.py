"""POST /v1/responses: chat's decoding in the words of OpenAI's Responses API, whole and streamed."""

import json
import random

import pytest
from openai.types.responses import (
    ParsedResponseFunctionToolCall,
    ParsedResponseOutputMessage,
    ParsedResponseOutputText,
    Response,
    ResponseFunctionToolCall,
    ResponseOutputMessage,
    ResponseOutputRefusal,
    ResponseOutputText,
    ResponseReasoningItem,
    ResponseStreamEvent,
)
from pydantic import TypeAdapter

from tests.server.conftest import say
from trm.chat import SYSTEM_PROMPT, SYSTEM_PROMPTS
from trm.engine.request import Event, Usage
from trm.errors import BadRequest, DeviceError
from trm.tools import written

pytestmark = pytest.mark.anyio

URL = "/v1/responses"
EVENTS: TypeAdapter = TypeAdapter(ResponseStreamEvent)
PARAMETERS = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
ADD = {"type": "function", "name": "add", "description": "Adds.", "parameters": PARAMETERS, "strict": True}
NOW = {"type": "function", "name": "now"}
CALL = written("add", '{"a": 1}')


async def ask(client, **fields):
    """The response, and that OpenAI's own type takes all of it."""
    answer = await client.post(URL, json={"input": "2+2?"} | fields)
    assert answer.status_code == 200, answer.text
    Response.model_validate(answer.json())
    return answer.json()


async def stream(client, **fields):
    """The events of a stream, each under its name, numbered, and of a type that OpenAI's client knows."""
    answer = await client.post(URL, json={"input": "2+2?", "stream": True} | fields)
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"].startswith("text/event-stream")
    *messages, rest = answer.text.split("\n\n")
    assert rest == ""  # and no [DONE]
    events = []
    for number, message in enumerate(messages):
        name, data = message.split("\n")
        events.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {events[-1]['type']}"
        assert events[-1]["sequence_number"] == number
        assert EVENTS.validate_python(events[-1]).type == events[-1]["type"]
    return events


async def refusal(client, **fields):
    answer = await client.post(URL, json={"input": "2+2?"} | fields)
    assert answer.status_code == 400, answer.text
    return answer.json()["error"]


def told(item):
    """An item without its own ids."""
    return {name: value for name, value in item.items() if name not in ("id", "call_id")}


def message(text, status="completed"):
    part = {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
    return {"type": "message", "status": status, "role": "assistant", "content": [part]}


def call(name, arguments, status="completed"):
    return {"type": "function_call", "status": status, "name": name, "arguments": arguments}


# What comes out


async def test_a_response(client, engine):
    body = await ask(client)

    assert body.pop("id").startswith("resp_")
    assert 0 < body.pop("created_at") <= body.pop("completed_at")
    (item,) = body.pop("output")
    assert (told(item), item["id"][:4]) == (message("so \\boxed{72}"), "msg_")
    prompt_tokens = len(engine.requests[0].prompt_ids)
    assert body == {
        "object": "response",
        "status": "completed",
        "error": None,
        "incomplete_details": None,
        "model": "test/model",
        "boxed_answer": "72",
        "usage": {
            "input_tokens": prompt_tokens,
            "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
            "output_tokens": 3,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": prompt_tokens + 3,
            "trm": {"supervision_steps_mean": 4.0, "draft_tokens": 0, "accepted_tokens": 0},
        },
        "instructions": None,
        "temperature": 0,
        "top_p": 1,
        "max_output_tokens": None,
        "text": {"format": {"type": "text"}, "verbosity": "medium"},
        "reasoning": {"effort": None, "summary": None},
        "tools": [],
        "tool_choice": "auto",
        "parallel_tool_calls": True,
        "metadata": {},
        "user": None,
        "safety_identifier": None,
        "prompt_cache_key": None,
        "background": False,
        "previous_response_id": None,
        "service_tier": "default",
        "store": False,
        "truncation": "disabled",
    }


async def test_what_was_asked_for_is_told_again(client):
    said = {
        "instructions": "Be brief.",
        "temperature": 0.5,
        "top_p": 0.9,
        "max_output_tokens": 7,
        "text": {
            "format": {"type": "json_schema", "name": "a", "schema": {"type": "object"}, "strict": True},
            "verbosity": "medium",
        },
        "reasoning": {"effort": "low", "summary": None},
        "tools": [ADD, NOW],
        "tool_choice": {"type": "function", "name": "now"},
        "parallel_tool_calls": False,
        "metadata": {"a": "b"},
        "user": "c",
        "safety_identifier": "d",
        "prompt_cache_key": "e",
    }
    body = await ask(client, **said)

    assert {name: body[name] for name in said} == said


async def test_a_stream(client):
    events = await stream(client)

    assert [event["type"].removeprefix("response.") for event in events] == [
        "created",
        "in_progress",
        "output_item.added",
        "content_part.added",
        "output_text.delta",
        "output_text.delta",
        "output_text.done",
        "content_part.done",
        "output_item.done",
        "completed",
    ]
    for event in events[:2]:
        assert (event["response"]["status"], event["response"]["output"]) == ("in_progress", [])
    assert told(events[2]["item"]) == message("", "in_progress") | {"content": []}
    assert [event["delta"] for event in events[4:6]] == ["so ", "\\boxed{72}"]
    (item,) = events[-1]["response"]["output"]
    assert told(item) == message("so \\boxed{72}")
    assert events[-2]["item"] == item
    assert [events[7]["part"]] == item["content"]
    assert events[6]["text"] == item["content"][0]["text"]
    assert {event["item_id"] for event in events[3:8]} == {item["id"]}
    assert len({event["response"]["id"] for event in (*events[:2], events[-1])}) == 1
    whole = await ask(client)
    same = whole.keys() - {"id", "created_at", "completed_at", "output"}
    assert {name: events[-1]["response"][name] for name in same} == {name: whole[name] for name in same}


@pytest.mark.parametrize(
    ("text", "finish", "items"),
    [
        ("It is 3.\n", "stop", [message("It is 3.\n")]),
        ("", "stop", [message("")]),
        ("It is", "length", [message("It is", "incomplete")]),
        (CALL, "stop", [call("add", '{"a": 1}')]),
        (f"So\n{CALL}", "stop", [message("So"), call("add", '{"a": 1}')]),
        (f"{CALL}\n{written('now', '{}')}", "stop", [call("add", '{"a": 1}'), call("now", "{}")]),
        (CALL, "length", [call("add", '{"a": 1}')]),
        (CALL[:-20], "length", [call("add", CALL[41:-20], "incomplete")]),
        (CALL[:-20], "stop", [call("add", CALL[41:-20], "incomplete")]),
        (CALL[:20], "length", [message("", "incomplete")]),
        ("<tool_call", "stop", [message("<tool_call")]),
    ],
)
async def test_items_are_the_text_and_the_calls(client, engine, text, finish, items):
    rng = random.Random(text)
    cuts = sorted(rng.sample(range(1, len(text)), min(5, max(0, len(text) - 1)))) if text else []
    pieces = [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    engine.script = say(*pieces, finish=finish)

    whole = await ask(client, tools=[ADD, NOW])
    events = await stream(client, tools=[ADD, NOW])

    ended = "incomplete" if finish == "length" else "completed"
    last = events[-1]["response"]
    assert events[-1]["type"] == f"response.{ended}"
    for response in (whole, last):
        assert [told(item) for item in response["output"]] == items
        assert response["status"] == ended
        assert response["incomplete_details"] == ({"reason": "max_output_tokens"} if finish == "length" else None)
    for index, item in enumerate(last["output"]):
        own = [event for event in events if event.get("output_index") == index]
        assert (own[0]["type"], own[-1]["type"]) == ("response.output_item.added", "response.output_item.done")
        assert own[-1]["item"] == item
        deltas = "".join(event.get("delta", "") for event in own)
        if item["type"] == "message":
            assert deltas == item["content"][0]["text"]
        else:
            assert deltas == item["arguments"]
            assert own[-2] | {"type": "", "sequence_number": 0} == {
                "type": "",
                "sequence_number": 0,
                "output_index": index,
                "item_id": item["id"],
                "name": item["name"],
                "arguments": item["arguments"],
            }
    places = [event["output_index"] for event in events if "output_index" in event]
    assert places == sorted(places)
    ids = [item.get("call_id", item["id"]) for item in whole["output"] + last["output"]]
    assert len(set(ids)) == len(ids)


async def test_without_tools_a_call_is_text(client, engine):
    engine.script = say(CALL)

    assert [told(item) for item in (await ask(client))["output"]] == [message(CALL)]


async def test_an_error_before_the_end_of_a_stream(client, engine):
    engine.script = lambda request: [
        Event((1,), "half"),
        Event((), "", "error", Usage(1, 1, 1), DeviceError("a logit is not finite")),
    ]

    *_, error, failed = await stream(client)

    assert error == {
        "type": "error",
        "code": "device_error",
        "message": "a logit is not finite",
        "param": None,
        "sequence_number": error["sequence_number"],
    }
    assert failed["type"] == "response.failed"
    assert failed["response"]["status"] == "failed"
    assert failed["response"]["error"] == {"code": "server_error", "message": "a logit is not finite"}
    assert [told(item) for item in failed["response"]["output"]] == [message("half", "incomplete")]
    assert (await client.post(URL, json={"input": "a"})).json()["error"]["code"] == "device_error"


async def test_a_form_that_cannot_be_kept_to_is_named_as_it_is_here(client, engine):
    why = BadRequest("response_format: after 3 tokens nothing may follow", param="response_format")
    engine.script = lambda request: [Event((), "", "error", Usage(1, 1, 1), why)]

    *_, error, failed = await stream(client)

    assert (error["param"], error["message"]) == ("text.format", "text.format: after 3 tokens nothing may follow")
    assert failed["response"]["error"]["code"] == "invalid_prompt"


# What goes in


async def test_items_are_turns(client, engine):
    arguments = '{"a": 1}'
    items = [
        {"role": "developer", "content": "Add."},
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "1+2?"}]},
        {"type": "reasoning", "id": "rs_1", "summary": []},
        {"role": "assistant", "content": [{"type": "output_text", "text": "So", "annotations": [], "logprobs": []}]},
        {"type": "function_call", "call_id": "call_1", "name": "add", "arguments": arguments, "id": "fc_1"},
        {"type": "function_call", "call_id": "call_2", "name": "now", "arguments": "{}", "status": "completed"},
        {"type": "function_call_output", "call_id": "call_1", "output": "3"},
        {"type": "function_call_output", "call_id": "call_2", "output": [{"type": "input_text", "text": "noon"}]},
        {"type": "function_call", "call_id": "call_3", "name": "now", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "call_3", "output": "one"},
        {"role": "assistant", "content": [{"type": "refusal", "refusal": "No."}]},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "input_text", "text": "b"}]},
    ]
    await ask(client, input=items, instructions="Be brief.")

    def made(id_, name, arguments):
        return {"id": id_, "type": "function", "function": {"name": name, "arguments": arguments}}

    assert engine.chat.conversations == [
        [
            {"role": "system", "content": "Be brief."},
            {"role": "developer", "content": "Add."},
            {"role": "user", "content": "1+2?"},
            {
                "role": "assistant",
                "content": "So",
                "tool_calls": [made("call_1", "add", {"a": 1}), made("call_2", "now", {})],
            },
            {"role": "tool", "content": "3", "tool_call_id": "call_1"},
            {"role": "tool", "content": "noon", "tool_call_id": "call_2"},
            {"role": "assistant", "content": "", "tool_calls": [made("call_3", "now", {})]},
            {"role": "tool", "content": "one", "tool_call_id": "call_3"},
            {"role": "assistant", "content": "No."},
            {"role": "user", "content": "a\nb"},
        ]
    ]


async def test_the_system_prompt_is_ours_unless_there_are_instructions(client, engine):
    for fields in ({}, {"work": "none"}, {"instructions": "Be brief."}, {"instructions": ""}):
        await ask(client, **fields)

    prompts = [turns[0]["content"] for turns in engine.chat.conversations]
    assert prompts == [SYSTEM_PROMPT, SYSTEM_PROMPTS["none"], "Be brief.", ""]


async def test_every_field_reaches_the_engine_as_from_chat(client, engine):
    shared = {"temperature": 0.5, "top_p": 0.9, "top_k": 3, "min_p": 0.1, "seed": 11, "stop": ["x"], "ignore_eos": True}
    shared |= {"repetition_penalty": 1.2, "presence_penalty": -0.5, "frequency_penalty": 0.25, "logit_bias": {"5": 1}}
    shared |= {"halt_threshold": 0.75, "halt_tolerance": 0.01, "metadata": {"a": "b"}, "user": "c"}
    nested = [{"type": "function", "function": {k: v for k, v in tool.items() if k != "type"}} for tool in (ADD, NOW)]
    schema = {"name": "a", "schema": {"type": "object", "properties": {"b": {"type": "integer"}}}}
    chat = {
        "messages": [{"role": "user", "content": "2+2?"}],
        "max_tokens": 7,
        "reasoning_effort": "low",
        "tools": nested,
        "tool_choice": {
            "type": "allowed_tools",
            "allowed_tools": {"mode": "auto", "tools": [{"type": "function", "function": {"name": "now"}}]},
        },
        "parallel_tool_calls": False,
        "response_format": {"type": "json_schema", "json_schema": schema},
    }
    here = {
        "max_output_tokens": 7,
        "reasoning": {"effort": "low", "summary": "auto"},
        "tools": [ADD, NOW],
        "tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "now"}]},
        "parallel_tool_calls": False,
        "text": {"format": {"type": "json_schema", **schema}},
    }
    assert (await client.post("/v1/chat/completions", json=chat | shared)).status_code == 200
    await ask(client, **here, **shared)

    first, second = engine.requests
    assert first.params == second.params
    assert first.params.n_supervision == 1
    assert first.grammar is not None
    assert first.grammar is second.grammar  # of one compiler, which keeps what it has made
    assert engine.chat.conversations[0] == engine.chat.conversations[1]
    assert engine.chat.tools[0] == engine.chat.tools[1] != []


@pytest.mark.parametrize(
    "neutral",
    [
        {"instructions": None, "max_output_tokens": None, "tools": None, "tool_choice": None, "stream": None},
        {"tools": [], "tool_choice": "none", "parallel_tool_calls": True},
        {"store": False, "background": False, "truncation": "disabled", "include": [], "context_management": []},
        {"store": None, "background": None, "truncation": None, "include": None, "previous_response_id": None},
        {"conversation": None, "prompt": None, "max_tool_calls": None, "top_logprobs": 0, "moderation": None},
        {"text": None, "reasoning": None},
        {"text": {}, "reasoning": {}},
        {"text": {"format": {"type": "text"}, "verbosity": "medium"}},
        {"reasoning": {"effort": None, "summary": None, "context": "auto", "mode": "standard"}},
        {"reasoning": {"summary": "auto", "generate_summary": "auto"}},
        {"service_tier": "auto", "prompt_cache_retention": "in_memory"},
        {"prompt_cache_key": "a", "safety_identifier": "b", "user": "c", "metadata": {"d": "e"}},
        {"input": [{"type": "reasoning", "summary": []}, {"role": "user", "content": "2+2?"}]},
        {"input": [{"type": None, "role": "user", "content": "2+2?", "id": "a", "status": None, "phase": None}]},
    ],
    ids=str,
)
async def test_values_that_ask_for_nothing_change_nothing(client, engine, neutral):
    for fields in ({}, neutral):
        await ask(client, **fields)

    assert engine.requests[0] == engine.requests[1]


async def test_a_stream_may_have_options_that_change_nothing(client):
    for options in ({}, {"include_obfuscation": False}):
        assert (await stream(client, stream_options=options))[-1]["type"] == "response.completed"


WEB_SEARCH = {"type": "web_search"}
FORM = {"type": "json_schema", "name": "a", "schema": {"not": {}}}
REFUSALS = [
    ({"input": None}, "input"),
    ({"input": 5}, "input"),
    ({"input": []}, "input"),
    ({"input": [5]}, "input.0"),
    ({"input": [{"type": "item_reference", "id": "msg_1"}]}, "input.0"),
    ({"input": [{"id": "msg_1"}]}, "input.0"),
    ({"input": [{"type": "web_search_call", "id": "a", "status": "completed"}]}, "input.0.type"),
    ({"input": [{"type": ["message"]}]}, "input.0.type"),
    ({"input": [{"role": "tool", "content": "a"}]}, "input.0.role"),
    ({"input": [{"role": "user", "content": "a", "name": "b"}]}, "input.0.name"),
    ({"input": [{"role": "user", "content": []}]}, "input.0.content"),
    ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "a"}]}]}, "input.0.content.0.type"),
    ({"input": [{"type": "function_call", "call_id": "a", "name": "a b", "arguments": ""}]}, "input.0.name"),
    ({"input": [{"type": "function_call_output", "output": "a"}]}, "input.0.call_id"),
    ({"input": [{"type": "reasoning", "summary": []}]}, "input"),
    ({"input": "a" * 400}, "input"),
    ({"input": [{"role": "user", "content": "a"}] * 3}, "input"),  # the server takes 2
    ({"messages": [{"role": "user", "content": "a"}]}, "messages"),
    ({"max_tokens": 5}, "max_tokens"),
    ({"max_output_tokens": 0}, "max_output_tokens"),
    ({"n": 1}, "n"),
    ({"temperature": 2.5}, "temperature"),
    ({"supervision_steps": 2, "reasoning": {"effort": "low"}}, "supervision_steps"),
    ({"reasoning": {"effort": "extreme"}}, "reasoning.effort"),
    ({"reasoning": {"summary": "detailed"}}, "reasoning.summary"),
    ({"reasoning": {"mode": "pro"}}, "reasoning.mode"),
    ({"response_format": {"type": "text"}}, "response_format"),
    ({"text": {"verbosity": "low"}}, "text.verbosity"),
    ({"text": {"format": {"type": "json_schema", "json_schema": {}}}}, "text.format.name"),
    ({"text": {"format": FORM}}, "text.format"),
    ({"work": "none", "instructions": "a"}, "work"),
    ({"work": "none", "input": [{"role": "system", "content": "a"}]}, "work"),
    ({"tools": [WEB_SEARCH]}, "tools.0.type"),
    ({"tools": [{"type": "function", "function": {"name": "a"}}]}, "tools.0.name"),
    ({"tools": [ADD, ADD]}, "tools"),
    ({"tools": [ADD | {"defer_loading": True}]}, "tools.0.defer_loading"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"tools": [ADD], "tool_choice": {"type": "function", "name": "sub"}}, "tool_choice"),
    ({"tools": [ADD], "tool_choice": WEB_SEARCH}, "tool_choice"),
    ({"store": True}, "store"),
    ({"background": True}, "background"),
    ({"truncation": "auto"}, "truncation"),
    ({"previous_response_id": "resp_1"}, "previous_response_id"),
    ({"conversation": "conv_1"}, "conversation"),
    ({"prompt": {"id": "a"}}, "prompt"),
    ({"include": ["message.output_text.logprobs"]}, "include"),
    ({"top_logprobs": 1}, "top_logprobs"),
    ({"stream_options": {}}, "stream_options"),
    ({"stream": True, "stream_options": {"include_usage": True}}, "stream_options.include_usage"),
]


@pytest.mark.parametrize(("fields", "param"), REFUSALS, ids=lambda value: str(value)[:60])
async def test_what_there_is_not_is_refused_by_its_name_here(make_app, connect, engine, fields, param):
    async with connect(make_app(max_messages=2)) as client:
        error = await refusal(client, **fields)

    assert (error["param"], error["type"]) == (param, "invalid_request_error")
    assert not engine.requests


async def test_a_message_has_the_names_of_this_route(client):
    error = await refusal(client, text={"format": FORM})

    assert error["message"] == 'text.format cannot be served: Unimplemented keys: ["not"]'


TEXT = ResponseOutputText(type="output_text", text="a", annotations=[], logprobs=[])
SAID = {"id": "msg_1", "type": "message", "role": "assistant", "status": "completed"}
CALLED = {"id": "fc_1", "type": "function_call", "call_id": "call_1", "name": "add", "arguments": "{}"}


@pytest.mark.parametrize(
    "item",
    [
        ResponseOutputMessage(**SAID, content=[TEXT]),
        ResponseOutputMessage(**SAID, content=[ResponseOutputRefusal(type="refusal", refusal="no")]),
        ResponseFunctionToolCall(**CALLED, status="completed"),
        ResponseReasoningItem(id="rs_1", type="reasoning", summary=[]),
        ParsedResponseOutputMessage[dict](
            **SAID, content=[ParsedResponseOutputText[dict](**TEXT.to_dict(), parsed={"a": 1})]
        ),
        ParsedResponseFunctionToolCall(**CALLED, parsed_arguments={}),
    ],
    ids=range(6),
)
@pytest.mark.parametrize("how", [{}, {"by_alias": True}, {"exclude_unset": True}], ids=str)
async def test_an_item_comes_back_as_the_client_dumps_it(client, item, how):
    dumped = item.model_dump(mode="json", **how)

    await ask(client, input=[{"role": "user", "content": "a"}, dumped])


async def test_what_a_response_says_can_be_sent_back(client, engine):
    engine.script = say("So", "\n", CALL)
    output = (await ask(client, tools=[ADD]))["output"]

    await ask(client, input=[{"role": "user", "content": "a"}, *output], tools=[ADD])

    turn = engine.chat.conversations[-1][-1]
    assert (turn["role"], turn["content"], len(turn["tool_calls"])) == ("assistant", "So", 1)
