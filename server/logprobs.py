"""OpenAI's `logprobs` object of a chat choice, from the engine's numbers."""

from collections.abc import Sequence

from server.schemas.chat import ChoiceLogprobs, ContentLogprob, TokenLogprob
from server.token_bytes import TokenBytes
from trm.engine.request import TokenLogprobs

LEAST_LOGPROB = -9999.0  # OpenAI's stand-in for minus infinity, which JSON cannot hold


def choice_logprobs(
    token_bytes: TokenBytes, ids: Sequence[int], logprobs: Sequence[TokenLogprobs], end_id: int | None
) -> ChoiceLogprobs:
    """What is said of `ids`, `logprobs` one for each. The end token `end_id` is no content and is left out.

    Tokens that spell a stop string are there though the text stops before them: they were decoded, and a
    stream cannot know them when it sends them.
    """
    content = []
    for id_, found in zip(ids, logprobs, strict=True):
        if id_ != end_id:
            top = [_token(token_bytes, *pair) for pair in found.top]
            content.append(ContentLogprob(**_token(token_bytes, id_, found.logprob).model_dump(), top_logprobs=top))
    return ChoiceLogprobs(content=content)


def _token(token_bytes: TokenBytes, id_: int, logprob: float) -> TokenLogprob:
    spelt = token_bytes(id_)
    return TokenLogprob(
        token="" if spelt is None else spelt.decode(errors="replace"),
        logprob=max(logprob, LEAST_LOGPROB),
        bytes=None if spelt is None else list(spelt),
    )
