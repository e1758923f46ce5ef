"""Bounds the digits of the numbers in a JSON text, so that a small model does not write one digit after the other.

A literal that has its digits may only end, where the grammar lets it. Where it does not yet (a number above 0 that is
0.000 so far), only digits may follow behind which it could. So nothing here makes a grammar unsatisfiable. Knows
nothing of schemas; the grammar is a set of allowed tokens, as a number with one bit for each.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from decimal import Decimal
from enum import Enum, auto
from typing import NamedTuple

from trm.tools import OPENING

DIGITS = re.compile(rb"[0-9]*")


class Part(Enum):
    """Of a JSON text, as far as numbers go."""

    TEXT = auto()  # of no JSON: before a call
    OUTSIDE = auto()
    STRING = auto()
    ESCAPE = auto()  # behind a backslash
    WHOLE = auto()
    FRACTION = auto()
    EXPONENT = auto()


class Place(NamedTuple):
    """Where a text stops: in which part, and behind how many digits of it, or characters of a call's mark."""

    part: Part = Part.OUTSIDE
    digits: int = 0


ENOUGH = {
    Part.WHOLE: 19,  # a signed 64-bit integer
    Part.FRACTION: 20,  # a double from 0.0001 on; smaller ones have exponents
    Part.EXPONENT: 2,  # which no reader takes for infinite
}


def read(place: Place, text: bytes) -> Place:
    """The place behind `text`, which starts at `place`."""
    part, digits = place
    for byte in text:
        char = chr(byte)
        if part is Part.TEXT:
            digits = digits + 1 if char == OPENING[digits] else int(char == OPENING[0])
            part, digits = (Part.OUTSIDE, 0) if digits == len(OPENING) else (part, digits)
        elif part is Part.ESCAPE:
            part = Part.STRING
        elif part is Part.STRING:
            part = {"\\": Part.ESCAPE, '"': Part.OUTSIDE}.get(char, part)
        elif "0" <= char <= "9":
            part, digits = (Part.WHOLE, 1) if part is Part.OUTSIDE else (part, digits + 1)
        elif char == "." and part is Part.WHOLE:
            part, digits = Part.FRACTION, 0
        elif char in "eE" and part in (Part.WHOLE, Part.FRACTION):
            part, digits = Part.EXPONENT, 0
        elif not (char in "+-" and part is Part.EXPONENT):
            part, digits = Part.STRING if char == '"' else Part.OUTSIDE, 0
    return Place(part, digits)


class DigitTokens:
    """The tokens of a vocabulary that begin with digits."""

    def __init__(self, texts: Sequence[bytes | None]) -> None:
        self.texts = texts
        self.single = [token for token, text in enumerate(texts) if text and len(text) == 1 and text.isdigit()]
        longer = [bytearray(len(texts) // 8 + 1)]
        for token, text in enumerate(texts):
            match = DIGITS.match(text or b"")
            for more in range(match.end() if match else 0):
                if more == len(longer):
                    longer.append(bytearray(len(longer[0])))
                longer[more][token // 8] |= 1 << token % 8
        self.longer = [int.from_bytes(bits, "little") for bits in longer]
        """[n]: those that begin with more than n digits."""


class Digits:
    """How many digits the literals of one grammar may have: as many as its longest named number, and enough.

    named: numbers that replies must be able to hold, as the grammar writes them: with all digits and no exponent.
    """

    def __init__(self, tokens: DigitTokens, named: Iterable[int | float] = ()) -> None:
        self._tokens = tokens
        self._most = dict(ENOUGH)
        for number in named:
            whole, _, fraction = format(Decimal(repr(number)), "f").lstrip("-").partition(".")
            self._most[Part.WHOLE] = max(self._most[Part.WHOLE], len(whole))
            if len(fraction) > self._most[Part.FRACTION]:
                self._most[Part.FRACTION] = len(fraction) + 17  # the library may get a small double's last bit wrong

    def read(self, place: Place, token: int) -> Place:
        """The place behind `token`."""
        return read(place, self._tokens.texts[token] or b"")

    def bound(self, allowed: int, place: Place, after: Callable[[int], int]) -> int:
        """Those of the `allowed` tokens that do not make the literal at `place` too long. Never none.

        after: what the grammar allows behind one of them.
        """
        left = max(0, self._most.get(place.part, 0) - place.digits)
        longer = self._tokens.longer
        if place.part not in self._most or left >= len(longer):
            return allowed
        if kept := allowed & ~longer[left]:
            return kept
        ending = (token for token in self._tokens.single if allowed >> token & 1 and after(token) & ~longer[0])
        return sum(1 << token for token in ending) or allowed
