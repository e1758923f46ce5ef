"""Bodies of POST /v1/responses: a chat request in other words, and the items of one reply.

A conversation is a list of items. What a client repeats of an earlier response is taken, as in
`server.schemas.messages`: what no model can see of it changes nothing.
"""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import AliasChoices, BaseModel, BeforeValidator, Field
from pydantic_core import PydanticCustomError

from server.schemas.chat import ChatRequest, WorkOfMessages
from server.schemas.common import (
    Account,
    Body,
    ChoiceFormat,
    CompletionTokensDetails,
    Effort,
    FullSampling,
    Integer,
    JsonObjectFormat,
    JsonSchema,
    NothingInIt,
    RegexFormat,
    TextFormat,
    TRMUsage,
    Unpadded,
    one_of,
    or_say,
)
from server.schemas.messages import SYSTEM_ROLES, FunctionName, Part, RefusalPart
from server.schemas.rules import Rule, at_most_one, needs_true
from server.schemas.tools import FunctionDefinition, Mode, choice_of

Status = Literal["in_progress", "completed", "incomplete"]


# Items that come in


class InputTextPart(Part):
    type: Literal["input_text", "text"]
    text: str


class OutputTextPart(Part):
    """Text of an earlier reply. Its log probabilities, and what a client has parsed it into, are no news."""

    type: Literal["output_text"]
    text: str
    annotations: Annotated[NothingInIt | None, or_say("this model cannot see annotations; leave them out")] = None
    logprobs: list[Any] | None = None
    parsed: Any = None


_PARTS: dict[str, type[BaseModel]] = {
    "input_text": InputTextPart,
    "text": InputTextPart,
    "output_text": OutputTextPart,
    "refusal": RefusalPart,
}
ItemPart = Annotated[InputTextPart | OutputTextPart | RefusalPart, Field(discriminator="type"), one_of(_PARTS, "type")]
ItemParts = Annotated[list[ItemPart], Field(min_length=1)]


def _parts(content: Any) -> Any:
    """A string as its one text part, so that an error's path needs no union in it."""
    if isinstance(content, str):
        return [{"type": "input_text", "text": content}]
    if not isinstance(content, list):
        raise PydanticCustomError("content_type", "Input should be a string or a list of text parts")
    return content


ItemContent = Annotated[
    list[ItemPart],
    Field(min_length=1),
    BeforeValidator(_parts, json_schema_input_type=str | ItemParts),
]


def _texts(content: list[ItemPart]) -> list[dict[str, Any]]:
    """As chat takes it."""
    return [{"type": "text", "text": part.text} for part in content]


class _Item(Body):
    """id and status are what an earlier response said of it."""

    id: str | None = None
    status: Status | None = None


class InputMessage(_Item):
    """What somebody says. `type` may be left out. phase: a label of an earlier reply's."""

    type: Literal["message"] | None = None
    role: Literal["user", "assistant", "system", "developer"]
    content: ItemContent
    phase: Literal["commentary", "final_answer"] | None = None


class _CallItem(_Item):
    call_id: str
    namespace: Annotated[None, or_say("functions have no namespaces; leave it out")] = None
    caller: Annotated[
        dict[Literal["type"], Literal["direct"]] | None, or_say("only the model itself calls functions; leave it out")
    ] = None


class CallItem(_CallItem):
    """A call of a function that an earlier reply made. arguments: JSON, as the model wrote it."""

    type: Literal["function_call"]
    name: FunctionName
    arguments: str
    parsed_arguments: Any = None
    async_: Annotated[Literal[False] | None, or_say("calls are waited for; leave it out")] = Field(
        None,
        validation_alias=AliasChoices("async", "async_"),  # the client's dumps know it by both
    )


class CallOutputItem(_CallItem):
    """What a called function returned."""

    type: Literal["function_call_output"]
    output: ItemContent
    name: str | None = None


class ReasoningItem(_Item):
    """How another model came to its reply. This one, whose recursion reasons in its state, does not see it."""

    type: Literal["reasoning"]
    summary: list[Any] | None = None
    content: list[Any] | None = None
    encrypted_content: str | None = None


