"""What a chat choice says of its tokens, from the engine's numbers: OpenAI's `logprobs`, and our `trace`.

The end token is no content and is left out. Tokens that spell a stop string are there though the text stops before
them: they were decoded, and a stream cannot know them when it sends them.
"""

from collections.abc import Sequence
from typing import Any

from server.schemas.chat import ChoiceLogprobs, ContentLogprob, TokenLogprob, TracedToken
from server.token_bytes import TokenBytes
from trm.engine.request import Candidates, TokenLogprobs, TokenTrace

LEAST_LOGPROB = -9999.0  # OpenAI's stand-in for minus infinity, which JSON cannot hold


def choice_logprobs(
    token_bytes: TokenBytes, ids: Sequence[int], logprobs: Sequence[TokenLogprobs], end_id: int | None
) -> ChoiceLogprobs:
    """The log probabilities of `ids`, one for each but the end token `end_id`."""
    content = []
    for id_, found in zip(ids, logprobs, strict=True):
        if id_ != end_id:
            top = _candidates(token_bytes, found.top)
            spelt = _spelt(token_bytes, id_)
            content.append(ContentLogprob(**spelt, logprob=_finite(found.logprob), top_logprobs=top))
    return ChoiceLogprobs(content=content)


def choice_trace(
    token_bytes: TokenBytes, ids: Sequence[int], traces: Sequence[TokenTrace], end_id: int | None
) -> list[TracedToken]:
    """The steps behind `ids`, one trace for each but the end token `end_id`."""
    traced = []
    for id_, trace in zip(ids, traces, strict=True):
        if id_ != end_id:
            steps = [_candidates(token_bytes, step) for step in trace]
            traced.append(TracedToken(**_spelt(token_bytes, id_), steps=steps))
    return traced


def _candidates(token_bytes: TokenBytes, candidates: Candidates) -> list[TokenLogprob]:
    return [TokenLogprob(**_spelt(token_bytes, id_), logprob=_finite(logprob)) for id_, logprob in candidates]


def _spelt(token_bytes: TokenBytes, id_: int) -> dict[str, Any]:
    spelt = token_bytes(id_)
    if spelt is None:
        return {"token": "", "bytes": None}
    return {"token": spelt.decode(errors="replace"), "bytes": list(spelt)}


def _finite(logprob: float) -> float:
    return max(logprob, LEAST_LOGPROB)
