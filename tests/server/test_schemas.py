"""What a body may hold. Each refusal is a 400 that names the field."""

from typing import get_args

import pytest

from server.errors import INSTEAD
from server.schemas.chat import ChatRequest
from server.schemas.common import Effort
from server.schemas.completions import CompletionRequest
from server.schemas.messages import MESSAGES
from server.schemas.responses import ResponsesRequest
from trm.chat import ROLES
from trm.config import EFFORT_NAMES

pytestmark = pytest.mark.anyio


def test_names_are_those_of_trm():
    assert get_args(Effort) == EFFORT_NAMES
    assert set(MESSAGES) == set(ROLES)


TOOL = {"type": "function", "function": {"name": "a"}}
CALL = {"id": "1", "type": "function", "function": {"name": "a", "arguments": "{}"}}
CHAT_REFUSALS = [
    ({"tools": [{"type": "custom", "custom": {"name": "a"}}]}, "tools.0.type"),
    ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools.0.function.name"),
    ({"tools": [{"type": "function", "function": {"name": "a", "parameters": []}}]}, "tools.0.function.parameters"),
    ({"tools": [TOOL, TOOL]}, "tools"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"tools": [], "tool_choice": "required"}, "tool_choice"),
    ({"tools": [TOOL], "tool_choice": "always"}, "tool_choice"),
    ({"tools": [TOOL], "tool_choice": {"type": "custom", "custom": {"name": "a"}}}, "tool_choice"),
    ({"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "b"}}}, "tool_choice"),
    ({"tools": [TOOL], "tool_choice": {"type": "function"}}, "tool_choice.function"),
    ({"parallel_tool_calls": "yes"}, "parallel_tool_calls"),
    ({"functions": [{"name": "a"}]}, "functions"),
    ({"function_call": {"name": "a"}}, "function_call"),
    ({"store": True}, "store"),
    ({"store": 0}, "store"),
    ({"modalities": ["text", "audio"]}, "modalities"),
    ({"modalities": []}, "modalities"),
    ({"audio": {"format": "wav", "voice": "alloy"}}, "audio"),
    ({"service_tier": "flex"}, "service_tier"),
    ({"verbosity": "low"}, "verbosity"),
    ({"prediction": {"type": "content", "content": "a"}}, "prediction"),
    ({"prompt_cache_retention": "24h"}, "prompt_cache_retention"),
    ({"web_search_options": {}}, "web_search_options"),
    ({"safety_identifier": 5}, "safety_identifier"),
    ({"stream": True, "stream_options": {"include_obfuscation": True}}, "stream_options.include_obfuscation"),
    ({"best_of": 2}, "best_of"),
    ({"response_format": "json"}, "response_format"),
    ({"response_format": {}}, "response_format.type"),
    ({"response_format": {"type": "xml"}}, "response_format.type"),
    ({"response_format": {"type": ["text"]}}, "response_format.type"),
    ({"response_format": {"type": "text", "text": "a"}}, "response_format.text"),
    ({"response_format": {"type": "json_object", "schema": {}}}, "response_format.schema"),
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
    ({"response_format": {"type": "json_schema", "json_schema": {"name": "a"}}}, "response_format.json_schema.schema"),
    ({"response_format": {"type": "json_schema", "json_schema": {"schema": {}}}}, "response_format.json_schema.name"),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "a b", "schema": {}}}},
        "response_format.json_schema.name",
    ),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": [], "strict": True}}},
        "response_format.json_schema.schema",
    ),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {}, "strict": 1}}},
        "response_format.json_schema.strict",
    ),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"not": {}}}}},
        "response_format",
    ),
    ({"response_format": {"type": "regex", "regex": ""}}, "response_format.regex"),
    ({"response_format": {"type": "regex", "regex": "a("}}, "response_format"),
    ({"response_format": {"type": "regex", "pattern": "a"}}, "response_format.regex"),
    ({"response_format": {"type": "choice", "choice": "a"}}, "response_format.choice"),
    ({"response_format": {"type": "choice", "choice": []}}, "response_format.choice"),
    ({"response_format": {"type": "choice", "choice": ["a", ""]}}, "response_format.choice.1"),
    ({"stream_options": {"include_usag": True}}, "stream_options.include_usag"),
    ({"messages": None}, "messages"),
    ({"messages": []}, "messages"),
    ({"messages": "hello"}, "messages"),
    ({"messages": ["hello"]}, "messages.0"),
    ({"messages": [{"role": "user"}]}, "messages.0.content"),
    ({"messages": [{"role": "user", "content": None}]}, "messages.0.content"),
    ({"messages": [{"role": "user", "content": 5}]}, "messages.0.content"),
    ({"messages": [{"role": "user", "content": []}]}, "messages.0.content"),
    ({"messages": [{"content": "a"}]}, "messages.0.role"),
    ({"messages": [{"role": "function", "name": "f", "content": "a"}]}, "messages.0.role"),
    ({"messages": [{"role": "user", "content": "a"}, {"role": "tool", "content": "b"}]}, "messages.1.tool_call_id"),
    ({"messages": [{"role": "user", "content": "a", "name": 5}]}, "messages.0.name"),
    ({"messages": [{"role": "user", "content": "a", "tool_calls": []}]}, "messages.0.tool_calls"),
    ({"messages": [{"role": "assistant", "content": None}]}, "messages.0.content"),
    ({"messages": [{"role": "assistant", "tool_calls": []}]}, "messages.0.content"),
    ({"messages": [{"role": "assistant", "content": "a", "audio": {"id": "b"}}]}, "messages.0.audio"),
    ({"messages": [{"role": "assistant", "content": "a", "annotations": [{}]}]}, "messages.0.annotations"),
    (
        {"messages": [{"role": "assistant", "content": "a", "function_call": {"name": "a", "arguments": ""}}]},
        "messages.0.function_call",
    ),
    (
        {"messages": [{"role": "assistant", "content": [{"type": "image_url"}]}]},
        "messages.0.content.0.type",
    ),
    ({"messages": [{"role": "assistant", "tool_calls": [CALL | {"type": "custom"}]}]}, "messages.0.tool_calls.0.type"),
    ({"messages": [{"role": "user", "content": [{"type": "text", "text": 5}]}]}, "messages.0.content.0.text"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages.0.content.0.type"),
    ({"model": 5}, "model"),
    ({"max_tokens": "5"}, "max_tokens"),
    ({"max_tokens": 5.5}, "max_tokens"),
    ({"max_tokens": True}, "max_tokens"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_completion_tokens": 0}, "max_completion_tokens"),
    ({"max_tokens": 5, "max_completion_tokens": 5}, "max_tokens"),
    ({"temperature": "1"}, "temperature"),
    ({"temperature": -0.1}, "temperature"),
    ({"temperature": 2.1}, "temperature"),
    ({"top_p": -0.1}, "top_p"),
    ({"top_p": 1.1}, "top_p"),
    ({"top_k": -2}, "top_k"),
    ({"min_p": 1.1}, "min_p"),
    ({"repetition_penalty": 0}, "repetition_penalty"),
    ({"repetition_penalty": 10.1}, "repetition_penalty"),
    ({"repetition_penalty": "1"}, "repetition_penalty"),
    ({"presence_penalty": -2.1}, "presence_penalty"),
    ({"presence_penalty": 2.1}, "presence_penalty"),
    ({"presence_penalty": 10**400}, "presence_penalty"),
    ({"frequency_penalty": -2.1}, "frequency_penalty"),
    ({"frequency_penalty": 2.1}, "frequency_penalty"),
    ({"logit_bias": {"5": 100.1}}, "logit_bias"),
    ({"logit_bias": {"5": -101}}, "logit_bias"),
    ({"logit_bias": [[5, 1]]}, "logit_bias"),
    ({"logit_bias": {"a": 1}}, "logit_bias"),
    ({"logit_bias": {"": 1}}, "logit_bias"),
    ({"logit_bias": {"5": 1, "5.0": 1}}, "logit_bias"),
    ({"logit_bias": {"-5": 1}}, "logit_bias"),
    ({"logit_bias": {"05": 1}}, "logit_bias"),
    ({"logit_bias": {"5\n": 1}}, "logit_bias"),
    ({"logit_bias": {"1_0": 1}}, "logit_bias"),
    ({"logit_bias": {"٣": 1}}, "logit_bias"),
    ({"logit_bias": {"9" * 5000: 1}}, "logit_bias"),
    ({"logit_bias": {"5": "1"}}, "logit_bias.5"),
    ({"logit_bias": {"5": True}}, "logit_bias.5"),
    ({"logit_bias": {"5": None}}, "logit_bias.5"),
    ({"logit_bias": {"5": 10**400}}, "logit_bias.5"),
    ({"logprobs": 1}, "logprobs"),
    ({"logprobs": "yes"}, "logprobs"),
    ({"top_logprobs": 2}, "top_logprobs"),
    ({"logprobs": False, "top_logprobs": 2}, "top_logprobs"),
    ({"logprobs": True, "top_logprobs": -1}, "top_logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    ({"logprobs": True, "top_logprobs": 2.5}, "top_logprobs"),
    ({"halt_threshold": 0}, "halt_threshold"),
    ({"halt_threshold": 1}, "halt_threshold"),
    ({"halt_threshold": "0.5"}, "halt_threshold"),
    ({"halt_tolerance": 0}, "halt_tolerance"),
    ({"halt_tolerance": 1.1}, "halt_tolerance"),
    ({"n": 0}, "n"),
    ({"n": 65}, "n"),
    ({"n": 13}, "n"),  # more than rows and queue together
    ({"stop": 5}, "stop"),
    ({"stop": [5]}, "stop.0"),
    ({"stop": ""}, "stop"),
    ({"stop": ["a"] * 17}, "stop"),
    ({"stop": "a" * 257}, "stop"),
    ({"seed": -(2**63) - 1}, "seed"),
    ({"seed": 2**63}, "seed"),
    ({"seed": 10**400}, "seed"),
    ({"stream": "yes"}, "stream"),
    ({"stream": 1}, "stream"),
    ({"stream_options": {}}, "stream_options"),
    ({"stream": True, "stream_options": {"include_usage": 1}}, "stream_options.include_usage"),
    (
        {"stream": True, "stream_options": {"continuous_usage_stats": True}},
        "stream_options.continuous_usage_stats",
    ),
    ({"reasoning_effort": "extreme"}, "reasoning_effort"),
    ({"reasoning_effort": "low", "supervision_steps": 2}, "supervision_steps"),
    ({"work": "some"}, "work"),
    ({"work": ["none"]}, "work"),
    ({"ignore_eos": 1}, "ignore_eos"),
    ({"metadata": {"a": 1}}, "metadata.a"),
    ({"user": 5}, "user"),
]


@pytest.mark.parametrize(("fields", "param"), CHAT_REFUSALS, ids=str)
async def test_chat_refuses_by_name(client, engine, chat_body, fields, param):
    response = await client.post("/v1/chat/completions", json=chat_body(**fields))

    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["param"] == param
    assert error["type"] == "invalid_request_error"
    assert error["message"]
    assert not engine.requests


COMPLETION_REFUSALS = [
    ({"prompt": None}, "prompt"),
    ({"prompt": ""}, "prompt"),
    ({"prompt": []}, "prompt"),
    ({"prompt": [""]}, "prompt"),
    ({"prompt": [[]]}, "prompt"),
    ({"prompt": 5}, "prompt"),
    ({"prompt": {"text": "a"}}, "prompt"),
    ({"prompt": ["a", 5]}, "prompt"),
    ({"prompt": ["a", [5]]}, "prompt"),
    ({"prompt": [5, [5]]}, "prompt"),
    ({"prompt": [5.5]}, "prompt"),
    ({"prompt": [True]}, "prompt"),
    ({"prompt": ["5", None]}, "prompt"),
    ({"prompt": [-1]}, "prompt"),
    ({"prompt": ["a"] * 13}, "prompt"),  # more than rows and queue together
    ({"prompt": ["a"] * 7, "n": 2}, "prompt"),
    ({"prompt": "a" * 400}, "prompt"),
    ({"messages": []}, "messages"),
    ({"logprobs": True}, "logprobs"),
    ({"logprobs": -1}, "logprobs"),
    ({"logprobs": 21}, "logprobs"),
    ({"top_logprobs": 1}, "top_logprobs"),
    ({"max_completion_tokens": 1}, "max_completion_tokens"),
    ({"echo": True}, "echo"),
    ({"echo": 0}, "echo"),
    ({"suffix": "a"}, "suffix"),
    ({"work": "none"}, "work"),
    ({"best_of": 2}, "best_of"),
    ({"best_of": True}, "best_of"),
    ({"use_beam_search": False}, "use_beam_search"),
    ({"top_p": -0.1}, "top_p"),
    ({"stop": ["a"] * 17}, "stop"),
    ({"n": 65}, "n"),
]


@pytest.mark.parametrize(("fields", "param"), COMPLETION_REFUSALS, ids=str)
async def test_completions_refuse_by_name(client, engine, fields, param):
    response = await client.post("/v1/completions", json={"prompt": "a"} | fields)

    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert (error["param"], error["type"]) == (param, "invalid_request_error")
    assert not engine.requests


async def test_what_is_left_out_of_completions_is_explained(client):
    response = await client.post("/v1/completions", json={"prompt": "a", "echo": True})

    assert response.json()["error"]["message"] == "echo: the prompt cannot be echoed; leave it out"


TOKENIZE_REFUSALS = [
    ("/tokenize", {}, "prompt"),
    ("/tokenize", {"prompt": None}, "prompt"),
    ("/tokenize", {"prompt": 5}, "prompt"),
    ("/tokenize", {"prompt": ["a"]}, "prompt"),
    ("/tokenize", {"prompt": "a", "messages": [{"role": "user", "content": "a"}]}, "prompt"),
    ("/tokenize", {"prompt": "a", "add_generation_prompt": True}, "add_generation_prompt"),
    ("/tokenize", {"prompt": "a", "add_special_tokens": True}, "add_special_tokens"),
    ("/tokenize", {"prompt": "a", "text": "a"}, "text"),
    ("/tokenize", {"prompt": "a", "work": "full"}, "work"),
    ("/tokenize", {"messages": [{"role": "system", "content": "a"}], "work": "full"}, "work"),
    ("/tokenize", {"messages": []}, "messages"),
    ("/tokenize", {"messages": [{"role": "tool", "content": "a"}]}, "messages.0.tool_call_id"),
    ("/detokenize", {}, "tokens"),
    ("/detokenize", {"tokens": "a"}, "tokens"),
    ("/detokenize", {"tokens": [1.5]}, "tokens.0"),
    ("/detokenize", {"tokens": [-1]}, "tokens.0"),
    ("/detokenize", {"tokens": [1, 257]}, "tokens"),
    ("/detokenize", {"tokens": [10**400]}, "tokens"),
]


@pytest.mark.parametrize(("path", "body", "param"), TOKENIZE_REFUSALS, ids=str)
async def test_tokenize_and_detokenize_refuse_by_name(client, path, body, param):
    response = await client.post(path, json=body)

    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == param


@pytest.mark.parametrize(
    ("settings", "fields", "message"),
    [
        ({"max_n": 2}, {"n": 3}, "n is 3; this server takes at most 2 (--max-n)"),
        (
            {},
            {"n": 13},
            "1 prompts with 13 samples each are 13 requests; this server takes at most 12 (--max-rows + --max-queue)",
        ),
        ({"max_stop": 1}, {"stop": ["a", "b"]}, "stop holds 2 strings; this server takes at most 1 (--max-stop)"),
        ({"max_stop": 0}, {"stop": "a"}, "stop holds 1 strings; this server takes at most 0 (--max-stop)"),
        (
            {"max_stop_chars": 4},
            {"stop": ["abcd", "abcde"]},
            "a stop string has 5 characters; this server takes at most 4 (--max-stop-chars)",
        ),
    ],
    ids=str,
)
async def test_a_limit_that_is_set_is_named(make_app, connect, settings, fields, message):
    async with connect(make_app(**settings)) as client:
        for path, prompt in (
            ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}]}),
            ("/v1/completions", {"prompt": "a"}),
        ):
            response = await client.post(path, json=prompt | fields)

            assert response.status_code == 400
            assert response.json()["error"]["message"] == message
            (name,) = fields
            assert response.json()["error"]["param"] == name


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/tokenize"])
async def test_messages_are_limited_in_number(make_app, connect, path):
    turn = {"role": "user", "content": "a"}
    async with connect(make_app(max_messages=2)) as client:
        taken = await client.post(path, json={"messages": [turn] * 2})
        refused = await client.post(path, json={"messages": [turn] * 3})

    assert (taken.status_code, refused.status_code) == (200, 400)
    error = refused.json()["error"]
    assert error["message"] == "there are 3 messages; this server takes at most 2 (--max-messages)"
    assert error["param"] == "messages"