Item = InputMessage | CallItem | CallOutputItem | ReasoningItem
_ITEMS: dict[str, type[BaseModel]] = {
    "message": InputMessage,
    "function_call": CallItem,
    "function_call_output": CallOutputItem,
    "reasoning": ReasoningItem,
}
_READ_ITEM = one_of(_ITEMS, "type")


def _item(value: Any) -> Any:
    """The item that `type` names, so that an error's path needs no union in it."""
    if not isinstance(value, dict):
        raise PydanticCustomError("item_type", "Input should be an item: an object with a type")
    kind = value.get("type")
    if kind is None and "role" in value:
        return InputMessage.model_validate(value)
    if kind in (None, "item_reference"):
        raise PydanticCustomError("item_reference", "nothing is stored that could be referred to; send the item itself")
    return _READ_ITEM.func(value)  # type: ignore[call-arg]


AnyItem = Annotated[Item, BeforeValidator(_item)]
AnyItems = Annotated[list[AnyItem], Field(min_length=1)]


def _items(value: Any) -> Any:
    if isinstance(value, str):
        return [{"role": "user", "content": value}]
    if not isinstance(value, list):
        raise PydanticCustomError("input_type", "Input should be a string or a list of items")
    return value


# How to reply


class NamedSchemaFormat(JsonSchema):
    """JSON that a schema describes."""

    type: Literal["json_schema"]


_FORMATS: dict[str, type[BaseModel]] = {
    "text": TextFormat,
    "json_object": JsonObjectFormat,
    "json_schema": NamedSchemaFormat,
    "regex": RegexFormat,
    "choice": ChoiceFormat,
}
ReplyFormat = Annotated[
    TextFormat | JsonObjectFormat | NamedSchemaFormat | RegexFormat | ChoiceFormat,
    Field(discriminator="type"),
    one_of(_FORMATS, "type"),
]


class TextConfig(Body):
    """format: what the reply must look like."""

    format: ReplyFormat | None = None
    verbosity: Annotated[
        Literal["medium"] | None, or_say("verbosity cannot be set; use work, or max_output_tokens")
    ] = None

    def response_format(self) -> dict[str, Any] | None:
        """As chat takes it."""
        if isinstance(self.format, NamedSchemaFormat):
            described = self.format.model_dump(by_alias=True, exclude={"type"})
            return {"type": "json_schema", "json_schema": described}
        return None if self.format is None else self.format.model_dump()


_NO_SUMMARY = or_say("the recursion reasons in its state, not in words that could be summed up; leave it out")


class Reasoning(Body):
    """summary `auto` is whatever summary a model has to give. This one has none."""

    effort: Effort | None = None
    summary: Annotated[Literal["auto"] | None, _NO_SUMMARY] = None
    generate_summary: Annotated[Literal["auto"] | None, _NO_SUMMARY] = None
    context: Annotated[Literal["auto"] | None, or_say("the model does not see reasoning items; leave it out")] = None
    mode: Annotated[Literal["standard"] | None, or_say("there is one mode; use effort")] = None


class FlatTool(FunctionDefinition):
    """A function that the model may call."""

    type: Literal["function"]
    allowed_callers: Annotated[
        Annotated[list[Literal["direct"]], Field(min_length=1, max_length=1)] | None,
        or_say("only the model itself calls functions; leave it out"),
    ] = None
    defer_loading: Annotated[Literal[False] | None, or_say("every tool is shown; leave it out")] = None
    async_: Annotated[Literal[False] | None, or_say("calls are waited for; leave it out")] = Field(None, alias="async")
    output_schema: Annotated[None, or_say("the model is not shown what functions return; leave it out")] = None


class FlatNamedTool(Body):
    """This function must be called."""

    type: Literal["function"]
    name: FunctionName


class FlatAllowedTools(Body):
    """Only these may be called. mode: whether one of them must be."""

    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: list[FlatNamedTool] = Field(min_length=1)


FlatChoice = Annotated[Mode | FlatNamedTool | FlatAllowedTools | None, choice_of(FlatNamedTool, FlatAllowedTools)]
OneTool = Annotated[FlatTool, one_of({"function": FlatTool}, "type")]


