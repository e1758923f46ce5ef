"""Grammars that replies must follow: a JSON schema, a regular expression, a choice of strings, calls of tools.

Compiles them, and says token by token what may follow. llguidance does the work; nothing else here
knows it. What the library does not implement is a BadRequest with its reason. `trm.engine.schemas`
prepares schemas for it, and `trm.engine.digits` bounds the numbers in JSON. A mask holds every token
that continues some text of the grammar, however the text is cut into tokens, and the end token where
the text is whole; a token without text is never in it.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain
from typing import Any, Self

from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper, regex_to_lark

from trm.engine.digits import Digits, DigitTokens, Part, Place
from trm.engine.request import Follow
from trm.engine.schemas import Refused, check_depth, prepare
from trm.tools import BEFORE_ARGUMENTS, BEFORE_NAME, CLOSING, OPENING, Tools

MAX_SOURCE_CHARS = 2**16
MAX_BLAMED = 32  # functions that are tried one by one, to say which cannot be served
MAX_CACHED = 16  # grammars; each may hold as many lexer states as the limit says, of about 1 kB
LIMITS = LLParserLimits(max_lexer_states=50_000, verbose_errors=False)
SPACE = {"x-guidance": {"whitespace_pattern": " ?"}}  # at most one: a small model would go on with spaces for ever
UNNAMED = {
    "additionalProperties",
    "patternProperties",
    "unevaluatedProperties",
    "allOf",
    "anyOf",
    "oneOf",
    "$ref",
    "minProperties",
}
"""Keywords that may say something of properties that `properties` does not name."""
HEAD = (
    '%llguidance {"no_forcing": true}\nstart: '  # forced text would come in the tokenizer's cut, which may be special
)


@dataclass(frozen=True)
class Form:
    """What a text must look like. source: a JSON schema, or else a regular expression as the library writes it."""

    source: str
    is_schema: bool

    @classmethod
    def json(cls, schema: Mapping[str, Any]) -> Self:
        """JSON that `schema` describes, on one line."""
        check_depth(schema)
        try:
            return cls(json.dumps(schema, allow_nan=False), True)
        except ValueError:
            raise Refused("a number in it is infinite, or too long to be read") from None

    @classmethod
    def regex(cls, pattern: str) -> Self:
        """Text that all of `pattern` matches, in the syntax of Rust's regex crate, so without look-around."""
        if (len(pattern) - len(pattern.rstrip("\\"))) % 2:
            raise Refused("the regular expression ends in a lone backslash")
        return cls(f"/{regex_to_lark(pattern)}/", False)

    @classmethod
    def choice(cls, options: Sequence[str]) -> Self:
        """One of `options`, as it is."""
        return cls.regex("|".join(map(re.escape, options)))

    @classmethod
    def arguments(cls, parameters: Mapping[str, Any] | None) -> Self:
        """The arguments of a function; none that its parameters do not name, unless they say more of that."""
        schema = {**({"properties": {}} if parameters is None else parameters)}
        allowed = schema.setdefault("type", "object")
        if allowed != "object" and not (isinstance(allowed, list) and "object" in allowed):
            raise Refused("its parameters are not of type object")
        schema["type"] = "object"
        properties, required = schema.get("properties"), schema.get("required", [])
        are_all = isinstance(properties, dict) and isinstance(required, list) and {*map(str, required)} <= {*properties}
        if are_all and not UNNAMED & schema.keys():
            schema["additionalProperties"] = False
        return cls.json(schema)

    def rule(self) -> tuple[str, list[int | float]]:
        """What the library reads, and the numbers that a schema names."""
        if not self.is_schema:
            return self.source, []
        schema = json.loads(self.source)
        named = prepare(schema)
        return "%json " + json.dumps(schema | SPACE), named


