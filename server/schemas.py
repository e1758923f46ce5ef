"""The wire: what request bodies may hold and what response bodies look like. Nothing else.

Types are strict (no "5" for 5), a field that is not declared here is an error, and `null`
for an optional field means its default. Ranges of sampling parameters are checked where
they are defined, in `trm.engine.request.SamplingParams`.
"""

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field
from pydantic_core import PydanticCustomError

from trm.engine.request import MAX_TOP_LOGPROBS, FinishReason

Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]
Role = Literal["system", "developer", "user", "assistant"]
Outcome = Literal["boxed", "truncated", "missing"]


class Body(BaseModel):
    """Base of everything that a client sends."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class Decoding(Body):
    """What every decoding route takes. max_tokens is clipped to the room that the prompt leaves."""

    n: int | None = Field(None, ge=1)
    max_tokens: int | None = Field(None, ge=1)
    temperature: float | None = None
    seed: int | None = None
    reasoning_effort: Effort | None = None
    supervision_steps: int | None = None
    halt_threshold: float | None = None
    halt_tolerance: float | None = None


# Requests: chat


class TextPart(Body):
    type: Literal["text"]
    text: str


def _parts(content: Any) -> Any:
    """A string as its one text part, so that an error's path needs no union in it."""
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    if not isinstance(content, list):
        raise PydanticCustomError("content_type", "Input should be a string or a list of text parts")
    return content


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


class ChatMessage(Body):
    role: Role
    content: Annotated[
        list[TextPart], Field(min_length=1), BeforeValidator(_parts, json_schema_input_type=str | list[TextPart])
    ]

    @property
    def text(self) -> str:
        return "\n".join(part.text for part in self.content)


class StreamOptions(Body):
    include_usage: bool | None = None


class ChatRequest(Decoding):
    """Body of POST /v1/chat/completions.

    logit_bias: token ids, as strings, to numbers. logprobs asks for each token's log probability, and
    top_logprobs, which needs it, for those of so many of the likeliest tokens.
    `user` and `metadata` are labels of the caller's; OpenAI gives them no effect on the reply either.
    """

    messages: list[ChatMessage] = Field(min_length=1)
    model: str | None = None
    max_completion_tokens: int | None = Field(None, ge=1)
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: Annotated[dict[str, float] | None, AfterValidator(_token_ids)] = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS)
    stop: Annotated[
        list[str] | None,
        Field(max_length=16),
        BeforeValidator(_strings, json_schema_input_type=str | list[str] | None),
    ] = None
    ignore_eos: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None
    metadata: dict[str, str] | None = None


# Requests: solve


def _questions(question: Any) -> Any:
    questions = question if isinstance(question, list) else [question]
    if not all(isinstance(text, str) for text in questions):
        raise PydanticCustomError("question_type", "Input should be a string or a list of strings")
    if not questions or not all(text.strip() for text in questions):
        raise PydanticCustomError("question_empty", "Input should hold at least one question, and none that is empty")
    return question


class SolveRequest(Decoding):
    """Body of POST /solve."""

    question: Annotated[str | list[str], BeforeValidator(_questions)]


# Responses


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
    """Tokens of one prompt, counted once, and of all its samples."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    completion_tokens_details: CompletionTokensDetails = CompletionTokensDetails()
    trm: TRMUsage


class ReplyMessage(BaseModel):
    """Only what a client may send back as history."""

    role: Literal["assistant"] = "assistant"
    content: str


class TokenLogprob(BaseModel):
    """token: its bytes as text, U+FFFD for what is not a whole character. bytes: null for an id without a token."""

    token: str
    logprob: float
    bytes: list[int] | None


class ContentLogprob(TokenLogprob):
    """A token of the reply. top_logprobs: the likeliest tokens in its place, best first."""

    top_logprobs: list[TokenLogprob]


class ChoiceLogprobs(BaseModel):
    """Log probabilities under the model's own logits, before penalties and temperature. refusal is OpenAI's."""

    content: list[ContentLogprob]
    refusal: None = None


class ChatChoice(BaseModel):
    index: int
    message: ReplyMessage
    logprobs: ChoiceLogprobs | None
    finish_reason: FinishReason
    boxed_answer: str | None


class ChatCompletion(BaseModel):
    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: UsageBody


class ModelBody(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "qwen-trm"
    max_model_len: int


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelBody]


class SolveResult(BaseModel):
    """One question's answer. `answer` and `boxed` are null exactly when `outcome` is not "boxed"."""

    answer: str | None
    outcome: Outcome
    boxed: str | None
    solution: str
    votes: dict[str, int]
    agreement: float
    finish_reason: FinishReason
    usage: UsageBody


class SolveResults(BaseModel):
    results: list[SolveResult]


class StatusBody(BaseModel):
    status: str


class VersionBody(BaseModel):
    version: str
    model: str
    torch: str
