"""The wire: what request bodies may hold and what response bodies look like. Here, what several routes share.

Types are strict (no "5" for 5), a field that is not declared here is an error, and `null`
for an optional field means its default. Ranges of sampling parameters are checked where
they are defined, in `trm.engine.request.SamplingParams`.
"""

import contextlib
import re
from typing import Annotated, Any, ClassVar, Literal, LiteralString, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    model_validator,
)
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, PydanticCustomError, PydanticUndefined

from server.schemas.rules import Rule, at_most_one, needs_true

Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]


def _integral(value: Any) -> Any:
    """JSON knows one kind of number: 5.0 is an integer."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


Integer = Annotated[int, BeforeValidator(_integral)]
NothingInIt = Annotated[list[Any], Field(max_length=0)]


def or_say(message: LiteralString) -> WrapValidator:
    """Refuse what the field's type does not take with one message for all of it, at the field itself."""

    def check(value: Any, handler: ValidatorFunctionWrapHandler) -> Any:
        with contextlib.suppress(ValidationError):
            if type(taken := handler(value)) is type(value):  # Literal takes 0 for False
                return taken
        raise PydanticCustomError("field_type", message)

    return WrapValidator(check)


def one_of(kinds: dict[str, type[BaseModel]], key: str, described: Any = PydanticUndefined) -> BeforeValidator:
    """Reads the body that `key` names, so that an error's path needs no union in it.

    described: its type in the OpenAPI document, where that is another.
    """

    def read(value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        kind = value.get(key)
        if not isinstance(kind, str) or kind not in kinds:
            problem = PydanticCustomError("kind", "should be one of {known}", {"known": ", ".join(kinds)})
            raise ValidationError.from_exception_data(key, [{"type": problem, "loc": (key,), "input": kind}])
        return kinds[kind].model_validate(value)

    return BeforeValidator(read, json_schema_input_type=described)


def _fail_fast(schema: Any) -> None:
    """Let every list of a core schema stop at the first bad item: half a million errors take seconds to tell."""
    if isinstance(schema, dict):
        if schema.get("type") == "list":
            schema["fail_fast"] = True
        for part in schema.values():
            _fail_fast(part)
    elif isinstance(schema, list | tuple):
        for part in schema:
            _fail_fast(part)


class Body(BaseModel):
    """Base of everything that a client sends. A list in it is refused for its first bad item, the others unread."""

    rules: ClassVar[tuple[Rule, ...]] = ()

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    @model_validator(mode="after")
    def _obeys_rules(self) -> Self:
        for rule in self.rules:
            if not rule.holds(self):
                raise PydanticCustomError("rule", "{message}", {"param": rule.param, "message": rule.message})
        return self

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        schema = handler(source)
        _fail_fast(schema)
        return schema

    @classmethod
    def __get_pydantic_json_schema__(cls, core_schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        schema = handler.resolve_ref_schema(handler(core_schema))
        if conditions := [rule.schema for rule in cls.rules if rule.schema]:
            schema["allOf"] = conditions
        return schema


class Sampling(Body):
    """How every decoding route lets a token be chosen."""

    temperature: float | None = None
    seed: Integer | None = None
    supervision_steps: Integer | None = None
    halt_threshold: float | None = None
    halt_tolerance: float | None = None


class Decoding(Sampling):
    """How many replies, how long and how deep. max_tokens is clipped to the room that the prompt leaves."""

    rules: ClassVar[tuple[Rule, ...]] = (
        at_most_one("reasoning_effort", "supervision_steps", param="supervision_steps"),
    )

    n: Integer | None = Field(None, ge=1)
    max_tokens: Integer | None = Field(None, ge=1)
    reasoning_effort: Effort | None = None

    @property
    def effort(self) -> Effort | None:
        """The effort's name, in whatever dialect it was given."""
        return self.reasoning_effort

    @property
    def effort_field(self) -> str:
        """The field that it was given in."""
        return "reasoning_effort"


def _strings(stop: Any) -> Any:
    if isinstance(stop, str):
        return [stop]
    if stop is not None and not isinstance(stop, list):
        raise PydanticCustomError("stop_type", "Input should be a string or a list of strings")
    return stop


def _token_ids(bias: dict[str, float] | None) -> dict[str, float] | None:
    """One spelling per id, so that no two keys are the same token."""
    if not all(re.fullmatch("0|[1-9][0-9]{0,17}", key) for key in bias or ()):
        raise PydanticCustomError("token_id", 'Input should have token ids as keys, such as "42"')
    return bias


class TextFormat(Body):
    """No constraint."""

    type: Literal["text"]


class JsonObjectFormat(Body):
    """Any JSON object."""

    type: Literal["json_object"]


class JsonSchema(Body):
    """name and description are only labels. Replies follow the schema whether or not `strict` is set."""

    name: str = Field(pattern="^[a-zA-Z0-9_-]+$", max_length=64)
    description: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class JsonSchemaFormat(Body):
    """JSON that a schema describes."""

    type: Literal["json_schema"]
    json_schema: JsonSchema


class RegexFormat(Body):
    """Text that a regular expression matches as a whole. Ours, not OpenAI's."""

    type: Literal["regex"]
    regex: str = Field(min_length=1)


class ChoiceFormat(Body):
    """One of some strings. Ours, not OpenAI's."""

    type: Literal["choice"]
    choice: list[Annotated[str, Field(min_length=1)]] = Field(min_length=1)


_FORMATS: dict[str, type[BaseModel]] = {
    "text": TextFormat,
    "json_object": JsonObjectFormat,
    "json_schema": JsonSchemaFormat,
    "regex": RegexFormat,
    "choice": ChoiceFormat,
}
ResponseFormat = Annotated[
    TextFormat | JsonObjectFormat | JsonSchemaFormat | RegexFormat | ChoiceFormat,
    Field(discriminator="type"),
    one_of(_FORMATS, "type"),
]


Unpadded = Annotated[Literal[False] | None, or_say("chunks are not padded; leave it out")]


class StreamOptions(Body):
    """include_usage: a last chunk with the usage. continuous_usage_stats, which needs it: the usage so far in every
    chunk.
    """

    rules: ClassVar[tuple[Rule, ...]] = (needs_true("continuous_usage_stats", "include_usage"),)

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_obfuscation: Unpadded = None


class FullSampling(Sampling):
    """What OpenAI's decoding routes have alike, and vLLM's parameters.

    logit_bias: token ids, as strings, to numbers. `user` and `metadata` are labels of the caller's; OpenAI
    gives them no effect on the reply either.
    """

    model: str | None = None
    top_p: float | None = None
    top_k: Integer | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: Annotated[dict[str, float] | None, AfterValidator(_token_ids)] = None
    stop: Annotated[list[str] | None, BeforeValidator(_strings, json_schema_input_type=str | list[str] | None)] = None
    ignore_eos: bool | None = None
    stream: bool | None = None
    user: str | None = None
    metadata: dict[str, str] | None = None


class Generation(FullSampling, Decoding):
    """What chat and completions take. response_format: what the reply must look like."""

    rules: ClassVar[tuple[Rule, ...]] = (*Decoding.rules, needs_true("stream_options", "stream"))

    response_format: ResponseFormat | None = None
    stream_options: StreamOptions | None = None


class Account(Body):
    """Of OpenAI's newer routes, labels and what changes nothing here. Other values ask for what there is not."""

    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: Annotated[
        Literal["in_memory"] | None, or_say("prompts are kept in memory only; leave it out")
    ] = None
    prompt_cache_options: Annotated[None, or_say("there is one cache, and nothing to set; leave it out")] = None
    moderation: Annotated[None, or_say("this server does not moderate; leave it out")] = None
    store: Annotated[Literal[False] | None, or_say("replies are not stored; leave it out")] = None
    service_tier: Annotated[Literal["auto", "default"] | None, or_say("there is one tier of service; leave it out")] = (
        None
    )


class CompletionTokensDetails(BaseModel):
    """The recursion reasons in its state, not in tokens: reasoning_tokens is 0 at every effort."""

    reasoning_tokens: int = 0


class PromptTokensDetails(BaseModel):
    """cached_tokens: prompt tokens that another request had computed."""

    cached_tokens: int


class TRMUsage(BaseModel):
    """supervision_steps_mean: supervision steps per token of the reply.

    draft_tokens: tokens that the backbone proposed; accepted_tokens: those of them that the recursion chose.
    """

    supervision_steps_mean: float
    draft_tokens: int
    accepted_tokens: int


class UsageBody(BaseModel):
    """Tokens of the prompts, each counted once, and of all their samples."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    completion_tokens_details: CompletionTokensDetails = CompletionTokensDetails()
    trm: TRMUsage


class ErrorDetails(BaseModel):
    """param: the field that is wrong, if one is. code: the kind of error, if it has a name."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """How every error looks."""

    error: ErrorDetails
