"""Tools: what the model is shown of them, what a reply's calls look like, whole and streamed."""

import random

import pytest
from pydantic import BaseModel

from tests.server.conftest import byte_ids, read_stream, say
from trm.tools import written

pytestmark = pytest.mark.anyio

URL = "/v1/chat/completions"
ADD = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Adds.",
        "parameters": {
            "type": "object",
            "properties": {"a": {"type": "integer"}, "b": {"enum": [1, 2]}},
            "required": ["a"],
        },
    },
}
NOW = {"type": "function", "function": {"name": "now"}}
UNIQUE = {"type": "array", "uniqueItems": True}
CALLED = written("add", '{"a": 1, "b": 2}')


async def test_the_model_is_shown_the_tools_that_it_may_call(client, engine, chat_body):
    for choice in (None, "auto", "required", {"type": "function", "function": {"name": "now"}}, "none"):
        response = await client.post(URL, json=chat_body(tools=[ADD, NOW], tool_choice=choice))
        assert response.status_code == 200, response.text

    described = {"name": "now", "description": "", "parameters": {"type": "object", "properties": {}}}
    shown = [ADD, {"type": "function", "function": described}]
    assert engine.chat.tools == [shown, shown, shown, shown, []]
    assert [request.grammar is None for request in engine.requests] == [False, False, False, False, True]


async def test_no_tools_are_as_good_as_none_mentioned(client, engine, chat_body):
    for fields in ({}, {"tools": None}, {"tools": []}, {"tools": [], "tool_choice": "none"}, {"tool_choice": "auto"}):
        assert (await client.post(URL, json=chat_body(**fields))).status_code == 200

    assert len({(request.prompt_ids, request.grammar) for request in engine.requests}) == 1


@pytest.mark.parametrize(
    ("text", "message", "finish_reason"),
    [
        ("It is 3.\n", {"content": "It is 3.\n"}, "stop"),
        (CALLED, {"content": None, "tool_calls": [("add", '{"a": 1, "b": 2}')]}, "tool_calls"),
        (f"So\n{CALLED}", {"content": "So", "tool_calls": [("add", '{"a": 1, "b": 2}')]}, "tool_calls"),
        (
            f"{CALLED}\n{written('now', '{}')}",
            {"content": None, "tool_calls": [("add", '{"a": 1, "b": 2}'), ("now", "{}")]},
            "tool_calls",
        ),
        (CALLED[:-20], {"content": None, "tool_calls": [("add", CALLED[41:-20])]}, "stop"),
        ("<tool_call", {"content": "<tool_call"}, "stop"),
    ],
)
async def test_calls_are_no_content(client, engine, chat_body, text, message, finish_reason):
    rng = random.Random(text)
    cuts = sorted(rng.sample(range(1, len(text)), 5))
    engine.script = say(*(text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True)))
    body = chat_body(tools=[ADD, NOW], n=2)

    choices = (await client.post(URL, json=body)).json()["choices"]
    streamed = await read_stream(client, URL, body)

    ids = set()
    for choice in choices:
        assert choice["finish_reason"] == finish_reason
        calls = choice["message"].pop("tool_calls", [])
        assert all(call["type"] == "function" for call in calls)
        ids |= {call["id"] for call in calls}
        said = [(call["function"]["name"], call["function"]["arguments"]) for call in calls]
        assert choice["message"] | ({"tool_calls": said} if said else {}) == {"role": "assistant"} | message
    assert len(ids) == 2 * len(message.get("tool_calls", []))
    for index in range(2):
        deltas = [event["choices"][0] for event in streamed if event["choices"][0]["index"] == index]
        assert [delta["finish_reason"] for delta in deltas if delta["finish_reason"]] == [finish_reason]
        assert "".join(delta["delta"].get("content", "") for delta in deltas) == (message["content"] or "")
        joined = {}
        for piece in (piece for delta in deltas for piece in delta["delta"].get("tool_calls", [])):
            if piece["index"] not in joined:
                assert piece["index"] == len(joined)
                assert (piece["type"], piece["id"][:5]) == ("function", "call_")
                joined[piece["index"]] = [piece["function"]["name"], ""]
            joined[piece["index"]][1] += piece["function"]["arguments"]
        assert [tuple(call) for call in joined.values()] == message.get("tool_calls", [])


async def test_stop_strings_are_for_text_and_not_for_calls(client, engine, chat_body):
    for choice in ("auto", "required"):
        body = chat_body(tools=[ADD], tool_choice=choice, stop=["\n"])
        assert (await client.post(URL, json=body)).status_code == 200
    assert (await client.post(URL, json=chat_body(stop=["\n"]))).status_code == 200

    said = [(request.params.stop, request.stop_before) for request in engine.requests]
    assert said == [(("\n",), "<tool_call>"), ((), "<tool_call>"), (("\n",), None)]


