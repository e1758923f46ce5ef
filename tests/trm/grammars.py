"""What the tests of grammars share: a vocabulary of single bytes, and whether a grammar takes a text."""

from typing import Any

import numpy as np

from trm.engine.grammar import CompiledGrammar, Form, GrammarCompiler
from trm.engine.request import Follow, Matcher

BYTES = GrammarCompiler([*(bytes([byte]) for byte in range(256)), None], 256)
ANYTHING = BYTES.compile(Form.json({}))


def nested(levels: int, keyword: str) -> dict[str, Any]:
    """An object with an object inside, and so on."""
    value: dict[str, Any] = {}
    for _ in range(levels):
        value = {keyword: value}
    return value


def allowed(follow: Follow, count: int) -> set[int]:
    bits = np.unpackbits(np.frombuffer(follow.mask, np.uint8), bitorder="little")
    assert not bits[count:].any()
    found = set(np.flatnonzero(bits).tolist())
    assert all(follow.allows(token) == (token in found) for token in range(count))
    return found


def begins(grammar: CompiledGrammar, text: str) -> Matcher | None:
    """A matcher behind the bytes of `text`, one token each, if the grammar takes them."""
    matcher = grammar.matcher(may_end=True)
    for byte in text.encode():
        if not matcher.follow().allows(byte):
            return None
        matcher.advance(byte)
    return matcher


def is_text(grammar: CompiledGrammar, text: str) -> bool:
    matcher = begins(grammar, text)
    return matcher is not None and matcher.follow().allows(256)