@dataclass(frozen=True)
class Calls:
    """The calls that a reply may make: functions by name, with the form of their arguments."""

    functions: tuple[tuple[str, Form], ...]
    required: bool
    parallel: bool

    @classmethod
    def of(cls, tools: Tools) -> Self:
        """Raises Refused for parameters that are none."""
        functions = []
        for function in tools.callable:
            try:
                functions.append((function.name, Form.arguments(function.parameters)))
            except Refused as error:
                raise Refused(f"{function.name}: {error.reason}", "tools") from None
        return cls(tuple(functions), tools.required, tools.parallel)

    def source(self, answer: str | None, arguments: Sequence[str]) -> str:
        """What the library reads, from the rules of the answer, None for any text, and of each function's arguments."""
        opening, again = json.dumps(OPENING), json.dumps("\n" + OPENING)
        more = f" ({again} call)*" if self.parallel else ""
        either = "ANY | before" if answer is None else f"answer | {opening}"
        lines = [f"{opening if self.required else either} call{more}"]
        if not self.required:
            if answer is None:
                lines += [f"ANY: /(?s:.*)/ & ~/(?s:.*{OPENING}.*)/", f"before[lazy]: /(?s:.*)/ {opening}"]
            elif answer.startswith("%json"):
                lines.append(f"answer: {answer}")
            else:  # what begins as a call is never the answer
                lines += ["answer: ANSWER", f"ANSWER: {answer} & ~/(?s:{OPENING}.*)/"]
        lines.append(f"call: {' | '.join(f'call_{index}' for index in range(len(self.functions)))}")
        for index, ((name, _), rule) in enumerate(zip(self.functions, arguments, strict=True)):
            before, after = json.dumps(BEFORE_NAME + name + BEFORE_ARGUMENTS), json.dumps(CLOSING)
            lines += [f"call_{index}: {before} arguments_{index} {after}", f"arguments_{index}: {rule}"]
        return "\n".join(lines)


class GrammarCompiler:
    """Compiles grammars for one tokenizer. Thread-safe; equal grammars are compiled once, lately used ones kept.

    token_bytes: the bytes of every token id of the model, None for what is no text. Slow to make for a large
    vocabulary, and it keeps other threads waiting.
    """

    def __init__(self, token_bytes: Sequence[bytes | None], end_id: int) -> None:
        self._tokenizer = LLTokenizer(TokenizerWrapper(_Vocabulary(token_bytes, end_id)))
        self._digits = DigitTokens(token_bytes)
        self._compiled = lru_cache(MAX_CACHED)(self._compile)

    def compile(self, form: Form | None = None, tools: Tools | None = None) -> "CompiledGrammar":
        """Text of a form, or calls of tools in its place; with no form any text, and calls behind it.

        Raises Refused where it cannot be served.
        """
        if tools is None:
            return self._compiled(form, None)
        calls = Calls.of(tools)
        try:
            return self._compiled(form, calls)
        except Refused as error:
            for name, arguments in calls.functions[:MAX_BLAMED]:
                try:
                    self._compile(arguments, None)  # not to be kept
                except Refused as found:
                    raise Refused(f"{name}: {found.reason}", "tools") from None
            raise Refused(error.reason, "tools" if form is None else error.param) from None

    def _compile(self, form: Form | None, calls: Calls | None) -> "CompiledGrammar":
        forms = [*([form] if form else []), *(arguments for _, arguments in (calls.functions if calls else ()))]
        if (length := sum(len(each.source) for each in forms)) > MAX_SOURCE_CHARS:
            raise Refused(f"the grammar has {length} characters; the limit is {MAX_SOURCE_CHARS}")
        rules, named = zip(*(each.rule() for each in forms), strict=True)
        source = rules[0] if calls is None else calls.source(rules[0] if form else None, rules[-len(calls.functions) :])
        digits = Digits(self._digits, chain(*named)) if any(each.is_schema for each in forms) else None
        is_json = form.is_schema if form else calls is not None and calls.required
        field = "response_format" if calls is None or (form and not calls.required) else "tools"
        place = Place() if is_json else Place(Part.TEXT)
        grammar = CompiledGrammar(self._tokenizer, HEAD + source, digits, place, field)
        first = grammar.matcher(may_end=True).follow()
        if first.failure:
            raise Refused(first.failure)
        if first.complete:
            raise Refused("it allows only the empty text")
        return grammar


