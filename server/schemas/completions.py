"""Bodies of POST /v1/completions."""

from typing import Annotated, Literal

from pydantic import BaseModel, Field

from server.schemas.common import Generation, Integer, UsageBody, or_say
from trm.engine.request import MAX_TOP_LOGPROBS, FinishReason

Text = Annotated[str, Field(min_length=1)]
TokenId = Annotated[Integer, Field(ge=0)]
TokenIds = Annotated[list[TokenId], Field(min_length=1)]
Prompt = Text | TokenIds | Annotated[list[Text], Field(min_length=1)] | Annotated[list[TokenIds], Field(min_length=1)]


class CompletionRequest(Generation):
    """logprobs: return each token's log probability, and those of this many of the likeliest tokens in its place.

    echo, suffix and best_of are accepted only with values that change nothing.
    """

    prompt: Annotated[
        Prompt, or_say("Input should be a text, a list of token ids, or a list of either, none of them empty")
    ]
    logprobs: Integer | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS)
    echo: Annotated[Literal[False] | None, or_say("the prompt cannot be echoed; leave it out")] = None
    suffix: Annotated[Literal[""] | None, or_say("text cannot be inserted before a suffix; leave it out")] = None
    best_of: Annotated[Literal[1] | None, or_say("samples are not ranked; use n instead")] = None

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        """Each prompt, a text or token ids."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        return self.prompt if isinstance(self.prompt[0], (str, list)) else [self.prompt]


class CompletionLogprobs(BaseModel):
    """Log probabilities under the model's own logits, before penalties and temperature.

    tokens: their text, or `bytes:\\xc3` for what is not whole characters. top_logprobs: the likeliest in each one's
    place, best first, and the token itself. text_offset: where in the choice's text each one begins.
    """

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class CompletionChoice(BaseModel):
    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: FinishReason
    boxed_answer: str | None


class Completion(BaseModel):
    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: UsageBody
