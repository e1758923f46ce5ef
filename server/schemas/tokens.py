"""Bodies of POST /tokenize and /detokenize."""

from typing import Annotated, ClassVar

from pydantic import BaseModel, Field

from server.schemas.chat import WORK_IS_THE_SYSTEM_PROMPT, WorkOfMessages
from server.schemas.common import Body, Integer
from server.schemas.messages import ChatMessage
from server.schemas.rules import Rule, at_least_one, at_most_one, needs
from server.schemas.tools import Tool


class TokenizeRequest(Body):
    """Either a prompt, as /v1/completions takes it, or messages, with their `work`, as /v1/chat/completions does.

    add_generation_prompt: whether to add the beginning of the reply after the messages; true by default.
    add_special_tokens: only false is accepted, since there are none. return_token_strs: return every token's text, too.
    """

    rules: ClassVar[tuple[Rule, ...]] = (
        at_most_one("prompt", "messages", param="prompt"),
        at_least_one("prompt", "messages"),
        needs("add_generation_prompt", "messages"),
        needs("work", "messages"),
        needs("tools", "messages"),
        WORK_IS_THE_SYSTEM_PROMPT,
        Rule(
            "add_special_tokens",
            "add_special_tokens: this model has none to add; leave it out",
            lambda body: body.add_special_tokens is not True,
            {"properties": {"add_special_tokens": {"enum": [None, False]}}},
        ),
    )

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[ChatMessage], Field(min_length=1)] | None = None
    tools: list[Tool] | None = None
    work: WorkOfMessages = None
    add_generation_prompt: bool | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None


class TokenizeResponse(BaseModel):
    """token_strs: each token's text, or `bytes:\\xc3` for what is not whole characters; null unless asked for."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class DetokenizeRequest(Body):
    model: str | None = None
    tokens: list[Annotated[Integer, Field(ge=0)]]


class DetokenizeResponse(BaseModel):
    """prompt: the text of the tokens, special ones by their names."""

    prompt: str
