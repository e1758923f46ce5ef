r"""Dress that changes no meaning: what `tidy` takes off an answer, and `plain` out of it.

`tidy` keeps what was written, for people to read; `plain` prepares it for `tokens` to cut up.
"""

import re
import unicodedata

MAX_CHARS = 2000  # longer answers stay text, which bounds the work
_MAX_LAYERS = 8  # dress may hide dress, as in $\text{\textbf{18}}$; what is deeper stays
_DRESS = [
    re.compile(pattern, re.DOTALL)
    for pattern in (
        r"\$\$([^$]+)\$\$",
        r"\$([^$]+)(?<!\\)\$",
        r"\\\(((?:(?!\\\)).)+)\\\)",
        r"\\\[((?:(?!\\\]).)+)\\\]",
        r"\*\*([^*]+)\*\*",
        r"__([^_]+)__",
        r"`([^`]+)`",
        r"\*([^*]+)\*",
        r"[\"“]([^\"“”]+)[\"”]",
        r"\{([^{}]+)\}",
        r"\\(?:text|math)(?:bf|it|rm|normal|sf|tt)? ?\{([^{}]+)\}",
        r"\\(?:mbox|boldsymbol|bm|emph) ?\{([^{}]+)\}",
        r"\\textcolor ?\{[^{}]*\} ?\{([^{}]+)\}",
        r"\(([A-Z])\)",
    )
]

_INVISIBLE = dict.fromkeys(map(ord, "\u200b\u200e\u200f\u2060\ufeff\u00ad"))


def tidy(answer: str) -> str:
    r"""As it was written, without the dress around it: `$`, bold, `\text{}`, blanks, a full stop at the end."""
    text = " ".join(answer.translate(_INVISIBLE).split())
    if len(answer) > MAX_CHARS:
        return text
    for _ in range(_MAX_LAYERS):
        before, text = text, _ending(text)
        for dress in _DRESS:
            if whole := dress.fullmatch(text):
                text = whole[1].strip()
                break
        if text == before:
            break
    return text


def _ending(text: str) -> str:
    """Without full stops, commas, blanks and backslashes at the end, unless they say that it goes on, `1, 2, ...`."""
    ended = text.rstrip(" .,;\\")
    for blank in (r"\!", r"\:", r"\quad", r"\qquad"):
        ended = ended.removesuffix(blank)
    return text if text.startswith("...", len(ended)) or text.endswith("...") else ended


_BEFORE_NFKC = [  # what NFKC would glue to what stands beside it: 10³ to 103, 1½ to 11/2, ℝ to R
    (re.compile("[⁰¹²³⁴-⁹⁺⁻]+"), r"^{\g<0>}"),
    (re.compile("[₀-₉₊₋]+"), r"_{\g<0>}"),
    (re.compile("[¼-¾⅐-⅞]"), r" \g<0>"),
    *((re.compile(bold), rf"\\mathbb{{{letter}}}") for bold, letter in zip("ℝℕℤℚℂ", "RNZQC", strict=True)),
    (re.compile("[′’]"), "'"),
    (re.compile("″"), "''"),
]
_REWRITES = [
    (re.compile(r"\b(?:US|CA|AU|NZ|HK)\\?\$(?= ?[\d.])|\\?\$|[€£¥₹₩₽₱₫₪₺¢`]"), " "),
    (re.compile(r"\b(?:USD|EUR|GBP|INR|Rs\.?)(?= ?[\d.])"), " "),
    (re.compile(r"(?<![\w\\])(sq|cu|ft|in|yd|mi|lbs?|oz|hrs?|mins?|secs?)\.(?= |\}|\Z)"), r"\1"),
    (re.compile(r"(?<![\w)])\*\*([^*]+)\*\*(?![\w(])"), r" \1 "),
]


def plain(answer: str) -> str:
    """A tidy answer without currencies, bold marks and doubled backslashes, in Unicode's plainest letters."""
    text = tidy(answer)
    for pattern, replacement in _BEFORE_NFKC:
        text = pattern.sub(replacement, text)
    text = unicodedata.normalize("NFKC", text)
    if r"\\begin" in text:
        text = text.replace(r"\\", "\\")
    elif r"\begin" not in text:  # there a double backslash ends a row
        text = re.sub(r"\\{2,}", r"\\", text)
    for pattern, replacement in _REWRITES:
        text = pattern.sub(replacement, text)
    return text
