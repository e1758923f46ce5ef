"""Bodies of POST /v1/messages and /v1/messages/count_tokens: Anthropic's, each also said as a chat request.

What is only a hint (where to cache), a label, or tells of thinking, which here happens in the recursion's state and not
in words, is taken and changes nothing. What asks for something that there is not is refused by its name.
"""

import json
from collections.abc import Iterable, Iterator
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, Field
from pydantic_core import PydanticCustomError

from server.schemas.chat import ChatRequest
from server.schemas.common import (
    Body,
    Integer,
    JsonSchema,
    JsonSchemaFormat,
    NothingInIt,
    ResponseFormat,
    one_of,
    or_say,
)
from server.schemas.messages import (
    AssistantMessage,
    CalledFunction,
    ChatMessage,
    FunctionName,
    SystemMessage,
    TextPart,
    ToolMessage,
    UserMessage,
    parts,
)
from server.schemas.messages import ToolCall as ChatToolCall
from server.schemas.rules import Rule
from server.schemas.tools import FunctionDefinition, NamedFunction, NamedTool
from server.schemas.tools import Tool as ChatTool
from server.schemas.tools import ToolChoice as ChatToolChoice

# --- blocks of content ---------------------------------------------------------------------------


class CacheControl(Body):
    """A hint. Prompts that begin alike share what is computed, wherever that ends."""

    type: Literal["ephemeral"]
    ttl: Literal["5m", "1h"] | None = None


class _Block(Body):
    cache_control: CacheControl | None = None


class TextBlock(_Block):
    type: Literal["text"]
    text: str
    citations: Annotated[NothingInIt | None, or_say("this model cannot see citations; leave them out")] = None


class Caller(Body):
    """The model itself."""

    type: Literal["direct"]


class ToolUseBlock(_Block):
    """A call that an earlier reply made."""

    type: Literal["tool_use"]
    id: str
    name: FunctionName
    input: dict[str, Any]
    caller: Caller | None = None
    toolset_name: Annotated[None, or_say("there are no toolsets; leave it out")] = None

    def as_chat(self) -> ChatToolCall:
        """The call in OpenAI's shape."""
        function = CalledFunction(name=self.name, arguments=json.dumps(self.input, ensure_ascii=False))
        return ChatToolCall(id=self.id, type="function", function=function)


class ThinkingBlock(Body):
    """What another model thought aloud. This one does not see it."""

    type: Literal["thinking"]
    thinking: str
    signature: str


class RedactedThinkingBlock(Body):
    """The same, unreadable."""

    type: Literal["redacted_thinking"]
    data: str


def _readable(kinds: Iterable[str]) -> BeforeValidator:
    """Refuses blocks of any other type for what they are."""

    def check(value: Any) -> Any:
        kind = value.get("type") if isinstance(value, dict) else None
        if isinstance(kind, str) and kind not in kinds:
            message = "this model reads no block of type {kind}, only {known}; leave it out"
            raise PydanticCustomError("block", message, {"kind": kind[:100], "known": ", ".join(kinds)})
        return value

    return BeforeValidator(check)


TEXTS: dict[str, type[BaseModel]] = {"text": TextBlock}
Texts = list[Annotated[TextBlock, one_of(TEXTS, "type"), _readable(TEXTS)]]
SomeTexts = Annotated[Texts, Field(min_length=1)]


def _some_texts(given: Any) -> Any:
    return None if given in (None, "", []) else parts(given)


class ToolResultBlock(_Block):
    """What a called tool returned. is_error: the model reads what went wrong in the content, or not at all."""

    type: Literal["tool_result"]
    tool_use_id: str
    content: Annotated[Texts | None, BeforeValidator(_some_texts, json_schema_input_type=str | Texts | None)] = None
    is_error: bool | None = None
    toolset_name: Annotated[None, or_say("there are no toolsets; leave it out")] = None


SAID: dict[str, type[BaseModel]] = {"text": TextBlock, "tool_result": ToolResultBlock}
REPLIED: dict[str, type[BaseModel]] = {
    "text": TextBlock,
    "tool_use": ToolUseBlock,
    "thinking": ThinkingBlock,
    "redacted_thinking": RedactedThinkingBlock,
}
SaidBlocks = list[
    Annotated[TextBlock | ToolResultBlock, Field(discriminator="type"), one_of(SAID, "type"), _readable(SAID)]
]
SomeSaid = Annotated[SaidBlocks, Field(min_length=1)]
RepliedBlocks = list[
    Annotated[
        TextBlock | ToolUseBlock | ThinkingBlock | RedactedThinkingBlock,
        Field(discriminator="type"),
        one_of(REPLIED, "type"),
        _readable(REPLIED),
    ]
]


def _parts(blocks: list[TextBlock] | None) -> list[TextPart]:
    return [TextPart(type="text", text=block.text) for block in blocks or [TextBlock(type="text", text="")]]


# --- turns ---------------------------------------------------------------------------------------


