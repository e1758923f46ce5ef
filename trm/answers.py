r"""Find, read and compare final answers: the only definition of all three.

Owns the `\boxed{}` convention, from the GSM8K conversion that teaches it to the comparison that grades it.
Knows no model, prompt or server, and needs only the standard library.

Never guesses: a reply without a complete box has no answer, and what is not plainly one number stays text
(`7:30`, `3:4`, `5, 6`, `1,23`, `2 million`, `3x`, `1/0`). Numbers are exact; no float is ever made. Linear
time on any input. Only `convert_gsm8k` raises: ValueError, on a row without a final answer.
"""

import math
import re
import unicodedata
from fractions import Fraction
from typing import Literal, NamedTuple

# Longer answers, and numbers with more digits above or below the line, stay text. This bounds the work and
# avoids int()'s limit of 4300 digits. 400 digits make a decimal of at most 1730 characters (1/2**k has k
# places), so a canonical number is always short enough to be read again.
_MAX_CHARS = 2000
_MAX_DIGITS = 400
_MAX_PASSES = 8  # one rewrite may uncover another, as in \text{\textbf{18}}; deeper nests stay text


class Boxed(NamedTuple):
    """The answer of one reply; `value` is None exactly when `outcome` is not "boxed"."""

    value: str | None
    outcome: Literal["boxed", "truncated", "missing"]


def boxed(answer: str) -> str:
    """A final answer in its box."""
    return rf"\boxed{{{answer}}}"


_ANNOTATION = re.compile(r"<<([^<>]*)>>")  # GSM8K's calculator


def gsm8k_equations(answer: str) -> tuple[str, ...]:
    """What a GSM8K answer's calculator annotations work out, in order: `48/2=24` of `<<48/2=24>>`."""
    found = [text.strip() for text in _ANNOTATION.findall(answer)]
    return tuple(text for text in found if "=" in text and not text.endswith("="))


def convert_gsm8k(answer: str, keep_annotations: bool = False) -> str:
    r"""A GSM8K answer with its last line `#### 72` replaced by `\boxed{72}`.

    The final answer is copied as written. Calculator annotations (`<<48/2=24>>`) are removed unless kept.
    Raises ValueError if the last line holds no `####` or nothing after it.
    """
    if not keep_annotations:
        answer = _ANNOTATION.sub("", answer)
    body, mark, final = answer.rpartition("####")
    final = final.strip()
    if not mark:
        raise ValueError(f"GSM8K answer has no '####' before its final answer: …{answer[-80:]!r}")
    if not final or "\n" in final:
        raise ValueError(f"GSM8K answer needs one line after '####', got {final[:80]!r}")
    return body + boxed(final)


# One backslash is enough to match, so the doubled one of an over-escaped reply matches too.
_UNBRACED = re.compile(
    r"(\\(?:boxed|fbox))(?:[ \t]*([-+\u2212]?\\?\$?[\d.,:/]*\d)(?![\w^{])|[ \t]+([A-Z])\b)",
)
_EMPTY = re.compile(r"\\(?:boxed|fbox)\s*\{\s*\}")
_OPENING = re.compile(r"\\(?:boxed|fbox)\s*(?:\{|\Z)")
_BRACE = re.compile(r"\\[\\{}]|[{}]")  # escaped braces match whole, and count for nothing


def find_boxed(text: str) -> Boxed:
    r"""The raw inside, stripped, of the last complete non-empty box of a reply.

    "truncated": no such box, but one that never closes; "missing": neither. `\fbox`, `\\boxed` and
    `\boxed {18}` count. Without braces a box takes one number (`\boxed 18`, `\boxed -3/4`) or capital letter
    (`\boxed A`) from the same line; other words are prose about boxes. Of nested boxes the innermost speaks.
    """
    text = _EMPTY.sub("", _UNBRACED.sub(r"\1{\2\3}", text))
    # An innermost box closes before the next one opens, so each piece is read once, whatever the nesting.
    insides = [_inside(piece) for piece in _OPENING.split(text)[1:]]
    for inside in reversed(insides):
        if inside:
            return Boxed(inside, "boxed")
    return Boxed(None, "truncated" if None in insides else "missing")


def _inside(piece: str) -> str | None:
    """What precedes the brace that closes the box, or None if it stays open."""
    depth = 1
    for brace in _BRACE.finditer(piece):
        if brace[0] == "{":
            depth += 1
        elif brace[0] == "}":
            depth -= 1
            if depth == 0:
                return piece[: brace.start()].strip()
    return None


def extract_boxed(text: str) -> str | None:
    """The raw inside of the last non-empty box of a whole reply, or None."""
    return find_boxed(text).value


def is_correct(reply: str, gold: str) -> bool:
    """Whether the box of a whole reply equals `gold`, a bare answer or a GSM8K answer with its `####`."""
    value = extract_boxed(reply)
    return value is not None and normalize(value) == normalize(gold.rpartition("####")[2])


