r"""Answer text to tokens: every spelling of one thing gives the same token.

`\left`, `\,`, colours, fonts and blanks are gone; `\dfrac` is `frac`, `≤`, `<=` and `\leqslant` are one mark, `π` and
`\pi` one name. What a blank or a font can mean is kept beside the token: apart from the token before it, in prose.
"""

import re
from typing import NamedTuple

from trm.answers.commands import BARE, BLANKS, ENVIRONMENTS, FONTS, FUNCTIONS, MARKS, NAMES, NEGATED, NOTHING
from trm.answers.words import WORDS


class Token(NamedTuple):
    r"""kind: "number" (digits without separators), "name" (a letter or a command), "word", "function" or "mark".

    gap: apart from the token before it. prose: inside `\text{}` or an upright font.
    """

    kind: str
    text: str
    gap: bool
    prose: bool


class Tokens(NamedTuple):
    """What an answer consists of. grouped: whether commas that could separate were read as grouping thousands."""

    tokens: list[Token]
    grouped: bool


_ASCII = {"<=": "≤", ">=": "≥", "!=": "≠", "==": "=", "**": "^", "->": "→", "...": "…"}
_TRANSLATED = str.maketrans({**dict.fromkeys("\u2010\u2011\u2012\u2013\u2014\u2212", "-"), "\u2044": "/"})

_SEPARATOR = r"\{,\}|,[ ]?(?:\\[!,;: ][ ]?)*\\![ ]?|\\![ ]?|\\[,;: ]|[ ~]|,"
_TOKEN = re.compile(
    r"""
      (?P<blank>[\s~]+)
    | (?P<half>[ap]\.\ ?m\.?(?!\w))                        # a.m.
    | (?P<grouped>[1-9]\d{0,2}(?P<by>SEPARATOR)\d{3}(?:(?P=by)\d{3})*(?!(?P=by)?\d))(?:\.(?P<places>\d*)(?!\.))?
    | (?P<stop>\.(?=(?:\s|\\[!,;:\ ]|\\q?quad)*(?:\}|\\[)\]]|\Z)))
    | (?P<number>(?:\d+(?:\.(?!\.)\d*)?|\.\d+|\.(?=\\overline))(?:e[-+]?\d+(?![\w.]))?)
    | (?P<prime>\^\s*(?:\{\s*\\prime\s*\}|\\prime(?![a-zA-Z])))
    | (?P<degree>\^\s*(?:\{\s*\\circ\s*\}|\\circ(?![a-zA-Z]))|\\circ(?![a-zA-Z])|°)
    | \\begin\s*\{(?P<begin>[a-zA-Z]+\*?)\}(?:\s*(?:\[[^\[\]]*\]\s*)?\{[clr|\s]*\})?
    | \\end\s*\{(?P<end>[a-zA-Z]+\*?)\}
    | \\(?P<fancy>mathbb|mathcal|mathscr|mathfrak)\s*(?:\{\s*)?(?P<symbol>[a-z])(?:\s*\})?
    | (?P<color>\\textcolor\s*\{[^{}]*\}|\\color\s*\{[^{}]*\})
    | (?P<spacing>\\[hm](?:space|skip)\*?\s*\{[^{}]*\}|\\q?quad|\\(?:left|right)\s*\.)
    | (?P<row>\\\\(?:\s*\[[^\[\]]*\])?)
    | \\(?P<command>[a-zA-Z]+\*?|[^a-zA-Z])
    | (?P<letters>[^\W\d_]+)
    | (?P<ascii><=|>=|!=|==|\*\*|->|\.\.\.)
    | (?P<character>.)
    """.replace("SEPARATOR", _SEPARATOR),
    re.VERBOSE | re.DOTALL | re.IGNORECASE | re.ASCII,
)


def tokenize(text: str, group: bool = True) -> Tokens:
    """The tokens of a `plain` text. Without `group`, commas alone separate: `1,234` is two numbers."""
    return _Tokenizer(group).run(text)


