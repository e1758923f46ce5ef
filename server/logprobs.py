"""OpenAI's two `logprobs` objects, of a chat choice and of a completion's, from the engine's numbers.

Tokens that spell a stop string are there though the text stops before them: they were decoded, and a stream cannot
know them when it sends them.
"""

from collections.abc import Sequence

from server.schemas.chat import ChoiceLogprobs, ContentLogprob, TokenLogprob
from server.schemas.completions import CompletionLogprobs
from server.token_bytes import TokenBytes
from trm.chat import ChatFormat
from trm.engine.detokenizer import TextStream
from trm.engine.request import TokenLogprobs

LEAST_LOGPROB = -9999.0  # OpenAI's stand-in for minus infinity, which JSON cannot hold


Scored = Sequence[tuple[int, TokenLogprobs]]
"""Token ids, each with what the engine found."""


def choice_logprobs(token_bytes: TokenBytes, tokens: Scored) -> ChoiceLogprobs:
    """What a chat choice says of some tokens."""
    content = []
    for id_, found in tokens:
        top = [_token(token_bytes, *pair) for pair in found.top]
        content.append(ContentLogprob(**_token(token_bytes, id_, found.logprob).model_dump(), top_logprobs=top))
    return ChoiceLogprobs(content=content)


class Offsets:
    """Where in a reply's text its tokens begin; ask for each of them in turn."""

    def __init__(self, chat: ChatFormat) -> None:
        self._text = TextStream(chat)
        self._length = 0

    def next(self, token_id: int) -> int:
        """Where the next token begins. The parts of a character all begin where it does."""
        start = self._length
        self._length += len(self._text.push(token_id))
        return start


def completion_logprobs(token_bytes: TokenBytes, offsets: Offsets, tokens: Scored) -> CompletionLogprobs:
    """What a completion's choice says of some tokens. Of those that are spelt alike the likeliest is told."""
    said = CompletionLogprobs(tokens=[], token_logprobs=[], top_logprobs=[], text_offset=[])
    for id_, found in tokens:
        likeliest: dict[str, float] = {}
        for rival, logprob in (*found.top, (id_, found.logprob)):
            likeliest.setdefault(token_bytes.spell(rival), max(logprob, LEAST_LOGPROB))
        said.tokens.append(token_bytes.spell(id_))
        said.token_logprobs.append(max(found.logprob, LEAST_LOGPROB))
        said.top_logprobs.append(likeliest)
        said.text_offset.append(offsets.next(id_))
    return said


def _token(token_bytes: TokenBytes, id_: int, logprob: float) -> TokenLogprob:
    spelt = token_bytes(id_)
    return TokenLogprob(
        token="" if spelt is None else spelt.decode(errors="replace"),
        logprob=max(logprob, LEAST_LOGPROB),
        bytes=None if spelt is None else list(spelt),
    )
