"""Grammars that replies must follow: a JSON schema, a regular expression, a choice of strings.

Compiles them, and says token by token what may follow. llguidance does the work; nothing else here
knows it. Refuses to interpret schemas: what the library does not implement is a BadRequest with its
reason. A mask holds every token that continues some text of the grammar, however the text is cut
into tokens, and the end token where the text is whole; a token without text is never in it.
"""

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from decimal import Decimal
from functools import lru_cache
from typing import Any

from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper, regex_to_lark

from trm.engine.request import Follow
from trm.errors import BadRequest

MAX_SOURCE_CHARS = 2**16
MAX_CACHED = 16  # grammars; each may hold as many lexer states as the limit says, of about 1 kB
MAX_MULTIPLE = 10_000  # the library needs a state for every remainder, and no limit of its own stops it in time
LIMITS = LLParserLimits(max_lexer_states=50_000, verbose_errors=False)
SPACE = {"x-guidance": {"whitespace_pattern": " ?"}}  # at most one: a small model would go on with spaces for ever
HEAD = (
    '%llguidance {"no_forcing": true}\nstart: '  # forced text would come in the tokenizer's cut, which may be special
)


class GrammarCompiler:
    """Compiles grammars for one tokenizer. Thread-safe; equal grammars are compiled once, lately used ones kept.

    token_bytes: the bytes of every token id of the model, None for what is no text. Slow to make for a large
    vocabulary, and it keeps other threads waiting.
    """

    def __init__(self, token_bytes: Sequence[bytes | None], end_id: int) -> None:
        self._tokenizer = LLTokenizer(TokenizerWrapper(_Vocabulary(token_bytes, end_id)))
        self._compiled = lru_cache(MAX_CACHED)(self._compile)

    def json_schema(self, schema: Mapping[str, Any]) -> "CompiledGrammar":
        """JSON that `schema` describes, on one line. Raises BadRequest where it cannot be served."""
        if math.lcm(*_multiples(schema)) > MAX_MULTIPLE:
            raise _refused(f"the least common multiple of its multipleOf values is above {MAX_MULTIPLE}")
        return self._compiled("%json " + json.dumps({**schema, **SPACE}))

    def regex(self, pattern: str) -> "CompiledGrammar":
        """Text that all of `pattern` matches, in the syntax of Rust's regex crate, so without look-around."""
        if (len(pattern) - len(pattern.rstrip("\\"))) % 2:
            raise _refused("the regular expression ends in a lone backslash")
        return self._compiled(f"/{regex_to_lark(pattern)}/")

    def choice(self, options: Sequence[str]) -> "CompiledGrammar":
        """One of `options`, as it is."""
        return self.regex("|".join(map(re.escape, options)))

    def _compile(self, source: str) -> "CompiledGrammar":
        if len(source) > MAX_SOURCE_CHARS:
            raise _refused(f"the grammar has {len(source)} characters; the limit is {MAX_SOURCE_CHARS}")
        grammar = CompiledGrammar(self._tokenizer, HEAD + source)
        first = grammar.matcher(may_end=True).follow()
        if first.failure:
            raise _refused(first.failure)
        if first.complete:
            raise _refused("it allows only the empty text")
        return grammar


class CompiledGrammar:
    """What replies may look like.

    All its matchers share the states of one lexer, which grow with use up to a limit. A matcher that meets the
    limit starts the grammar afresh and goes on there, so that nobody's reply depends on what others have used up.
    """

    def __init__(self, tokenizer: LLTokenizer, source: str) -> None:
        self._tokenizer = tokenizer
        self._source = source
        self.end = 1 << tokenizer.eos_token  # the mask of the end token alone, as a number
        self.renew()
        if self.start.is_error():
            raise _refused(_reason(self.start))

    def renew(self) -> None:
        """Forget all states."""
        self.start = LLMatcher(self._tokenizer, self._source, log_level=0, limits=LIMITS)

    def matcher(self, may_end: bool) -> "GrammarMatcher":
        """For one reply; see `trm.engine.request`."""
        return GrammarMatcher(self, may_end)