class SystemTurn(Body):
    role: Literal["system"]
    content: Annotated[SomeTexts, BeforeValidator(parts, json_schema_input_type=str | SomeTexts)]

    def as_chat(self) -> Iterator[ChatMessage]:
        """The same turn in OpenAI's shape."""
        yield SystemMessage(role="system", content=_parts(self.content))


class UserTurn(Body):
    """What a person says, and what tools return."""

    role: Literal["user"]
    content: Annotated[SomeSaid, BeforeValidator(parts, json_schema_input_type=str | SomeSaid)]

    def as_chat(self) -> Iterator[ChatMessage]:
        """The same in OpenAI's shape, where what each tool returns is a turn of its own."""
        texts: list[TextBlock] = []
        for block in self.content:
            if isinstance(block, TextBlock):
                texts.append(block)
                continue
            if texts:
                yield UserMessage(role="user", content=_parts(texts))
                texts = []
            yield ToolMessage(role="tool", content=_parts(block.content), tool_call_id=block.tool_use_id)
        if texts:
            yield UserMessage(role="user", content=_parts(texts))


class AssistantTurn(Body):
    """An earlier reply."""

    role: Literal["assistant"]
    content: Annotated[RepliedBlocks, BeforeValidator(parts, json_schema_input_type=str | RepliedBlocks)]

    def as_chat(self) -> Iterator[ChatMessage]:
        """The same turn in OpenAI's shape."""
        texts = [block for block in self.content if isinstance(block, TextBlock)]
        calls = [block.as_chat() for block in self.content if isinstance(block, ToolUseBlock)]
        content = [] if calls and not texts else _parts(texts)
        yield AssistantMessage(role="assistant", content=[*content] or None, tool_calls=calls or None)


TURNS: dict[str, type[BaseModel]] = {"user": UserTurn, "assistant": AssistantTurn, "system": SystemTurn}
Turn = Annotated[UserTurn | AssistantTurn | SystemTurn, Field(discriminator="role"), one_of(TURNS, "role")]

# --- tools ---------------------------------------------------------------------------------------


def _own_tool(value: Any) -> Any:
    """Refuse the tools that Anthropic brings, by their names."""
    if isinstance(value, dict) and value.get("type") not in (None, "custom"):
        message = "{kind} is a tool of Anthropic's; this server has none. Give a name and an input_schema of your own"
        raise PydanticCustomError("server_tool", message, {"kind": str(value["type"])[:100]})
    return value


class CustomTool(_Block):
    """Something that the model may call. Inputs fit the schema whether or not `strict` is set.

    eager_input_streaming: a hint; inputs are always streamed as they come.
    """

    type: Literal["custom"] | None = None
    name: FunctionName
    description: str | None = None
    input_schema: dict[str, Any]
    strict: bool | None = None
    eager_input_streaming: bool | None = None
    defer_loading: Annotated[Literal[False] | None, or_say("the model is shown all tools at once; leave it out")] = None
    input_examples: Annotated[
        NothingInIt | None, or_say("the model is shown no examples; put them into the description")
    ] = None
    allowed_callers: Annotated[
        Annotated[list[Literal["direct"]], Field(min_length=1, max_length=1)] | None,
        or_say("only the model calls tools; leave it out"),
    ] = None

    def as_chat(self) -> ChatTool:
        """The same in OpenAI's shape."""
        parameters = {key: value for key, value in self.input_schema.items() if value is not None}
        function = FunctionDefinition(name=self.name, description=self.description, parameters=parameters)
        return ChatTool(type="function", function=function)


class _Choice(Body):
    type: str
    disable_parallel_tool_use: bool | None = None


class AutoChoice(_Choice):
    """The model decides."""

    type: Literal["auto"]


class AnyChoice(_Choice):
    """Some tool must be called."""

    type: Literal["any"]


class NamedChoice(_Choice):
    """This tool must be called."""

    type: Literal["tool"]
    name: FunctionName


class NoChoice(Body):
    """No tool may be called."""

    type: Literal["none"]


CHOICES: dict[str, type[BaseModel]] = {"auto": AutoChoice, "any": AnyChoice, "tool": NamedChoice, "none": NoChoice}
Choice = Annotated[
    AutoChoice | AnyChoice | NamedChoice | NoChoice,
    Field(discriminator="type"),
    one_of(CHOICES, "type", described=AutoChoice | NoChoice),  # nor can it be said what must be among the tools
    Field(description="where there are tools also any of them, or one (tool)"),
]

# --- the requests --------------------------------------------------------------------------------


class Metadata(Body):
    user_id: str | None = None


class Thinking(Body):
    """Taken, and changes nothing: this model thinks in its state, as deep as output_config.effort says."""

    type: Literal["enabled", "disabled", "adaptive", "between_tools"]
    budget_tokens: Integer | None = None
    display: Literal["summarized", "omitted"] | None = None


class OutputFormat(Body):
    """The reply is JSON that the schema describes."""

    type: Literal["json_schema"]
    schema_: dict[str, Any] = Field(alias="schema")