SOLVE_REFUSALS = [
    ({}, "question"),
    ({"question": None}, "question"),
    ({"question": 5}, "question"),
    ({"question": ["a", 5]}, "question"),
    ({"question": ""}, "question"),
    ({"question": " \n"}, "question"),
    ({"question": []}, "question"),
    ({"question": ["a", ""]}, "question"),
    ({"question": ["a"] * 13}, "question"),
    ({"question": ["a"] * 7, "n": 2}, "question"),
    ({"question": "a", "n": 13}, "n"),
    ({"question": "a", "n": 2, "temperature": 0}, "temperature"),
    ({"question": "a", "n": 2, "temperature": 0.0}, "temperature"),
    ({"question": "a", "temperature": 3}, "temperature"),
    ({"question": "a", "max_tokens": 0}, "max_tokens"),
    ({"question": "a", "halt_threshold": 1}, "halt_threshold"),
    ({"question": "a", "halt_tolerance": 0}, "halt_tolerance"),
    ({"question": "a", "stop": "b"}, "stop"),
    ({"question": "a", "logprobs": True}, "logprobs"),
    ({"question": "a", "frequency_penalty": 1}, "frequency_penalty"),
    ({"question": "a", "model": 5}, "model"),
    ({"question": "a", "stream": "yes"}, "stream"),
    ({"question": "a", "stream_options": {}}, "stream_options"),
    ({"question": "a", "early_stop": 1}, "early_stop"),
    ({"question": "a", "work": "some"}, "work"),
    ({"question": "a", "reasoning_effort": "high", "supervision_steps": 4}, "supervision_steps"),
]


