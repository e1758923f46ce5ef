"""The turns of a conversation, as OpenAI's clients send them.

What a client repeats of an earlier reply is taken, whatever fields that had: what no model can see of it changes
nothing, and what would change something is refused by its name.
"""

import contextlib
import json
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, Field
from pydantic_core import PydanticCustomError, from_json

from server.schemas.common import Body, Integer, NothingInIt, one_of, or_say
from server.schemas.rules import Rule
from trm.chat import ROLES

MAX_READ = 2**16  # characters of arguments that are read; longer ones are shown as they are
SYSTEM_ROLES = {role for role, rendered in ROLES.items() if rendered == "system"}
Name = Annotated[str | None, Field(description="shown to chat templates that use it")]
FunctionName = Annotated[str, Field(pattern="^[a-zA-Z0-9_-]+$", max_length=128)]


class Part(Body):
    """prompt_cache_breakpoint: a hint. Prompts that begin alike share what is computed, wherever that ends."""

    prompt_cache_breakpoint: dict[str, Any] | None = None


class TextPart(Part):
    type: Literal["text"]
    text: str


class RefusalPart(Part):
    """What an assistant said instead of an answer; the model reads it like any other text."""

    type: Literal["refusal"]
    refusal: str

    @property
    def text(self) -> str:
        return self.refusal


Parts = Annotated[list[TextPart], Field(min_length=1)]
ReplyPart = Annotated[
    TextPart | RefusalPart,
    Field(discriminator="type"),
    one_of({"text": TextPart, "refusal": RefusalPart}, "type"),
]
ReplyParts = Annotated[list[ReplyPart], Field(min_length=1)]


def parts(content: Any) -> Any:
    """A string as its one text part, so that an error's path needs no union in it."""
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    if not isinstance(content, list):
        raise PydanticCustomError("content_type", "Input should be a string or a list of text parts")
    return content


def _parts_or_none(content: Any) -> Any:
    return None if content is None else parts(content)


Content = Annotated[list[TextPart], Field(min_length=1), BeforeValidator(parts, json_schema_input_type=str | Parts)]


class _Turn(Body):
    role: str
    content: Any
    name: Name = None

    def turn(self) -> dict[str, Any]:
        """As chat templates want it."""
        said = "\n".join(part.text for part in self.content or ())
        named = {} if self.name is None else {"name": self.name}
        return {"role": self.role, "content": said} | named


class SystemMessage(_Turn):
    """What the model is to be, in the place of our own system prompt."""

    role: Literal["system", "developer"]
    content: Content


class UserMessage(_Turn):
    """What a person says."""

    role: Literal["user"]
    content: Content


class CalledFunction(Body):
    """arguments: JSON, as the model wrote it. parsed_arguments is what OpenAI's Python client makes of it: no news."""

    name: FunctionName
    arguments: str
    parsed_arguments: Any = None


class ToolCall(Body):
    """A call of a function that an earlier reply made. index: what streams number it by; no news."""

    id: str
    type: Literal["function"]
    function: CalledFunction
    index: Integer | None = None

    def as_made(self) -> dict[str, Any]:
        """As chat templates want it: with the arguments themselves, where the model wrote them well."""
        arguments: Any = self.function.arguments
        with contextlib.suppress(ValueError):
            if len(arguments) > MAX_READ:
                raise ValueError("more than any call needs")
            read = from_json(arguments)
            json.dumps(read, allow_nan=False)  # a template would write Infinity
            arguments = read if isinstance(read, dict) else arguments
        function = {"name": self.function.name, "arguments": arguments}
        return {"id": self.id, "type": self.type, "function": function}


class AssistantMessage(_Turn):
    """An earlier reply. Its reasoning, and what clients have parsed it into, the model does not see again."""

    rules: ClassVar[tuple[Rule, ...]] = (
        Rule(
            "content",
            "give content, or tool_calls",
            lambda body: bool(body.content is not None or body.refusal is not None or body.tool_calls),
            {
                "anyOf": [
                    {"properties": {"content": {"not": {"type": "null"}}}, "required": ["content"]},
                    {"properties": {"refusal": {"type": "string"}}, "required": ["refusal"]},
                    {"properties": {"tool_calls": {"type": "array", "minItems": 1}}, "required": ["tool_calls"]},
                ]
            },
        ),
    )

    role: Literal["assistant"]
    content: Annotated[
        list[ReplyPart] | None,
        Field(min_length=1),
        BeforeValidator(_parts_or_none, json_schema_input_type=str | ReplyParts | None),
    ] = None
    refusal: str | None = None
    tool_calls: list[ToolCall] | None = None
    function_call: Annotated[None, or_say("the old form of a call; use tool_calls")] = None
    audio: Annotated[None, or_say("this model cannot hear; leave it out")] = None
    annotations: Annotated[NothingInIt | None, or_say("this model cannot see annotations; leave them out")] = None
    reasoning: str | None = None
    reasoning_content: str | None = None
    parsed: Any = None

    def turn(self) -> dict[str, Any]:
        """As chat templates want it."""
        turn = super().turn()
        if self.refusal is not None:
            turn |= {"content": "\n".join(filter(None, (turn["content"], self.refusal)))}
        if self.tool_calls:
            turn |= {"tool_calls": [call.as_made() for call in self.tool_calls]}
        return turn


class ToolMessage(_Turn):
    """What a called function returned."""

    role: Literal["tool"]
    content: Content
    tool_call_id: str

    def turn(self) -> dict[str, Any]:
        """As chat templates want it."""
        return super().turn() | {"tool_call_id": self.tool_call_id}


MESSAGES: dict[str, type[BaseModel]] = {
    "system": SystemMessage,
    "developer": SystemMessage,
    "user": UserMessage,
    "assistant": AssistantMessage,
    "tool": ToolMessage,
}
ChatMessage = Annotated[
    SystemMessage | UserMessage | AssistantMessage | ToolMessage,
    Field(discriminator="role"),
    one_of(MESSAGES, "role"),
]