class GrammarMatcher:
    """Walks one reply through its grammar, looking ahead along drafts; see `trm.engine.request`."""

    def __init__(self, grammar: CompiledGrammar, may_end: bool) -> None:
        self._grammar = grammar
        self._may_end = may_end
        self._reply: list[int] = []
        self._ahead: list[int] = []  # tokens behind the reply that were looked at last
        self._walked: list[tuple[LLMatcher, Follow]] = []  # after the reply, and after each of those

    def follow(self, draft: Sequence[int] = ()) -> Follow:
        """What may follow the reply and `draft`."""
        if not self._walked:
            self._walked.append(self._look(self._grammar.start.deep_copy(), self._reply))
        for place, token in enumerate(draft):
            if self._ahead[place : place + 1] != [token]:
                del self._ahead[place:], self._walked[place + 1 :]
                self._walked.append(self._step(self._walked[place][0], [*self._reply, *self._ahead, token]))
                self._ahead.append(token)
        return self._walked[len(draft)][1]

    def advance(self, token: int) -> None:
        """Add a token to the reply."""
        self.follow([token])
        self._reply.append(token)
        del self._ahead[0], self._walked[0]

    def _step(self, before: LLMatcher, tokens: Sequence[int]) -> tuple[LLMatcher, Follow]:
        after = before.deep_copy()
        after.consume_token(tokens[-1])
        return self._look(after, tokens)

    def _look(self, matcher: LLMatcher, tokens: Sequence[int]) -> tuple[LLMatcher, Follow]:
        """A matcher that has seen `tokens`, and what may follow them."""
        mask = matcher.compute_bitmask()
        if matcher.is_error():  # no token may follow, or the lexer that is shared with others is full
            self._grammar.renew()
            matcher = self._grammar.start.deep_copy()
            matcher.consume_tokens(list(tokens))
            mask = matcher.compute_bitmask()
        if matcher.is_error():
            return matcher, Follow(bytes(len(mask)), failure=_reason(matcher))
        allowed = int.from_bytes(mask, "little")
        if allowed == self._grammar.end:
            return matcher, Follow(mask, complete=True)
        if not self._may_end:
            mask = (allowed & ~self._grammar.end).to_bytes(len(mask), "little")
        return matcher, Follow(mask)


class _Vocabulary:
    """A tokenizer as the library wants to see it. It is never asked to tokenize, for nothing is forced."""

    bos_token_id = None

    def __init__(self, token_bytes: Sequence[bytes | None], end_id: int) -> None:
        self.tokens = [b"" if id_ == end_id else text or b"" for id_, text in enumerate(token_bytes)]
        self.eos_token_id = end_id

    def __call__(self, text: bytes) -> list[int]:
        raise NotImplementedError


def _multiples(schema: Any) -> Iterator[int]:
    """The numbers behind `multipleOf`, without their decimal point."""
    if isinstance(schema, list):
        for item in schema:
            yield from _multiples(item)
    elif isinstance(schema, Mapping):
        for key, value in schema.items():
            if key == "multipleOf" and isinstance(value, int | float) and not isinstance(value, bool):
                digits, exponent = Decimal(repr(value)).as_tuple()[1:]
                yield int("".join(map(str, digits))) * 10 ** max(0, int(exponent))
            else:
                yield from _multiples(value)


def _refused(reason: str) -> BadRequest:
    return BadRequest(f"response_format cannot be served: {reason}", param="response_format")


def _reason(matcher: LLMatcher) -> str:
    """The library's reason in one line, without the grammar that it quotes."""
    text = matcher.get_error().removesuffix("<non-verbose/>")
    if text.startswith("NoExtensionBias"):
        return "no token of this model may follow"
    text = re.sub(r"\n +\d+ \| .*", "", text, flags=re.DOTALL)  # the line of the grammar, with a mark under it
    text = re.sub(r"^at \d+\(\d+\): (failed to compile JSON schema: )?", "", text)
    text = re.sub(r"^.*\nerror: ", "", text, flags=re.DOTALL)  # what a regular expression is quoted before
    text = re.sub(r"\. Enable 'coerce_one_of' .*", "; use anyOf", text)  # an option that no client can set
    return " ".join(text.split())[:300]
