"""The wire: what request bodies may hold and what response bodies look like. Here, what several routes share.

Types are strict (no "5" for 5), a field that is not declared here is an error, and `null`
for an optional field means its default. Ranges of sampling parameters are checked where
they are defined, in `trm.engine.request.SamplingParams`.
"""

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field
from pydantic_core import PydanticCustomError

Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]


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


class StreamOptions(Body):
    """include_usage: a last chunk with the usage. continuous_usage_stats, which needs it: the usage so far in every
    chunk.
    """

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class Generation(Decoding):
    """What OpenAI's decoding routes take besides.

    logit_bias: token ids, as strings, to numbers. `user` and `metadata` are labels of the caller's; OpenAI
    gives them no effect on the reply either.
    """

    model: str | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: Annotated[dict[str, float] | None, AfterValidator(_token_ids)] = None
    stop: Annotated[list[str] | None, BeforeValidator(_strings, json_schema_input_type=str | list[str] | None)] = None
    ignore_eos: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None
    metadata: dict[str, str] | None = None


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
