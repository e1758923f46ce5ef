"""Bodies of /api/chat, /api/tags, /api/show and /api/version: Ollama's, each conversation also said as a chat request.

How a model is kept in memory is the server's to say: hints about that are taken and change nothing.
"""

import json
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, Field, WithJsonSchema
from pydantic_core import PydanticCustomError

from server.schemas.chat import ChatRequest
from server.schemas.common import (
    Body,
    Integer,
    JsonObjectFormat,
    JsonSchema,
    JsonSchemaFormat,
    NothingInIt,
    ResponseFormat,
    or_say,
)
from server.schemas.messages import (
    AssistantMessage,
    CalledFunction,
    ChatMessage,
    FunctionName,
    SystemMessage,
    TextPart,
    ToolCall,
    ToolMessage,
    UserMessage,
)
from server.schemas.tools import Tool


class OllamaFunction(Body):
    """A call that an earlier reply made. index and description are labels."""

    name: FunctionName
    arguments: dict[str, Any]
    index: Integer | None = None
    description: str | None = None


class OllamaToolCall(Body):
    id: str | None = None
    type: Literal["function"] | None = None
    function: OllamaFunction

    def as_chat(self) -> ToolCall:
        """The call in OpenAI's shape."""
        arguments = json.dumps(self.function.arguments, ensure_ascii=False)
        function = CalledFunction(name=self.function.name, arguments=arguments)
        return ToolCall(id=self.id or "", type="function", function=function)


class OllamaMessage(Body):
    """A turn. Thoughts in it the model does not see; tool_name and tool_call_id say whose result a tool's turn is."""

    role: Literal["system", "user", "assistant", "tool"]
    content: str | None = None
    tool_calls: list[OllamaToolCall] | None = None
    tool_name: str | None = None
    tool_call_id: str | None = None
    thinking: str | None = None
    images: Annotated[NothingInIt | None, or_say("this model reads text only; leave them out")] = None

    def as_chat(self) -> ChatMessage:
        """The same turn in OpenAI's shape."""
        content = [TextPart(type="text", text=self.content or "")]
        match self.role:
            case "system":
                return SystemMessage(role="system", content=content)
            case "user":
                return UserMessage(role="user", content=content)
            case "tool":
                return ToolMessage(
                    role="tool", content=content, tool_call_id=self.tool_call_id or "", name=self.tool_name
                )
        calls = [call.as_chat() for call in self.tool_calls or ()]
        return AssistantMessage(role="assistant", content=[*content], tool_calls=calls or None)


AS_MANY: dict[str, Any] = {"enum": [-1, -2, None]}


def _some(number: int | None) -> int | None:
    if number is not None and number < 1 and number not in AS_MANY["enum"]:
        raise PydanticCustomError("num_predict", "Input should be at least 1, or -1 for as many as there is room for")
    return number


class Options(Body):
    """temperature is 0 by default (Ollama's: 0.8), num_predict 512. The rest, from num_ctx on, are hints."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: Integer | None = None
    min_p: float | None = None
    seed: Integer | None = None
    num_predict: Annotated[
        Integer | None, AfterValidator(_some), WithJsonSchema({"anyOf": [{"type": "integer", "minimum": 1}, AS_MANY]})
    ] = None
    stop: Annotated[
        list[str] | None,
        BeforeValidator(
            lambda given: [given] if isinstance(given, str) else given, json_schema_input_type=str | list[str] | None
        ),
    ] = None
    repeat_penalty: float | None = Field(None, ge=0.01, le=10)
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    num_ctx: Integer | None = None
    num_batch: Integer | None = None
    num_gpu: Integer | None = None
    main_gpu: Integer | None = None
    num_keep: Integer | None = None
    num_thread: Integer | None = None
    low_vram: bool | None = None
    numa: bool | None = None
    use_mmap: bool | None = None
    use_mlock: bool | None = None


class OllamaChatRequest(Body):
    """A conversation, and how to reply to it.

    stream: true by default. format: "json", or a JSON schema. think: a word is chat's reasoning_effort; true and false
    change nothing, for the model thinks in its state, not in words. keep_alive: a hint.
    """

    model: str | None = None
    messages: list[OllamaMessage] = Field(min_length=1)
    tools: list[Tool] | None = None
    stream: bool | None = None
    format: Annotated[
        Literal["", "json"] | dict[str, Any] | None, or_say('should be "json" or a JSON schema, an object')
    ] = None
    options: Options | None = None
    think: Annotated[
        bool | Literal["low", "medium", "high", "max"] | None,
        or_say('should be a truth value, "low", "medium", "high" or "max"'),
    ] = None
    keep_alive: str | float | None = None

    def as_chat(self, room: int) -> ChatRequest:
        """The same in OpenAI's shape; a reply as long as it likes has `room` tokens."""
        options = self.options or Options()
        format_: ResponseFormat | None = None
        if isinstance(self.format, dict):
            described = JsonSchema(name="output", schema=self.format)
            format_ = JsonSchemaFormat(type="json_schema", json_schema=described)
        elif self.format:
            format_ = JsonObjectFormat(type="json_object")
        return ChatRequest.model_construct(
            model=self.model,
            messages=[message.as_chat() for message in self.messages],
            tools=self.tools,
            response_format=format_,
            reasoning_effort=self.think if isinstance(self.think, str) else None,
            max_tokens=room if options.num_predict in (-1, -2) else options.num_predict,
            temperature=options.temperature,
            top_p=options.top_p,
            top_k=options.top_k,
            min_p=options.min_p,
            seed=options.seed,
            stop=options.stop,
            repetition_penalty=options.repeat_penalty,
            presence_penalty=options.presence_penalty,
            frequency_penalty=options.frequency_penalty,
        )


class OllamaShowRequest(Body):
    """verbose: nothing is left out without it either."""

    model: str
    verbose: bool | None = None


class OllamaDetails(BaseModel):
    """parameter_size: numbers in the weight files. quantization_level: what the model decodes in."""

    parent_model: Literal[""] = ""
    format: Literal["safetensors"] = "safetensors"
    family: Literal["trm"] = "trm"
    families: list[Literal["trm"]] = ["trm"]
    parameter_size: str
    quantization_level: str


class OllamaModel(BaseModel):
    """modified_at: when it was loaded. size: bytes of its weight files, the backbone's included. digest: of them."""

    name: str
    model: str
    modified_at: str
    size: int
    digest: str
    details: OllamaDetails


class OllamaModels(BaseModel):
    models: list[OllamaModel]


class OllamaShown(BaseModel):
    """template: of chats, in Jinja."""

    modified_at: str
    details: OllamaDetails
    template: str
    capabilities: list[Literal["completion", "tools"]]
    model_info: dict[str, str | int]


class OllamaVersion(BaseModel):
    """Of this package, not of an Ollama."""

    version: str


class OllamaReply(BaseModel):
    """Durations are nanoseconds. load_duration is 0: models are loaded before there are requests.

    prompt_eval_duration: from when a place was free to the first token; eval_duration: from there to the last one.
    """

    model: str
    created_at: str
    message: dict[str, Any]
    done: Literal[True] = True
    done_reason: Literal["stop", "length"]
    total_duration: int
    load_duration: int = 0
    prompt_eval_count: int
    prompt_eval_duration: int
    eval_count: int
    eval_duration: int


class OllamaErrorBody(BaseModel):
    """How errors look to Ollama's clients."""

    error: str
