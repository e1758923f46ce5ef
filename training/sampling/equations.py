r"""The equations that stand in a text, in one spelling: what tells two derivations of an answer apart.

`48 / 2 = 24`, `$48\div2=\$24$` and `<<48/2=24>>` are all `48/2=24`. An equation is two or more sides of numbers,
operators and brackets, at least one of which computes something. Words end it: `48 clips / 2 = 24` is none.
"""

import re
from fractions import Fraction

from trm.answers import canonical, normalize

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


def equations(text: str) -> tuple[str, ...]:
    """Each once, in the order in which they come first."""
    for pattern, replacement in _REWRITES:
        text = pattern.sub(replacement, text)
    found = (match[0].replace(" ", "") for match in _ARITHMETIC.finditer(text))
    whole = (one for one in found if "=" in one and _COMPUTES.search(one))
    return tuple(dict.fromkeys("=".join(map(_plain, one.split("="))) for one in whole))


def results(derivation: tuple[str, ...], answer: str) -> list[str] | None:
    """What the equations of a derivation come to, one after the other: numbers, of which the last is the answer.

    None where that is not so.
    """
    ends = [canonical(equation.rpartition("=")[2]) for equation in derivation]
    numbers = all(isinstance(normalize(end), Fraction) for end in ends)
    return ends if ends and numbers and normalize(ends[-1]) == normalize(answer) else None


def _plain(side: str) -> str:
    """One side of an equation without brackets that have no partner or hold one number; numbers as `canonical`."""
    side = re.sub(_NUMBER, lambda number: canonical(number[0]), side)
    unmatched = side.count("(") - side.count(")")
    side = side.replace("(", "", max(0, unmatched))
    side = side[::-1].replace(")", "", max(0, -unmatched))[::-1]
    return re.sub(r"(?<![\d)])\((-?[\d.]+)\)", r"\1", side)