class ResponseStreamOptions(Body):
    include_obfuscation: Unpadded = None


_NOTHING_STORED = or_say("nothing is stored that could be continued; send the whole conversation as input")
_REASONING = {"properties": {"type": {"const": "reasoning"}}, "required": ["type"]}
_ABSENT_EFFORT = {"type": ["object", "null"], "properties": {"effort": {"type": "null"}}}


class ResponsesRequest(FullSampling, Account):
    """input: a text, or the items of a conversation. instructions: a system message in front of them.

    work: what the reply shows before its answer; this puts a system prompt in front.
    """

    rules: ClassVar[tuple[Rule, ...]] = (
        needs_true("stream_options", "stream"),
        Rule(
            "supervision_steps",
            "give either reasoning.effort or supervision_steps, not both",
            lambda body: body.supervision_steps is None or body.reasoning is None or body.reasoning.effort is None,
            {
                "anyOf": [
                    {"properties": {"supervision_steps": {"type": "null"}}},
                    {"properties": {"reasoning": _ABSENT_EFFORT}},
                ]
            },
        ),
        at_most_one("work", "instructions", param="work"),
        Rule(
            "work",
            "work puts its own system prompt in front of the input; leave it out, or leave your system message out",
            lambda body: body.work is None or not any(turn["role"] in SYSTEM_ROLES for turn in body.messages()),
            {},  # as in `server.schemas.chat`
        ),
        Rule(
            "input",
            "input holds nothing that the model sees; add a message",
            lambda body: bool(body.messages()),
            {
                "anyOf": [
                    {"properties": {"instructions": {"type": "string"}}, "required": ["instructions"]},
                    {"properties": {"input": {"type": "string"}}},
                    {"properties": {"input": {"contains": {"not": _REASONING}}}},
                ]
            },
        ),
    )

    input: Annotated[
        list[AnyItem],
        Field(min_length=1),
        BeforeValidator(_items, json_schema_input_type=str | AnyItems),
    ]
    instructions: str | None = None
    work: WorkOfMessages = None
    max_output_tokens: Integer | None = Field(None, ge=1)
    text: TextConfig | None = None
    reasoning: Reasoning | None = None
    tools: list[OneTool] | None = None
    tool_choice: FlatChoice = None
    parallel_tool_calls: bool | None = None
    stream_options: ResponseStreamOptions | None = None

    # Of OpenAI's, what changes nothing here. Other values ask for what there is not.
    truncation: Annotated[
        Literal["disabled"] | None, or_say("conversations are not cut; shorten them, or leave it out")
    ] = None
    background: Annotated[Literal[False] | None, or_say("replies are waited for; leave it out")] = None
    background_options: Annotated[None, or_say("replies are waited for; leave it out")] = None
    previous_response_id: Annotated[None, _NOTHING_STORED] = None
    conversation: Annotated[None, _NOTHING_STORED] = None
    prompt: Annotated[None, or_say("no prompts are stored; send it as instructions and input")] = None
    include: Annotated[
        list[Literal["reasoning.encrypted_content"]] | None, or_say("responses hold all that there is; leave it out")
    ] = None
    context_management: Annotated[NothingInIt | None, or_say("conversations are not compacted; leave it out")] = None
    top_logprobs: Annotated[Literal[0] | None, or_say("this route has no log probabilities; use chat")] = None
    max_tool_calls: Annotated[None, or_say("there are no built-in tools to call; leave it out")] = None
    access_programs: Annotated[None, or_say("there are no such programs; leave it out")] = None
    image: Annotated[None, or_say("this model cannot see; leave it out")] = None

    def as_chat(self) -> ChatRequest:
        """The same in chat's words."""
        text, reasoning, choice = self.text or TextConfig(), self.reasoning or Reasoning(), self.tool_choice
        return ChatRequest.model_validate(
            {name: getattr(self, name) for name in FullSampling.model_fields}
            | {
                "messages": self.messages(),
                "max_tokens": self.max_output_tokens,
                "reasoning_effort": reasoning.effort,
                "response_format": text.response_format(),
                "work": self.work,
                "tools": None if self.tools is None else [_nested(tool) for tool in self.tools],
                "tool_choice": _nested_choice(choice) if isinstance(choice, Body) else choice,
                "parallel_tool_calls": self.parallel_tool_calls,
            }
        )

    def messages(self) -> list[dict[str, Any]]:
        """The items as turns. A reply's text and the calls behind it are one, as the model wrote them."""
        turns: list[dict[str, Any]] = []
        if self.instructions is not None:
            turns.append({"role": "system", "content": self.instructions})
        for item in self.input:
            match item:
                case InputMessage():
                    turns.append({"role": item.role, "content": _texts(item.content)})
                case CallItem():
                    if not turns or turns[-1]["role"] != "assistant":
                        turns.append({"role": "assistant"})
                    function = {"name": item.name, "arguments": item.arguments}
                    call = {"id": item.call_id, "type": "function", "function": function}
                    turns[-1].setdefault("tool_calls", []).append(call)
                case CallOutputItem():
                    turns.append({"role": "tool", "content": _texts(item.output), "tool_call_id": item.call_id})
        return turns