async def test_a_reply_that_was_cut_is_no_call_yet(client, engine, chat_body):
    engine.script = say(CALLED[:-20], finish="length")

    choice = (await client.post(URL, json=chat_body(tools=[ADD]))).json()["choices"][0]

    assert choice["finish_reason"] == "length"
    assert choice["message"]["tool_calls"][0]["function"]["arguments"] == CALLED[41:-20]


async def test_a_turn_with_calls_and_results_comes_back_as_templates_want_it(client, engine, chat_body):
    arguments = '{"a": 1, "b": 2}'
    call = {"id": "call_1", "type": "function", "function": {"name": "add", "arguments": arguments}, "index": 0}
    turns = [
        {"role": "user", "content": "1+2?", "name": "Ann"},
        {"role": "assistant", "content": None, "tool_calls": [call], "refusal": None, "annotations": [], "audio": None},
        {"role": "tool", "tool_call_id": "call_1", "content": [{"type": "text", "text": "3"}]},
        {"role": "assistant", "content": [{"type": "refusal", "refusal": "No."}]},
        {"role": "assistant", "refusal": "Never."},
        {"role": "user", "content": "?"},
    ]
    response = await client.post(URL, json=chat_body(messages=turns, tools=[ADD]))
    assert response.status_code == 200, response.text

    made = {"id": "call_1", "type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": 2}}}
    assert engine.chat.conversations[0][1:] == [
        {"role": "user", "content": "1+2?", "name": "Ann"},
        {"role": "assistant", "content": "", "tool_calls": [made]},
        {"role": "tool", "content": "3", "tool_call_id": "call_1"},
        {"role": "assistant", "content": "No."},
        {"role": "assistant", "content": "Never."},
        {"role": "user", "content": "?"},
    ]


@pytest.mark.parametrize("arguments", ["", "{", "[1]", "NaN", "{" * 5000, '{"a": 1e999}'])
async def test_arguments_that_are_no_object_are_shown_as_they_are(client, engine, chat_body, arguments):
    call = {"id": "1", "type": "function", "function": {"name": "add", "arguments": arguments}}
    turn = {"role": "assistant", "tool_calls": [call]}

    response = await client.post(URL, json=chat_body(messages=[{"role": "user", "content": "a"}, turn]))

    assert response.status_code == 200, response.text
    assert engine.chat.conversations[0][-1]["tool_calls"][0]["function"]["arguments"] == arguments


async def test_tools_that_cannot_be_served_are_named(client, engine, chat_body):
    bad = {"type": "function", "function": {"name": "sort", "parameters": {"properties": {"a": UNIQUE}}}}
    never = {"type": "function", "function": {"name": "sort", "parameters": {"type": "array"}}}

    for tool, reason in ((bad, 'Unimplemented keys: ["uniqueItems"]'), (never, "its parameters are not of type")):
        error = (await client.post(URL, json=chat_body(tools=[ADD, tool]))).json()["error"]

        assert error["param"] == "tools"
        assert error["message"].startswith(f"tools cannot be served: sort: {reason}")
    assert not engine.requests


class Kilos(BaseModel):
    kilos: int


