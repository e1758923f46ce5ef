"""Bodies of POST /v1/chat/completions."""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, Field
from pydantic_core import PydanticCustomError

from server.schemas.common import Body, Generation, Integer, UsageBody
from server.schemas.rules import Rule, at_most_one, needs_true
from trm.chat import ROLES, Work
from trm.engine.request import MAX_TOP_LOGPROBS, MAX_TRACE, FinishReason

Role = Literal["system", "developer", "user", "assistant"]
SYSTEM_ROLES = {role for role, rendered in ROLES.items() if rendered == "system"}


class TextPart(Body):
    type: Literal["text"]
    text: str


Parts = Annotated[list[TextPart], Field(min_length=1)]


def _parts(content: Any) -> Any:
    """A string as its one text part, so that an error's path needs no union in it."""
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    if not isinstance(content, list):
        raise PydanticCustomError("content_type", "Input should be a string or a list of text parts")
    return content


class ChatMessage(Body):
    role: Role
    content: Annotated[
        list[TextPart],
        Field(min_length=1, fail_fast=True),
        BeforeValidator(_parts, json_schema_input_type=str | Parts),
    ]

    @property
    def text(self) -> str:
        return "\n".join(part.text for part in self.content)

    @property
    def is_system(self) -> bool:
        return self.role in SYSTEM_ROLES


WorkOfMessages = Annotated[
    Work | None, Field(description="how much work the reply shows; not together with a system message of one's own")
]
WORK_IS_THE_SYSTEM_PROMPT = Rule(
    "work",
    "work puts its own system prompt in front of the messages; leave it out, or leave your system message out",
    lambda body: body.work is None or not any(message.is_system for message in body.messages or ()),
    {},  # a condition on the items of a list is more than tools can make requests from; the field says it in words
)


class ChatRequest(Generation):
    """work: what the reply shows before its answer; this puts a system prompt in front.

    logprobs: return each token's log probability. top_logprobs, which needs it: and those of this many of the
    likeliest tokens. trace: return this many of the likeliest tokens after every supervision step behind each token.
    """

    rules: ClassVar[tuple[Rule, ...]] = (
        *Generation.rules,
        at_most_one("max_tokens", "max_completion_tokens", param="max_tokens"),
        needs_true("top_logprobs", "logprobs"),
        WORK_IS_THE_SYSTEM_PROMPT,
    )

    messages: list[ChatMessage] = Field(min_length=1, fail_fast=True)
    work: WorkOfMessages = None
    max_completion_tokens: Integer | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: Integer | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS)
    trace: Integer | None = Field(None, ge=1, le=MAX_TRACE)


class ReplyMessage(BaseModel):
    """Only what a client may send back as history."""

    role: Literal["assistant"] = "assistant"
    content: str


class SpeltToken(BaseModel):
    """token: its bytes as text, U+FFFD for what is not a whole character. bytes: null for an id without a token."""

    token: str
    bytes: list[int] | None


class TokenLogprob(SpeltToken):
    logprob: float


class ContentLogprob(TokenLogprob):
    """A token of the reply. top_logprobs: the likeliest tokens in its place, best first."""

    top_logprobs: list[TokenLogprob]


class ChoiceLogprobs(BaseModel):
    """Log probabilities under the model's own logits, before penalties and temperature. refusal is OpenAI's."""

    content: list[ContentLogprob]
    refusal: None = None


class TracedToken(SpeltToken):
    """A token of the reply and its likeliest rivals, best first: after step 0, the backbone's own answer, and after
    each supervision step that was taken. The last step is the one that the token was chosen from.
    """

    steps: list[list[TokenLogprob]]


class ChatChoice(BaseModel):
    index: int
    message: ReplyMessage
    logprobs: ChoiceLogprobs | None = None
    trace: list[TracedToken] | None = None
    finish_reason: FinishReason
    boxed_answer: str | None


class ChatCompletion(BaseModel):
    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: UsageBody