def _nested(tool: FlatTool) -> dict[str, Any]:
    return {"type": "function", "function": {name: getattr(tool, name) for name in FunctionDefinition.model_fields}}


def _nested_choice(choice: FlatNamedTool | FlatAllowedTools) -> dict[str, Any]:
    if isinstance(choice, FlatNamedTool):
        return {"type": "function", "function": {"name": choice.name}}
    allowed = {"mode": choice.mode, "tools": [_nested_choice(tool) for tool in choice.tools]}
    return {"type": "allowed_tools", "allowed_tools": allowed}


# What goes out


class OutputText(BaseModel):
    """annotations and logprobs are OpenAI's; there are none."""

    type: Literal["output_text"] = "output_text"
    text: str = ""
    annotations: list[Any] = []
    logprobs: list[Any] = []


class OutputMessage(BaseModel):
    """What the reply says. content: nothing yet, or its one part."""

    id: str
    type: Literal["message"] = "message"
    status: Status = "in_progress"
    role: Literal["assistant"] = "assistant"
    content: list[OutputText] = []


class OutputCall(BaseModel):
    """A call that the reply makes. arguments: JSON that fits the function's schema, unless incomplete."""

    id: str
    type: Literal["function_call"] = "function_call"
    status: Status = "in_progress"
    call_id: str
    name: str
    arguments: str = ""


class InputTokensDetails(BaseModel):
    """cached_tokens: prompt tokens that another request had computed. Keeping them costs nothing: no writes."""

    cached_tokens: int
    cache_write_tokens: int = 0


class ResponseUsage(BaseModel):
    input_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens: int
    output_tokens_details: CompletionTokensDetails = CompletionTokensDetails()
    total_tokens: int
    trm: TRMUsage


class ResponseError(BaseModel):
    code: Literal["server_error", "invalid_prompt"]
    message: str


class IncompleteDetails(BaseModel):
    reason: Literal["max_output_tokens"] = "max_output_tokens"


class ResponseBody(BaseModel):
    """One reply. What the request set is told again, as it was decoded; boxed_answer: as in chat's choices."""

    id: str
    object: Literal["response"] = "response"
    created_at: int
    completed_at: int | None = None
    status: Literal["in_progress", "completed", "incomplete", "failed"] = "in_progress"
    error: ResponseError | None = None
    incomplete_details: IncompleteDetails | None = None
    model: str
    output: list[OutputMessage | OutputCall] = []
    boxed_answer: str | None = None
    usage: ResponseUsage | None = None
    instructions: str | None
    temperature: float
    top_p: float
    max_output_tokens: int | None
    text: dict[str, Any]
    reasoning: dict[str, Any]
    tools: list[dict[str, Any]]
    tool_choice: str | dict[str, Any]
    parallel_tool_calls: bool
    metadata: dict[str, str]
    user: str | None
    safety_identifier: str | None
    prompt_cache_key: str | None
    background: Literal[False] = False
    previous_response_id: None = None
    service_tier: Literal["default"] = "default"
    store: Literal[False] = False
    truncation: Literal["disabled"] = "disabled"
