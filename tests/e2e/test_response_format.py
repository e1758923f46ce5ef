"""Structured output as OpenAI's own client asks for it, from a real server process."""

import json
import re
from typing import Any, Literal

import jsonschema
import openai
import pytest
from pydantic import BaseModel, Field

pytestmark = pytest.mark.slow

MESSAGES: Any = [{"role": "user", "content": "Tom has 12 apples. He buys 7 more. How many apples does he have now?"}]


class Step(BaseModel):
    calculation: str = Field(max_length=12)
    result: int = Field(ge=-999, le=999)


class Solution(BaseModel):
    """Every string and list is bounded, so that even this small model comes to an end."""

    steps: list[Step] = Field(max_length=2)
    answer: int = Field(ge=0, le=999)
    unit: Literal["apples", "pens"]
    sure: bool | None


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_the_client_parses_a_reply(client: openai.OpenAI, temperature: float) -> None:
    completion = client.chat.completions.parse(
        model="qwen-trm", messages=MESSAGES, response_format=Solution, temperature=temperature, seed=1, n=8
    )

    assert len(completion.choices) == 8
    for choice in completion.choices:
        assert choice.finish_reason == "stop"
        assert isinstance(choice.message.parsed, Solution)
        assert choice.message.parsed == Solution.model_validate_json(choice.message.content or "")
    assert len({choice.message.content for choice in completion.choices}) == (1 if temperature == 0 else 8)


class Answer(BaseModel):
    """The first thing that anybody asks for. Nothing here is bounded."""

    answer: int


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_an_answer_that_is_any_integer_comes_to_an_end(client: openai.OpenAI, temperature: float) -> None:
    completion = client.chat.completions.parse(
        model="qwen-trm", messages=MESSAGES, response_format=Answer, temperature=temperature, seed=1, n=8, max_tokens=64
    )

    for choice in completion.choices:
        assert choice.finish_reason == "stop"
        assert isinstance(choice.message.parsed, Answer)


def test_the_client_parses_a_stream(client: openai.OpenAI) -> None:
    with client.chat.completions.stream(
        model="qwen-trm", messages=MESSAGES, response_format=Solution, temperature=1.0, seed=3
    ) as stream:
        deltas = [event.delta for event in stream if event.type == "content.delta"]
        final = stream.get_final_completion()

    assert len(deltas) > 5
    assert "".join(deltas) == final.choices[0].message.content
    assert isinstance(final.choices[0].message.parsed, Solution)
    whole = client.chat.completions.create(
        model="qwen-trm",
        messages=MESSAGES,
        response_format={
            "type": "json_schema",
            "json_schema": {"name": "Solution", "strict": True, "schema": strict_schema()},
        },
        temperature=1.0,
        seed=3,
    )
    assert whole.choices[0].message.content == final.choices[0].message.content, "streamed or not, the same"


def strict_schema() -> dict[str, Any]:
    """As the client writes it."""
    from openai.lib._pydantic import to_strict_json_schema

    return to_strict_json_schema(Solution)


def test_a_reply_that_is_cut_is_said_to_be(client: openai.OpenAI) -> None:
    with pytest.raises(openai.LengthFinishReasonError):
        client.chat.completions.parse(model="qwen-trm", messages=MESSAGES, response_format=Solution, max_tokens=9)


def test_json_mode(client: openai.OpenAI) -> None:
    completion = client.chat.completions.create(
        model="qwen-trm", messages=MESSAGES, response_format={"type": "json_object"}, temperature=1.0, seed=1, n=8
    )

    for choice in completion.choices:
        assert isinstance(json.loads(choice.message.content or ""), dict)


def ask(client: openai.OpenAI, response_format: dict[str, Any], **fields: Any) -> list[str]:
    completion = client.chat.completions.create(
        model="qwen-trm", messages=MESSAGES, response_format=response_format, temperature=1.5, seed=2, n=16, **fields
    )  # type: ignore[call-overload]
    assert {choice.finish_reason for choice in completion.choices} == {"stop"}
    return [choice.message.content for choice in completion.choices]


def test_choice_and_regex(client: openai.OpenAI) -> None:
    options = ["yes", "yes indeed", "no", "\u00bfqui\u00e9n sabe?"]

    assert 1 < len(set(ask(client, {"type": "choice", "choice": options}))) <= 4
    assert set(ask(client, {"type": "choice", "choice": options}, extra_body={"supervision_steps": 0})) <= set(options)
    for text in ask(client, {"type": "regex", "regex": r"\\boxed\{-?[0-9]{1,3}\}"}):
        assert re.fullmatch(r"\\boxed\{-?[0-9]{1,3}\}", text)


def test_completions_too(client: openai.OpenAI) -> None:
    completion = client.completions.create(
        model="qwen-trm",
        prompt=["2+2=", "3*3="],
        n=2,
        extra_body={"response_format": {"type": "regex", "regex": "[0-9]{1,2}!"}},
    )

    assert len(completion.choices) == 4
    assert all(re.fullmatch("[0-9]{1,2}!", choice.text) for choice in completion.choices)


def test_many_at_once_each_get_what_they_ask_for(client: openai.OpenAI) -> None:
    """Also the text that they get alone."""
    import concurrent.futures

    schema = {"type": "array", "items": {"enum": ["a", "bc", 12]}, "minItems": 2, "maxItems": 5}
    formats: list[Any] = [
        {"type": "json_schema", "json_schema": {"name": "list", "schema": schema}},
        {"type": "regex", "regex": "(ab|c){3,9}d"},
        {"type": "choice", "choice": ["left", "right"]},
        {"type": "text"},
    ]

    def text(index: int) -> str:
        completion = client.chat.completions.create(
            model="qwen-trm",
            messages=MESSAGES,
            response_format=formats[index % 4],
            temperature=1.2,
            seed=index,
            max_tokens=60,
            extra_body={"supervision_steps": index % 5},
        )
        return completion.choices[0].message.content or ""

    with concurrent.futures.ThreadPoolExecutor(32) as pool:
        together = list(pool.map(text, range(32)))

    assert together[:8] == [text(index) for index in range(8)]
    for index, said in enumerate(together):
        match index % 4:
            case 0:
                jsonschema.validate(json.loads(said), schema)
            case 1:
                assert re.fullmatch("(ab|c){3,9}d", said)
            case 2:
                assert said in ("left", "right")


@pytest.mark.parametrize(
    ("response_format", "param", "reason"),
    [
        ({"type": "xml"}, "response_format.type", "json_schema"),
        ({"type": "json_schema", "json_schema": {"name": "a"}}, "response_format.json_schema.schema", "required"),
        ({"type": "regex", "regex": "(?=a)"}, "response_format", "look-around"),
        (
            {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "array", "uniqueItems": True}}},
            "response_format",
            "uniqueItems",
        ),
    ],
)
def test_what_cannot_be_kept_is_a_bad_request(
    client: openai.OpenAI, response_format: Any, param: str, reason: str
) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(model="qwen-trm", messages=MESSAGES, response_format=response_format)

    assert refused.value.param == param
    assert reason in refused.value.message