@pytest.mark.parametrize(
    ("fields", "taken", "refused"),
    [
        (
            {"tools": [ADD, NOW]},
            ["", "3", CALLED, f"So\n{CALLED}\n{written('now', '{}')}", written("add", '{"a": 5}')],
            [written("add", '{"b": 1}'), written("add", '{"a": 1, "c": 2}'), written("sub", "{}"), CALLED + "!"],
        ),
        (
            {"tools": [ADD, NOW], "tool_choice": "required", "parallel_tool_calls": False},
            [CALLED, written("now", "{}")],
            ["", "3", f"{CALLED}\n{CALLED}", written("now", '{"a": 1}')],
        ),
        (
            {"tools": [ADD, NOW], "tool_choice": {"type": "function", "function": {"name": "now"}}},
            [written("now", "{}")],
            [CALLED, "3", f"{written('now', '{}')}\n{written('now', '{}')}"],
        ),
        (
            {
                "tools": [ADD, NOW],
                "tool_choice": {
                    "type": "allowed_tools",
                    "allowed_tools": {
                        "mode": "auto",
                        "tools": [{"type": "function", "function": {"name": "now"}}],
                    },
                },
            },
            ["3", written("now", "{}")],
            [CALLED],
        ),
        (
            {
                "tools": [NOW],
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "kilos", "schema": Kilos.model_json_schema()},
                },
            },
            ['{"kilos": 3}', written("now", "{}")],
            ["3", "{}"],
        ),
        (
            {"tools": [NOW], "response_format": {"type": "regex", "regex": "(?s).*"}},
            ["3", "", f"a{written('evil', '{}')}", written("now", "{}"), "<tool_call"],
            [written("evil", "{}"), "<tool_call>", written("now", '{"a": 1}')],
        ),
        (
            {"tools": [NOW], "response_format": {"type": "choice", "choice": [written("evil", "{}"), "no"]}},
            ["no", written("now", "{}")],
            [written("evil", "{}")],
        ),
    ],
    ids=["auto", "required", "named", "allowed", "or an answer of a form", "or of a pattern", "or a choice"],
)
async def test_a_reply_keeps_to_what_is_asked_for(client, engine, chat_body, fields, taken, refused):
    await client.post(URL, json=chat_body(**fields))

    def follows(text):
        matcher = engine.requests[0].grammar.matcher(may_end=True)
        for token in byte_ids(text.encode()):
            if not matcher.follow().allows(token):
                return False
            matcher.advance(token)
        return matcher.follow().allows(engine.chat.end_id)

    assert [text for text in taken if not follows(text)] == []
    assert [text for text in refused if follows(text)] == []


async def test_numbers_are_bounded_in_arguments_only(client, engine, chat_body):
    await client.post(URL, json=chat_body(tools=[ADD]))
    grammar = engine.requests[0].grammar

    def longest(before):
        matcher = grammar.matcher(may_end=True)
        for token in byte_ids(before.encode()):
            matcher.advance(token)
        digits = 0
        while digits < 40 and matcher.follow().allows(byte_ids(b"7")[0]):
            matcher.advance(byte_ids(b"7")[0])
            digits += 1
        return digits

    assert longest('He said "') == 40
    assert longest("So\n" + CALLED[:41] + '{"a": ') == 19


async def test_tokenize_counts_the_tools(client, engine):
    messages = [{"role": "user", "content": "a"}]

    assert (await client.post("/tokenize", json={"messages": messages, "tools": [ADD]})).status_code == 200
    refused = await client.post("/tokenize", json={"prompt": "a", "tools": [ADD]})

    assert engine.chat.tools == [[ADD]]
    assert refused.json()["error"]["param"] == "tools"


ANSWER = {"type": "json_object"}


@pytest.mark.parametrize(
    "text", ['{"say": "see <tool_call> tag", "b": 2}', r'{"say": "<tool_call>\n{\"name\": \"now\""}']
)
async def test_an_answer_of_a_form_is_never_read_as_a_call(client, engine, chat_body, text):
    engine.script = say(*(text[place : place + 7] for place in range(0, len(text), 7)))
    body = chat_body(tools=[NOW], response_format=ANSWER)

    [choice] = (await client.post(URL, json=body)).json()["choices"]
    streamed = [event["choices"][0] for event in await read_stream(client, URL, body)]

    assert choice["message"] == {"role": "assistant", "content": text}
    assert "".join(delta["delta"].get("content", "") for delta in streamed) == text
    assert not any("tool_calls" in delta["delta"] for delta in streamed)
    engine.script = say(written("now", "{}"))
    [choice] = (await client.post(URL, json=body)).json()["choices"]
    assert choice["message"]["tool_calls"][0]["function"]["name"] == "now"


async def test_a_box_in_arguments_is_no_answer(client, engine, chat_body):
    engine.script = say(written("add", r'{"a": "\\boxed{3}"}'))
    body = chat_body(tools=[ADD])

    [choice] = (await client.post(URL, json=body)).json()["choices"]
    streamed = await read_stream(client, URL, body)

    assert choice["boxed_answer"] is None
    assert streamed[-1]["choices"][0]["boxed_answer"] is None


@pytest.mark.parametrize(
    "parameters",
    [
        {"properties": {"a": {"type": "integer"}}, "required": ["a", "b"]},
        {"properties": {}, "minProperties": 1},
        {"type": ["object", "null"], "properties": {"a": {"type": "integer"}}},
        {},
    ],
    ids=str,
)
async def test_parameters_that_name_less_than_they_want_are_served(client, engine, chat_body, parameters):
    tool = {"type": "function", "function": {"name": "f", "parameters": parameters}}

    response = await client.post(URL, json=chat_body(tools=[tool], tool_choice="required"))

    assert response.status_code == 200, response.text