class OutputConfig(Body):
    """effort: how deep the recursion goes, as reasoning_effort in chat."""

    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None
    format: OutputFormat | None = None


class Diagnostics(Body):
    previous_message_id: Annotated[None, or_say("replies are not stored, to be compared with; leave it out")] = None


class CountTokensRequest(Body):
    """A prompt. Without `system` the model gets the system prompt that it was trained with.

    user_profile_id and workspace_id are labels.
    """

    rules: ClassVar[tuple[Rule, ...]] = (
        Rule(
            "messages",
            "the last message is the assistant's, and going on with a reply is not implemented; end with a user's",
            lambda body: body.messages[-1].role != "assistant",
            {},  # a condition on the last item of a list is more than JSON Schema can say
        ),
    )

    model: str | None = None
    messages: list[Turn] = Field(min_length=1, description="the last one is no assistant's")
    system: Annotated[Texts | None, BeforeValidator(_some_texts, json_schema_input_type=str | Texts | None)] = None
    tools: list[Annotated[CustomTool, BeforeValidator(_own_tool)]] | None = None
    tool_choice: Choice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    cache_control: CacheControl | None = None
    speed: Annotated[Literal["standard"] | None, or_say("there is one speed; leave it out")] = None
    user_profile_id: str | None = None
    workspace_id: str | None = None

    def as_chat(self, **more: Any) -> ChatRequest:
        """The same in OpenAI's shape, and what else it says."""
        system = [SystemMessage(role="system", content=_parts(self.system))] if self.system else []
        choice, config = self.tool_choice, self.output_config or OutputConfig()
        format_: ResponseFormat | None = None
        if config.format:
            described = JsonSchema(name="output", schema=config.format.schema_)
            format_ = JsonSchemaFormat(type="json_schema", json_schema=described)
        wanted: ChatToolChoice = None
        match choice:
            case AnyChoice():
                wanted = "required"
            case NamedChoice(name=name):
                wanted = NamedTool(type="function", function=NamedFunction(name=name))
            case NoChoice():
                wanted = "none"
        return ChatRequest.model_construct(
            model=self.model,
            messages=[*system, *(turn for message in self.messages for turn in message.as_chat())],
            tools=None if self.tools is None else [tool.as_chat() for tool in self.tools],
            tool_choice=wanted,
            parallel_tool_calls=not getattr(choice, "disable_parallel_tool_use", None),
            reasoning_effort=config.effort,
            response_format=format_,
            **more,
        )


class MessagesRequest(CountTokensRequest):
    """A prompt, and how to reply to it. temperature is 0 by default (Anthropic's: 1)."""

    max_tokens: Integer = Field(ge=1)
    temperature: float | None = Field(None, ge=0, le=1)
    top_p: float | None = None
    top_k: Integer | None = None
    stop_sequences: list[Annotated[str, Field(min_length=1)]] | None = None
    stream: bool | None = None
    metadata: Metadata | None = None
    service_tier: Annotated[
        Literal["auto", "standard_only"] | None, or_say("there is one tier of service; leave it out")
    ] = None
    container: Annotated[None, or_say("there are no containers; leave it out")] = None
    diagnostics: Diagnostics | None = None
    inference_geo: Annotated[None, or_say("this server is where it is; leave it out")] = None

    def as_chat(self, **more: Any) -> ChatRequest:
        """The same in OpenAI's shape."""
        return super().as_chat(
            max_tokens=self.max_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            stop=self.stop_sequences,
            stream=self.stream,
            **more,
        )


# --- the replies ---------------------------------------------------------------------------------

StopReason = Literal["end_turn", "max_tokens", "model_context_window_exceeded", "stop_sequence", "tool_use"]


class SaidText(BaseModel):
    type: Literal["text"] = "text"
    text: str


class SaidToolUse(BaseModel):
    """input: fits the tool's schema, unless the reply was cut: then it is what is certain of it."""

    type: Literal["tool_use"] = "tool_use"
    id: str
    name: str
    input: dict[str, Any]


class MessageUsage(BaseModel):
    """input_tokens: those of the prompt that were computed; cache_read_input_tokens: those another request had."""

    input_tokens: int
    cache_creation_input_tokens: int = 0
    cache_read_input_tokens: int
    output_tokens: int


class AssistantReply(BaseModel):
    """stop_sequence: the one that ended the reply."""

    id: str
    type: Literal["message"] = "message"
    role: Literal["assistant"] = "assistant"
    model: str
    content: list[SaidText | SaidToolUse]
    stop_reason: StopReason | None
    stop_sequence: str | None
    usage: MessageUsage


class TokenCount(BaseModel):
    input_tokens: int


class AnthropicErrorDetails(BaseModel):
    type: str
    message: str


class AnthropicErrorBody(BaseModel):
    """How errors look to Anthropic's clients."""

    type: Literal["error"] = "error"
    error: AnthropicErrorDetails
