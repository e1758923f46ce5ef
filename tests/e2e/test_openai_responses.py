"""POST /v1/responses through OpenAI's own client, against a real server of the bundled model."""

import json
from typing import Any

import openai
import pytest
from pydantic import BaseModel

pytestmark = pytest.mark.slow

MODEL = "qwen-trm"
QUESTION = "Tom has 12 apples. He buys 7 more. How many apples does he have now?"
REPLY = "12+7=19\n\\boxed{19}"
ADD: Any = {
    "type": "function",
    "name": "add",
    "description": None,
    "parameters": {"type": "object", "properties": {"a": {"enum": [12, 7]}}, "required": ["a"]},
    "strict": True,
}


class Apples(BaseModel):
    sold: bool
    left: bool


def test_a_question_is_answered_as_by_chat(client: openai.OpenAI) -> None:
    response = client.responses.create(model=MODEL, input=QUESTION)
    chat = client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": QUESTION}])

    assert (response.output_text, response.status, response.incomplete_details) == (REPLY, "completed", None)
    assert response.boxed_answer == "19"  # type: ignore[attr-defined]
    assert response.usage is not None
    assert chat.usage is not None
    assert response.usage.input_tokens == chat.usage.prompt_tokens
    assert response.usage.output_tokens == chat.usage.completion_tokens
    assert response.usage.total_tokens == chat.usage.total_tokens


def test_it_is_cut_where_asked(client: openai.OpenAI) -> None:
    response = client.responses.create(model=MODEL, input=QUESTION, max_output_tokens=3, reasoning={"effort": "low"})

    assert response.status == "incomplete"
    assert response.incomplete_details is not None
    assert response.incomplete_details.reason == "max_output_tokens"
    assert response.usage is not None
    assert response.usage.output_tokens == 3
    assert REPLY.startswith(response.output_text)


def test_a_stream_is_the_whole_in_pieces(client: openai.OpenAI) -> None:
    with client.responses.stream(model=MODEL, input=QUESTION) as stream:
        deltas = [event.delta for event in stream if event.type == "response.output_text.delta"]
        final = stream.get_final_response()
    raw = list(client.responses.create(model=MODEL, input=QUESTION, stream=True))

    assert len(deltas) > 1
    assert "".join(deltas) == final.output_text == REPLY
    assert [event.sequence_number for event in raw] == list(range(len(raw)))
    assert (raw[0].type, raw[-1].type) == ("response.created", "response.completed")


def test_a_model_of_pydantics_is_parsed(client: openai.OpenAI) -> None:
    response = client.responses.parse(model=MODEL, input=QUESTION, text_format=Apples)
    with client.responses.stream(model=MODEL, input=QUESTION, text_format=Apples) as stream:
        streamed = stream.get_final_response()

    assert isinstance(response.output_parsed, Apples)
    assert streamed.output_parsed == response.output_parsed


def test_a_function_is_called_and_what_it_returned_is_read(client: openai.OpenAI) -> None:
    turns: list[Any] = [{"role": "user", "content": QUESTION}]
    first = client.responses.create(
        model=MODEL, input=turns, tools=[ADD], tool_choice="required", parallel_tool_calls=False
    )
    with client.responses.stream(
        model=MODEL, input=turns, tools=[ADD], tool_choice="required", parallel_tool_calls=False
    ) as stream:
        streamed = stream.get_final_response()

    (call,) = first.output
    assert call.type == "function_call"
    assert (call.name, call.status) == ("add", "completed")
    assert json.loads(call.arguments)["a"] in (12, 7)
    assert [(item.name, item.arguments) for item in streamed.output] == [(call.name, call.arguments)]  # type: ignore[union-attr]

    turns += [*first.output, {"type": "function_call_output", "call_id": call.call_id, "output": "19"}]
    second = client.responses.create(model=MODEL, input=turns, tools=[ADD], tool_choice="none", max_output_tokens=16)

    assert second.output[0].type == "message"
    assert first.usage is not None
    assert second.usage is not None
    assert second.usage.output_tokens > 0
    turns += streamed.output
    assert client.responses.create(model=MODEL, input=turns, max_output_tokens=1).output


def test_what_there_is_not_is_refused(client: openai.OpenAI) -> None:
    refused: list[tuple[str, dict[str, Any]]] = [
        ("store", {"store": True}),
        ("previous_response_id", {"previous_response_id": "resp_1"}),
        ("temperature", {"temperature": 3}),
        ("tools.0.type", {"tools": [{"type": "web_search"}]}),
    ]
    for param, fields in refused:
        with pytest.raises(openai.BadRequestError) as error:
            client.responses.create(model=MODEL, input=QUESTION, **fields)
        assert error.value.param == param