class CompiledGrammar:
    """What replies may look like. `digits` bounds the numbers in it, read from `place` on. `field` asks for it.

    All its matchers share the states of one lexer, which grow with use up to a limit. A matcher that meets the
    limit starts the grammar afresh and goes on there, so that nobody's reply depends on what others have used up.
    """

    def __init__(self, tokenizer: LLTokenizer, source: str, digits: Digits | None, place: Place, field: str) -> None:
        self.field = field
        self._tokenizer = tokenizer
        self._source = source
        self.digits = digits
        self.place = place
        self.end = 1 << tokenizer.eos_token  # the mask of the end token alone, as a number
        self.renew()
        if self.start.is_error():
            raise Refused(_reason(self.start))

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
        self._walked: list[tuple[LLMatcher, Place, Follow]] = []  # after the reply, and after each of those

    def follow(self, draft: Sequence[int] = ()) -> Follow:
        """What may follow the reply and `draft`."""
        if not self._walked:
            self._walked.append(self._look(self._grammar.start.deep_copy(), self._grammar.place, self._reply))
        for place, token in enumerate(draft):
            if self._ahead[place : place + 1] != [token]:
                del self._ahead[place:], self._walked[place + 1 :]
                self._walked.append(self._step(*self._walked[place][:2], [*self._reply, *self._ahead, token]))
                self._ahead.append(token)
        return self._walked[len(draft)][2]

    def advance(self, token: int) -> None:
        """Add a token to the reply."""
        self.follow([token])
        self._reply.append(token)
        del self._ahead[0], self._walked[0]

    def _step(self, before: LLMatcher, place: Place, tokens: Sequence[int]) -> tuple[LLMatcher, Place, Follow]:
        after = before.deep_copy()
        after.consume_token(tokens[-1])
        digits = self._grammar.digits
        return self._look(after, digits.read(place, tokens[-1]) if digits else place, tokens)

    def _look(self, matcher: LLMatcher, place: Place, tokens: Sequence[int]) -> tuple[LLMatcher, Place, Follow]:
        """A matcher that has seen `tokens`, which stop at `place`, and what may follow them."""
        mask = matcher.compute_bitmask()
        if matcher.is_error():  # no token may follow, or the lexer that is shared with others is full
            self._grammar.renew()
            matcher = self._grammar.start.deep_copy()
            matcher.consume_tokens(list(tokens))
            mask = matcher.compute_bitmask()
        if matcher.is_error():
            return matcher, place, Follow(bytes(len(mask)), failure=_reason(matcher))
        allowed = found = int.from_bytes(mask, "little")
        if self._grammar.digits:
            allowed = self._grammar.digits.bound(found, place, lambda token: _allowed_after(matcher, token))
        complete = allowed == self._grammar.end
        if not (self._may_end or complete):
            allowed &= ~self._grammar.end
        if allowed != found:
            mask = allowed.to_bytes(len(mask), "little")
        return matcher, place, Follow(mask, complete)


def _allowed_after(matcher: LLMatcher, token: int) -> int:
    after = matcher.deep_copy()
    after.consume_token(token)
    return int.from_bytes(after.compute_bitmask(), "little")


class _Vocabulary:
    """A tokenizer as the library wants to see it. It is never asked to tokenize, for nothing is forced."""

    bos_token_id = None

    def __init__(self, token_bytes: Sequence[bytes | None], end_id: int) -> None:
        self.tokens = [b"" if id_ == end_id else text or b"" for id_, text in enumerate(token_bytes)]
        self.eos_token_id = end_id

    def __call__(self, text: bytes) -> list[int]:
        raise NotImplementedError


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
