r"""The box of a reply: `\boxed{72}`, and what people write instead of it."""

import re
from typing import Literal, NamedTuple

from trm.answers.spelling import tidy


class Boxed(NamedTuple):
    """The answer of one reply; `value` is None exactly when `outcome` is not "boxed"."""

    value: str | None
    outcome: Literal["boxed", "truncated", "missing"]


def boxed(answer: str) -> str:
    """A final answer in its box."""
    return rf"\boxed{{{answer}}}"


# One backslash is enough to match, so the doubled one of an over-escaped reply matches too.
_UNBRACED = re.compile(
    r"(\\(?:boxed|fbox))(?:[ \t]*([-+\u2212]?\\?\$?[\d.,:/]*\d)(?![\w^{])|[ \t]+([A-Z])\b)",
)
_EMPTY = re.compile(r"\\(?:boxed|fbox)\s*\{(?:[\s~]|\\[,;:! ]|\\q?quad(?![a-zA-Z]))*\}")
_OPENING = re.compile(r"\\(?:boxed|fbox)\s*(?:\{|\Z)")
_BRACE = re.compile(r"\\[\\{}]|[{}]")  # escaped braces match whole, and count for nothing


def find_boxed(text: str) -> Boxed:
    r"""The raw inside, stripped, of the last complete box of a reply that holds more than blanks and full stops.

    "truncated": no such box, but one that never closes; "missing": neither. `\fbox`, `\\boxed` and
    `\boxed {18}` count. Without braces a box takes one number (`\boxed 18`, `\boxed -3/4`) or capital letter
    (`\boxed A`) from the same line; other words are prose about boxes. Of nested boxes the innermost speaks.
    """
    text = _EMPTY.sub("", _UNBRACED.sub(r"\1{\2\3}", text))
    # An innermost box closes before the next one opens, so each piece is read once, whatever the nesting.
    insides = [_inside(piece) for piece in _OPENING.split(text)[1:]]
    for inside in reversed(insides):
        if inside and tidy(inside):
            return Boxed(inside, "boxed")
    return Boxed(None, "truncated" if None in insides else "missing")


def _inside(piece: str) -> str | None:
    r"""What precedes the brace that closes the box, or None if it stays open.

    A box that would stay open may close with a backslash too many, `\boxed{18\}`.
    """
    depth, escaped, slip = 1, 0, None
    for brace in _BRACE.finditer(piece):
        if brace[0] == "{":
            depth += 1
        elif brace[0] == "}":
            depth -= 1
            if depth == 0:
                return piece[: brace.start()].strip()
        elif brace[0] == r"\{":
            escaped += 1
        elif brace[0] == r"\}":
            escaped -= 1
            if escaped < 0 and slip is None and depth == 1:
                slip = brace.start()
    return None if slip is None else piece[:slip].strip()


def extract_boxed(text: str) -> str | None:
    """The raw inside of the last non-empty box of a whole reply, or None."""
    return find_boxed(text).value