def canonical(answer: str) -> str:
    """One spelling per answer: integer, terminating decimal, else `a/b`, else the normalised text."""
    value = normalize(answer)
    if isinstance(value, str):
        return value
    rest, places = value.denominator, 0
    while (factor := math.gcd(rest, 10)) > 1:
        rest, places = rest // factor, places + 1
    if places == 0 or rest > 1:
        return str(value)
    digits = str(abs(value.numerator) * 10**places // value.denominator).rjust(places + 1, "0")
    return f"{'-' if value < 0 else ''}{digits[:-places]}.{digits[-places:]}"


def normalize(answer: str) -> Fraction | str:
    """The number that an answer plainly is, else its text: NFKC, casefolded, unwrapped, single-spaced.

    One number may carry a label before it (`x =`, `Total:`, `about`) and a unit after it; both are dropped,
    as are percent signs and currencies. Commas or single spaces group thousands, if every group fits.
    """
    text = " ".join(answer.split())
    if len(text) > _MAX_CHARS:
        return text.casefold()
    for _ in range(_MAX_PASSES):
        before, text = text, _plain(text)
        if text == before:
            break
    value = _number(text)
    return text if value is None else value


_N = r"(?:(?:[1-9]\d{0,2}(?:,\d{3})+|[1-9]\d{0,2}(?: \d{3})+|\d+)(?:\.\d*)?|\.\d+)"
_FRAC_PART = r" *(?:\{ *([-+]?[\d.,]+) *\}|(\d))"

_BEFORE_NFKC = [  # what NFKC would glue to the digits beside it: 10³ to 103, 1½ to 11/2, 101₂ to 1012
    (re.compile("[⁰¹²³⁴-⁹⁺⁻]+"), r"^{\g<0>}"),
    (re.compile("[₀-₉]+"), r"_{\g<0>}"),
    (re.compile("[¼-¾⅐-⅞]"), r" \g<0>"),
]
_REWRITES = [  # in this order; on casefolded text
    (re.compile(r"[\u2010\u2012\u2013\u2212]"), "-"),
    (re.compile(r"\u2044"), "/"),
    (re.compile(r"\\{2,}"), r"\\"),
    (re.compile(r"\{,\}"), ","),
    (re.compile(r"\\!"), ""),
    (re.compile(r"\^ *\{ *\\circ *\}|\^? *\\circ(?![a-z])"), "°"),
    (re.compile(r"\\(?:times|cdot)(?![a-z])|[\u00b7\u00d7\u22c5]"), "*"),
    (re.compile(r"\\approx(?![a-z])"), "≈"),
    (re.compile(r"\\[dtc]frac"), r"\\frac"),
    (re.compile(r"\\[,;: ()\[\]]|\\?[$%]|[€£¥₹~]|\\(?:left|right|displaystyle)(?![a-z])"), " "),
    (re.compile(r"\\(?:(?:text|math)[a-z]*|mbox|emph|operatorname) ?\{([^{}]*)\}"), r" \1 "),
    (re.compile(rf"\\frac{_FRAC_PART}{_FRAC_PART}"), r" \1\2/\3\4 "),
    (re.compile(r"\^ *\{ *([-+]?\w+) *\}"), r"^\1"),
]


def _plain(text: str) -> str:
    """Casefolded text without the LaTeX and Unicode dress that changes no meaning."""
    for pattern, replacement in _BEFORE_NFKC:
        text = pattern.sub(replacement, text)
    text = unicodedata.normalize("NFKC", text).casefold()
    for pattern, replacement in _REWRITES:
        text = pattern.sub(replacement, text)
    text = " ".join(text.split()).rstrip(" .,;")
    alone = re.fullmatch(r"\(([^(),]*)\)", text)  # (A) and (18), but no tuple
    return alone[1].strip() if alone else text


_LABEL = (
    r"(?:[a-z][a-z_ ()']*[=≈] ?|[a-z][a-z_ ()']*[a-z] ?: ?|≈ ?"
    r"|(?:approximately|approx\.?|about|around|roughly|(?:the )?(?:final )?answer is) )"
)
# Short words are units only if listed, and single letters only apart from the number: 3xy and 5m are algebra.
_SQUARED = r"(?: ?\^-?[1-9])?"
_UNIT = (
    r"(?: ?°(?: ?[cf])?)?"
    rf"(?: ?/? ?(?:[a-z]{{3,}}|(?<=[ /])[mgshl]|of|[kcm]m|[km]g|ml|lb|oz|ft|in|mi|hr)\b{_SQUARED}"
    rf"(?:(?:-| ?/ ?| )[a-z]+{_SQUARED})*)?"
    r"(?: ?\([a-z .-]{3,}\))?"
)
_NOT_UNIT = re.compile(  # words that change the number instead
    r"\b(?:hundred|thousand|million|billion|trillion|dozen|squared|cubed|factorial|and|or|not|than|to|plus|minus"
    r"|times|over|half|halves|(?:third|quarter|fourth|fifth|sixth|eighth|tenth|hundredth)s?)\b"
)
_NUMBER = re.compile(
    rf"{_LABEL}{{0,2}}(?P<sign>[-+]?) ?(?:"
    rf"(?:(?P<whole>\d+) )?(?P<over>{_N}) ?/ ?(?P<under>[-+]?{_N})"
    r"|10 ?\^ ?(?P<power>[-+]?\d+)"
    rf"|(?P<mantissa>{_N})(?:(?:e| ?[x*] ?10 ?\^ ?)(?P<exponent>[-+]?\d+))?"
    rf")(?P<unit>{_UNIT})",
    re.ASCII,
)


def _number(text: str) -> Fraction | None:
    """The one number that plain text spells, or None."""
    match = _NUMBER.fullmatch(text)
    if match is None or _NOT_UNIT.search(match["unit"]):
        return None
    if match["over"]:
        over, under = _fraction(match["over"]), _fraction(match["under"])
        if under == 0 or (match["whole"] and not over < under):  # 1 5/2 is no mixed number
            return None
        value = int(match["whole"] or 0) + over / under
    else:
        exponent = match["power"] or match["exponent"] or "0"
        if len(exponent) > 9 or abs(int(exponent)) > _MAX_DIGITS:
            return None
        value = _fraction(match["mantissa"] or "1") * Fraction(10) ** int(exponent)
    if max(abs(value.numerator), value.denominator) >= 10**_MAX_DIGITS:
        return None
    return -value if match["sign"] == "-" else value


def _fraction(number: str) -> Fraction:
    return Fraction(re.sub("[, ]", "", number))
