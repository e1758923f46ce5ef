"""What choices say of their tokens, from the engine's numbers: OpenAI's two `logprobs`, and our `trace`.

Tokens that spell a stop string are there though the text stops before them: they were decoded, and a stream cannot
know them when it sends them.
"""

from collections.abc import Sequence
from typing import Any

from server.schemas.chat import ChoiceLogprobs, ContentLogprob, TokenLogprob, TracedToken
from server.schemas.completions import CompletionLogprobs
from server.token_bytes import TokenBytes
from trm.chat import ChatFormat
from trm.engine.detokenizer import TextStream
from trm.engine.request import Candidates, TokenLogprobs, TokenTrace

LEAST_LOGPROB = -9999.0  # OpenAI's stand-in for minus infinity, which JSON cannot hold


Scored = Sequence[tuple[int, TokenLogprobs]]
"""Token ids, each with what the engine found."""


def choice_logprobs(token_bytes: TokenBytes, tokens: Scored) -> ChoiceLogprobs:
    """What a chat choice says of some tokens."""
    content = []
    for id_, found in tokens:
        top = _candidates(token_bytes, found.top)
        spelt = _spelt(token_bytes, id_)
        content.append(ContentLogprob(**spelt, logprob=_finite(found.logprob), top_logprobs=top))
    return ChoiceLogprobs(content=content)


def choice_trace(token_bytes: TokenBytes, tokens: Sequence[tuple[int, TokenTrace]]) -> list[TracedToken]:
    """The steps behind some tokens."""
    return [
        TracedToken(**_spelt(token_bytes, id_), steps=[_candidates(token_bytes, step) for step in trace])
        for id_, trace in tokens
    ]


class Offsets:
    """Where in a reply's text its tokens begin; ask for each of them in turn."""

    def __init__(self, chat: ChatFormat, token_bytes: TokenBytes) -> None:
        self._text = TextStream(chat)
        self._token_bytes = token_bytes
        self._length = 0

    def next(self, token_id: int) -> int:
        """Where the next token begins. The parts of a character all begin where it does, the bytes of a run too."""
        start, text = self._length, self._text.push(token_id)
        self._length += len(text)
        own = (self._token_bytes(token_id) or b"").decode(errors="replace")
        return self._length - len(own) if own and text.endswith(own) else start


def completion_logprobs(token_bytes: TokenBytes, offsets: Offsets, tokens: Scored) -> CompletionLogprobs:
    """What a completion's choice says of some tokens. Of those that are spelt alike the likeliest is told."""
    said = CompletionLogprobs(tokens=[], token_logprobs=[], top_logprobs=[], text_offset=[])
    for id_, found in tokens:
        likeliest: dict[str, float] = {}
        for rival, logprob in (*found.top, (id_, found.logprob)):
            likeliest.setdefault(token_bytes.spell(rival), _finite(logprob))
        said.tokens.append(token_bytes.spell(id_))
        said.token_logprobs.append(_finite(found.logprob))
        said.top_logprobs.append(likeliest)
        said.text_offset.append(offsets.next(id_))
    return said


def _candidates(token_bytes: TokenBytes, candidates: Candidates) -> list[TokenLogprob]:
    return [TokenLogprob(**_spelt(token_bytes, id_), logprob=_finite(logprob)) for id_, logprob in candidates]


def _spelt(token_bytes: TokenBytes, id_: int) -> dict[str, Any]:
    spelt = token_bytes(id_)
    if spelt is None:
        return {"token": "", "bytes": None}
    return {"token": spelt.decode(errors="replace"), "bytes": list(spelt)}


def _finite(logprob: float) -> float:
    return max(logprob, LEAST_LOGPROB)
