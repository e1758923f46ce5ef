"""Every value that OpenAI's own Python types allow is taken, or refused for what it asks: never for being there."""

import pytest
from openai.types import completion_create_params as texts
from openai.types.chat import (
    ChatCompletionMessage,
    ParsedChatCompletionMessage,
    ParsedFunction,
    ParsedFunctionToolCall,
)
from openai.types.chat import completion_create_params as chats
from openai.types.chat.chat_completion_message_function_tool_call import ChatCompletionMessageFunctionToolCall, Function
from openai.types.responses import response_create_params as answers

from tests.server import walk

pytestmark = pytest.mark.anyio

CHAT = "/v1/chat/completions"


def test_the_walk_comes_to_what_lies_deep() -> None:
    walked = walk.fields(chats.CompletionCreateParamsBase)

    assert len(walked) > 150
    assert ("reasoning_effort", "xhigh") in walked
    assert any(name == "messages" and {"role", "tool_calls"} <= value[0].keys() for name, value in walked if value)


@pytest.mark.parametrize(
    ("path", "params", "least"),
    [
        (CHAT, chats.CompletionCreateParamsBase, {"messages": [{"role": "user", "content": "a"}]}),
        ("/v1/completions", texts.CompletionCreateParamsBase, {"prompt": "a"}),
        ("/v1/responses", answers.ResponseCreateParamsBase, {"input": "a"}),
    ],
    ids=["chat", "completions", "responses"],
)
async def test_no_field_is_refused_for_being_there(client, path, params, least):
    wrong = []
    for name, value in walk.fields(params):
        response = await client.post(path, json=least | {name: value})
        message = "" if response.status_code == 200 else response.json()["error"]["message"]
        unneeded = value is None and name not in least
        if response.status_code not in (200, 400) or "unknown or unsupported" in message or (unneeded and message):
            wrong.append((name, value, message))

    assert wrong == []


CALL = ChatCompletionMessageFunctionToolCall(
    id="call_1", type="function", function=Function(name="add", arguments='{"a": 1}')
)
PARSED = ParsedFunctionToolCall(
    id="call_1",
    type="function",
    function=ParsedFunction(name="add", arguments='{"a": 1}', parsed_arguments={"a": 1}),
)


@pytest.mark.parametrize(
    "message",
    [
        ChatCompletionMessage(role="assistant", content="a"),
        ChatCompletionMessage(
            role="assistant", content="a", refusal=None, annotations=[], audio=None, function_call=None, tool_calls=[]
        ),
        ChatCompletionMessage(role="assistant", content=None, refusal="no"),
        ChatCompletionMessage(role="assistant", content=None, tool_calls=[CALL]),
        ParsedChatCompletionMessage[dict](role="assistant", content="{}", parsed={}, tool_calls=None),
        ParsedChatCompletionMessage[dict](role="assistant", content=None, parsed=None, tool_calls=[PARSED]),
    ],
    ids=range(6),
)
@pytest.mark.parametrize("unset", [False, True], ids=["all fields", "only what was set"])
async def test_a_reply_comes_back_as_the_client_dumps_it(client, message, unset):
    turns = [{"role": "user", "content": "a"}, message.model_dump(mode="json", exclude_unset=unset)]

    response = await client.post(CHAT, json={"messages": turns})

    assert response.status_code == 200, response.text


@pytest.mark.parametrize(
    "neutral",
    [
        {"tools": None, "tool_choice": "none", "parallel_tool_calls": True},
        {"store": False, "service_tier": "auto", "modalities": ["text"], "verbosity": "medium"},
        {"service_tier": "default", "functions": [], "function_call": "none"},
        {"top_logprobs": 0},
        {"logprobs": False, "top_logprobs": 0},
        {"prompt_cache_key": "a", "safety_identifier": "b", "user": "c", "metadata": {"d": "e"}},
        {"prompt_cache_retention": "in_memory"},
        {"seed": -1},
        {"top_k": -1, "top_p": 1, "repetition_penalty": 1.0},
    ],
    ids=str,
)
async def test_values_that_ask_for_nothing_change_nothing(client, engine, neutral):
    body = {"messages": [{"role": "user", "content": "a"}]}

    for fields in ({}, neutral):
        assert (await client.post(CHAT, json=body | fields)).status_code == 200

    assert engine.chat.conversations[0] == engine.chat.conversations[1]
    first, second = (request.params for request in engine.requests)
    assert first == (second if "seed" not in neutral else type(second)(max_tokens=second.max_tokens))
    assert all(request.grammar is None for request in engine.requests)
