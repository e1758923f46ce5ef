r"""The equations that stand in a text, in one spelling: what tells two derivations of an answer apart.

`48 / 2 = 24`, `$48\div2=\$24$` and `<<48/2=24>>` are all `48/2=24`. An equation is two or more sides of numbers,
operators and brackets, at least one of which computes something. Words end it: `48 clips / 2 = 24` is none.
"""

import re
from fractions import Fraction
from itertools import pairwise

from trm.answers import canonical, normalize, same
from trm.answers.comparison import trees, value

_REWRITES = [  # in this order
    (re.compile(r"^[ \t]*[-*•][ \t]+", re.MULTILINE), ""),  # no minus, but a list
    (re.compile(r"<<([^<>]*)>>"), r"; \1 ;"),
    (re.compile(r"\\[dtc]?frac *\{([^{}]*)\} *\{([^{}]*)\}"), r"(\1)/(\2)"),
    (re.compile(r"\\(?:text|mathrm|mbox) *\{[^{}]*\}|\\(?:left|right)(?![a-z])|\\[,;:! ]|&"), " "),
    (re.compile(r"\\(?:times|cdot)(?![a-z])|[×·⋅]|(?<=[\d)])[ \t]*[xX](?=[ \t]*[$€£¥\\]*[\d(.])"), "*"),
    (re.compile(r"\\div(?![a-z])|÷"), "/"),
    (re.compile(r"[\u2010\u2012\u2013\u2212]"), "-"),
    (re.compile(r"\\?[$%€£¥₹]"), ""),
    (re.compile(r"(?<=\d),(?=\d{3}(?!\d))"), ""),
    (re.compile(r"[ \t]+"), " "),
]
_NUMBER = r"(?:\d+(?:\.\d+)?|\.\d+)"
_TERM = rf"[( ]*(?:-[( ]*)?{_NUMBER}[) ]*"
_ARITHMETIC = re.compile(rf"(?<!\()(?<!\( ){_TERM}(?:[-+*/^=]{_TERM})*")  # whole, not every part: in linear time
_COMPUTES = re.compile(r"[\d)][-+*/^]")
_DECIMAL = re.compile(r"-?\d*\.(\d+)")


def equations(text: str) -> tuple[str, ...]:
    """Each once, in the order in which they come first."""
    for pattern, replacement in _REWRITES:
        text = pattern.sub(replacement, text)
    found = (match[0].replace(" ", "") for match in _ARITHMETIC.finditer(text))
    whole = (one for one in found if "=" in one and _COMPUTES.search(one))
    return tuple(dict.fromkeys("=".join(map(_plain, one.split("="))) for one in whole))


def results(derivation: tuple[str, ...], answer: str) -> list[str] | None:
    """What the equations of a derivation come to, one after the other: numbers, of which the last is the answer.

    None where that is not so, or an equation does not hold: what was read is then not what was meant, as `20*50=10` of
    20 % of 50.
    """
    ends = [canonical(equation.rpartition("=")[2]) for equation in derivation]
    numbers = all(isinstance(normalize(end), Fraction) for end in ends)
    return ends if ends and numbers and same(ends[-1], answer) and all(map(holds, derivation)) else None


def holds(equation: str) -> bool:
    """Whether the sides of an equation come to the same. A decimal fraction may be rounded or cut at its last place."""
    sides = [(side, _value(side)) for side in equation.split("=")]
    return all(
        one is not None
        and other is not None
        and (one == other or _shortens(side, one, other) or _shortens(next_side, other, one))
        for (side, one), (next_side, other) in pairwise(sides)
    )


def _shortens(side: str, value: Fraction, exact: Fraction) -> bool:
    """Whether a side, of this value, is a decimal fraction and the exact number rounded or cut at its last place."""
    decimal = _DECIMAL.fullmatch(side)
    if decimal is None:
        return False
    place, off = Fraction(1, 10 ** len(decimal[1])), abs(value - exact)
    return off <= place / 2 or (off < place and abs(value) < abs(exact))


def _value(side: str) -> Fraction | None:
    """The number that a side comes to, read as an answer is; None where it comes to none, or to one out of measure."""
    readings = trees(side.replace("+-", "-"))  # which answers never have
    found = value(readings[0]) if readings else None
    return found if isinstance(found, Fraction) else None


def _plain(side: str) -> str:
    """One side of an equation without brackets that have no partner or hold one number; numbers as `canonical`."""
    side = re.sub(_NUMBER, lambda number: canonical(number[0]), side)
    unmatched = side.count("(") - side.count(")")
    side = side.replace("(", "", max(0, unmatched))
    side = side[::-1].replace(")", "", max(0, -unmatched))[::-1]
    return re.sub(r"(?<![\d)])\((-?[\d.]+)\)", r"\1", side)