@pytest.mark.parametrize(("body", "param"), SOLVE_REFUSALS, ids=str)
async def test_solve_refuses_by_name(client, engine, body, param):
    response = await client.post("/solve", json=body)

    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == param
    assert not engine.requests


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": ["hi"]}, "messages.0"),
        ({"logit_bias": []}, "logit_bias"),
        ({"response_format": "a"}, "response_format"),
    ],
    ids=str,
)
async def test_what_must_be_an_object_is_told_so_in_the_words_of_json(client, chat_body, fields, param):
    response = await client.post("/v1/chat/completions", json=chat_body() | fields)

    assert response.status_code == 400
    assert response.json()["error"]["message"] == f"{param}: Input should be an object"


async def test_an_unknown_field_is_called_so(client, chat_body):
    response = await client.post("/v1/chat/completions", json=chat_body(funktions=[]))

    assert response.json()["error"]["message"] == "funktions: unknown or unsupported field; remove it"


HERE = {  # for each of vLLM's fields, what the hint says to give
    "guided_json": {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {}}}},
    "guided_regex": {"response_format": {"type": "regex", "regex": "a+"}},
    "guided_choice": {"response_format": {"type": "choice", "choice": ["a", "b"]}},
    "structured_outputs": {"response_format": {"type": "choice", "choice": ["a", "b"]}},
    "chat_template_kwargs": {"reasoning_effort": "low"},
    "enable_thinking": {"reasoning_effort": "none"},
    "thinking_token_budget": {"reasoning_effort": "high"},
    "stop_token_ids": {"stop": ["."]},
    "allowed_token_ids": {"logit_bias": {"5": 10}},
    "prompt_logprobs": {"logprobs": True},
}


