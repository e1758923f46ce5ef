"""Bodies of POST /v1/chat/completions."""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, Field, SerializerFunctionWrapHandler, model_serializer

from server.schemas.common import Account, Body, Effort, Generation, Integer, NothingInIt, UsageBody, or_say
from server.schemas.messages import SYSTEM_ROLES, ChatMessage
from server.schemas.rules import Rule, at_most_one, needs_true
from server.schemas.tools import Tool, ToolChoice
from trm.chat import Work
from trm.engine.request import MAX_TOP_LOGPROBS, MAX_TRACE, FinishReason

WorkOfMessages = Annotated[
    Work | None, Field(description="how much work the reply shows; not together with a system message of one's own")
]
WORK_IS_THE_SYSTEM_PROMPT = Rule(
    "work",
    "work puts its own system prompt in front of the messages; leave it out, or leave your system message out",
    lambda body: body.work is None or not any(message.role in SYSTEM_ROLES for message in body.messages or ()),
    {},  # a condition on the items of a list is more than tools can make requests from; the field says it in words
)


class ChatReasoning(Body):
    """The other dialect of reasoning_effort. Its effort goes before what else says how deep to think."""

    effort: Effort | None = None


class ChatRequest(Generation, Account):
    """work: what the reply shows before its answer; this puts a system prompt in front.

    include_reasoning: tell in words what the recursion changed its mind about. logprobs: return each token's log
    probability. top_logprobs, which needs it: and those of this many of the likeliest tokens. trace: return this many
    of the likeliest tokens after every supervision step behind each token.
    """

    rules: ClassVar[tuple[Rule, ...]] = (
        *Generation.rules,
        at_most_one("max_tokens", "max_completion_tokens", param="max_tokens"),
        needs_true("top_logprobs", "logprobs"),
        WORK_IS_THE_SYSTEM_PROMPT,
    )

    messages: list[ChatMessage] = Field(min_length=1)
    work: WorkOfMessages = None
    max_completion_tokens: Integer | None = Field(None, ge=1)
    tools: list[Tool] | None = None
    tool_choice: ToolChoice = None
    parallel_tool_calls: bool | None = None
    reasoning: ChatReasoning | None = None
    include_reasoning: bool | None = None
    logprobs: bool | None = None
    top_logprobs: Integer | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS)
    trace: Integer | None = Field(None, ge=1, le=MAX_TRACE)

    # Of OpenAI's, what changes nothing here. Other values ask for what there is not.
    modalities: Annotated[
        Annotated[list[Literal["text"]], Field(min_length=1, max_length=1)] | None,
        or_say("this model writes text only; leave it out"),
    ] = None
    verbosity: Annotated[Literal["medium"] | None, or_say("verbosity cannot be set; use work, or max_tokens")] = None
    audio: Annotated[None, or_say("this model writes text only; leave it out")] = None
    prediction: Annotated[None, or_say("a predicted reply cannot be used; leave it out")] = None
    web_search_options: Annotated[None, or_say("this server cannot search; leave it out")] = None
    functions: Annotated[NothingInIt | None, or_say("the old form of tools; use tools")] = None
    function_call: Annotated[Literal["none", "auto"] | None, or_say("the old form of tool_choice; use that")] = None

    @property
    def effort(self) -> Effort | None:
        return (self.reasoning and self.reasoning.effort) or self.reasoning_effort

    @property
    def effort_field(self) -> str:
        return "reasoning.effort" if self.reasoning and self.reasoning.effort else "reasoning_effort"


class SaidFunction(BaseModel):
    """arguments: JSON that fits the function's schema."""

    name: str
    arguments: str


class SaidToolCall(BaseModel):
    id: str
    type: Literal["function"] = "function"
    function: SaidFunction


class ReplyMessage(BaseModel):
    """Only what a client may send back as history. content is null where the reply only calls functions."""

    role: Literal["assistant"] = "assistant"
    content: str | None
    tool_calls: list[SaidToolCall] | None = None
    reasoning: str | None = None
    reasoning_content: str | None = Field(None, description="the same as reasoning, as some clients call it")

    @model_serializer(mode="wrap")
    def _without_what_there_is_not(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        said: dict[str, Any] = serialize(self)
        return {name: value for name, value in said.items() if value is not None or name == "content"}


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
    finish_reason: FinishReason | Literal["tool_calls"]
    boxed_answer: str | None


class ChatCompletion(BaseModel):
    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: UsageBody