class _Tokenizer:
    def __init__(self, group: bool) -> None:
        self.group = group
        self.grouped = False
        self.tokens: list[Token] = []
        self.gap = False
        self.font = False  # the next brace opens one
        self.braces: list[bool] = []  # of each open one, whether it is a font's
        self.brackets: list[str] = []

    def run(self, text: str) -> Tokens:
        text = text.translate(_TRANSLATED)
        position = 0
        while match := _TOKEN.match(text, position):
            position = self.take(match)
        return Tokens(self.tokens, self.grouped)

    def take(self, match: re.Match[str]) -> int:
        """Add what was matched; returns where to go on."""
        kind = match.lastgroup or ""
        what = match[kind] if kind else ""
        if match["grouped"]:
            return self.take_grouped(match)
        if kind in ("blank", "spacing", "stop"):
            self.gap = True
        elif kind == "half":
            self.add("word", what[0].lower() + "m")
        elif kind == "number":
            self.add("number", what.lower())
        elif kind == "degree":
            composed = what == r"\circ" and self.tokens and self.tokens[-1].kind in ("name", "function")
            self.add(*(("name", what) if composed else ("mark", "°")))  # f \circ g
        elif kind == "prime":
            self.add("mark", "'")
        elif kind in ("begin", "end"):
            self.add("mark", f"{kind} {ENVIRONMENTS.get(what, what)}")
        elif kind == "symbol":
            self.add("name", rf"\{match['fancy']}{{{what}}}")
        elif kind == "color":
            self.font = True
        elif kind == "row":
            self.add("mark", r"\\")
        elif kind == "command":
            self.take_command(what)
        elif kind == "letters":
            self.take_letters(what)
        else:
            self.take_character(_ASCII.get(what, what))
        return match.end()

    def take_grouped(self, match: re.Match[str]) -> int:
        """A number with separators; or only what precedes the first, in an index or where commas are to separate."""
        commas = match["by"] == ","
        index = bool(self.tokens) and self.tokens[-1].text in ("_", "^")  # of `\log_2 128`
        if index or (commas and (not self.group or self.brackets)):
            first = match["grouped"][: match.start("by") - match.start("grouped")]
            self.add("number", first)
            return match.start() + len(first)
        self.grouped |= commas
        places = "" if match["places"] is None else f".{match['places']}"
        self.add("number", re.sub(r"\D", "", match["grouped"]) + places)
        return match.end()

    def take_command(self, name: str) -> None:
        name = name.removesuffix("*")
        if name in BLANKS:
            self.gap = True
        elif name in FONTS:
            self.font = True
        elif name in MARKS:
            self.take_mark(MARKS[name])
        elif name in FUNCTIONS:
            self.add("function", name)
        elif name not in NOTHING:
            self.add("name", NAMES.get(name, f"\\{name}"))

    def take_letters(self, run: str) -> None:
        """A word that is one, or the letters of a product. Capitals stay: `AB` is no word, and `ABCD` not `abcd`."""
        lower = run.lower()
        after_number = bool(self.tokens) and self.tokens[-1].kind == "number"
        shouted = run.isupper() and not (after_number or (lower in ("no", "yes") and not self.tokens))
        if run in BARE:
            self.take_command(run)
        elif len(run) > 3 or (len(run) > 1 and lower in WORDS and not shouted):
            self.add("word", run if shouted else lower)
        else:
            for letter in run:
                self.add("name", letter)

    def take_character(self, character: str) -> None:
        if character == "{":
            self.braces.append(self.font)
            if self.font:
                self.gap = True
            else:
                self.add("mark", "{")
            self.font = False
        elif character == "}" and self.braces:
            if self.braces.pop():
                self.gap = True
            else:
                self.add("mark", "}")
        elif ord(character) > 127 and (character in MARKS or character in NAMES):
            self.take_command(character)
        elif character.isalpha():
            self.add("name", character)
        elif character != "}":
            self.take_mark(character)

    def take_mark(self, mark: str) -> None:
        if mark in ("and", "mod"):
            self.add("word", mark)
            return
        if self.tokens and self.tokens[-1].text == r"\not":
            self.tokens.pop()
            mark = NEGATED.get(mark, f"not {mark}")
        if mark in ("(", "[", "\\{"):
            self.brackets.append(mark)
        elif mark in (")", "]", "\\}") and self.brackets:
            self.brackets.pop()
        elif mark == ":" and self.brackets and self.brackets[-1] == "\\{":
            mark = "|"  # such that
        self.add("mark", mark)

    def add(self, kind: str, text: str) -> None:
        self.tokens.append(Token(kind, text, self.gap, any(self.braces)))
        self.gap = self.font = False