@pytest.mark.parametrize("field", INSTEAD)
async def test_a_field_of_vllm_is_told_what_takes_its_place(client, chat_body, field):
    refused = await client.post("/v1/chat/completions", json=chat_body(**{field: [1]}))
    [name] = HERE[field]
    taken = await client.post("/v1/chat/completions", json=chat_body(**HERE[field]))

    hint = INSTEAD[field]
    assert refused.json()["error"]["message"] == f"{field}: unknown or unsupported field; remove it: {hint}"
    assert hint.startswith(name)
    assert taken.status_code == 200, taken.text


async def test_where_another_api_has_its_own_names_nothing_is_said_in_its_place(client):
    response = await client.post("/solve", json={"question": "1+1?", "guided_json": {}})

    assert response.json()["error"]["message"] == "guided_json: unknown or unsupported field; remove it"


@pytest.mark.parametrize(
    ("path", "schema", "body"),
    [
        ("/v1/chat/completions", ChatRequest, {"messages": [{"role": "user", "content": "a"}]}),
        ("/v1/completions", CompletionRequest, {"prompt": "a"}),
        ("/v1/responses", ResponsesRequest, {"input": "a"}),
    ],
)
async def test_null_means_the_default(client, engine, path, schema, body):
    optional = set(schema.model_fields) - set(body)

    assert (await client.post(path, json=body)).status_code == 200
    response = await client.post(path, json=body | dict.fromkeys(optional))

    assert response.status_code == 200, response.text
    assert engine.requests[0] == engine.requests[1]


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b'"text"',
        b"null",
        b"5",
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"messages": [{"role": "user", "content": "a"}], "temperature": NaN}',
        b'{"messages": [{"role": "user", "content": "a"}], "temperature": Infinity}',
        b'{"messages": [{"role": "user", "content": "a"}], "temperature": 1e999}',
        b'{"messages": [{"role": "user", "content": "\\ud800"}]}',
        b'{"messages": [{"role": "user", "content": "a"}], "\\ud800": 1}',
        b'{"messages": [{"role": "user", "content": "a"}], "seed": ' + b"1" * 5000 + b"}",
    ],
    ids=lambda body: repr(body[-40:]),
)
@pytest.mark.parametrize(
    "path", ["/v1/chat/completions", "/v1/completions", "/v1/responses", "/solve", "/tokenize", "/detokenize"]
)
async def test_what_is_no_json_object_is_a_400(client, engine, path, body):
    response = await client.post(path, content=body, headers={"Content-Type": "application/json"})

    assert response.status_code == 400, response.text
    assert set(response.json()["error"]) == {"message", "type", "param", "code"}
    assert not engine.requests


async def test_a_missing_content_type_is_explained(client):
    response = await client.post("/solve", content=b'{"question": "a"}')

    assert response.status_code == 400
    assert "Content-Type: application/json" in response.json()["error"]["message"]


async def test_a_huge_field_name_is_not_echoed_whole(client):
    response = await client.post("/solve", json={"question": "a", "b" * 100_000: 1})

    assert response.status_code == 400
    assert len(response.content) < 1000
