r"""Tokens to a tree, by recursive descent. What is no mathematics stays text, member by member of a list.

    answer   = member {("," | ";" | "and" | "or" | "∧" | "∨") member}
    member   = set {("=" | "<" | "∈" | …) set}                    a chain
    set      = ratio {("∪" | "∩" | "∖") ratio}
    ratio    = residue {":" residue}
    residue  = sum ["mod" product]
    sum      = ["+" | "-" | "±"] product {("+" | "-" | "±") product}
    product  = power {["*" | "/"] power} [unit]
    power    = atom {"!" | "'" | "%" | "°" | "_" argument | "^" argument}    two `^` only in braces
    atom     = number | name | bracket | "frac" argument argument | function power | matrix | …

Kinds of nodes: "list" (in no order), "all" and "any" (inequalities that hold together, or one of them), "set",
"tuple ()", "tuple [)" … (intervals too), "such that", "matrix", "row", "chain" (member, relation, member, …), "∪ ∩ ∖"
(the same), "ratio", "sum", "negative", "±", "∓", "mod", "product", "quotient", "mixed" (whole, fraction), "power",
"sub", "root" (radicand, degree), "call" (function, argument), "time", "text", and one per mark: "!", "'", "abs",
"binom", "overline". A bracket around one thing leaves no trace. Nor do units, and words before a number; but where
those of a list differ, they are its members' names: `3 boys, 4 girls` and `length: 3, width: 4` as `x = 3, y = 4`.
"""

import re
from fractions import Fraction

from trm.answers.commands import INVERSES
from trm.answers.cursor import END, RELATIONS, Cursor
from trm.answers.lists import Member, joined, spoken
from trm.answers.tokens import Token
from trm.answers.tree import Node, Tree, Unreadable
from trm.answers.units import Units
from trm.answers.words import HEDGES, introduces, singular

MAX_DIGITS = 400  # above or below the line; larger numbers stay text. Avoids int()'s limit of 4300 digits
_MAX_DEPTH = 24  # of brackets, arguments and exponents
_MAX_MARKS = 8  # behind one atom

FUNCTION_NAMES = frozenset("fgFG")  # f(2) is no product
_SIGNS = ("+", "-", "±", "∓")
_SET_MARKS = frozenset("∪∩∖")
_CLOSING = {"(": ")]", "[": "])", "\\{": ("\\}",), "{": ("}",), "⟨": ("⟩",)}
_ROUND = {"⌊": "⌋", "⌈": "⌉", "‖": "‖"}
_ACCENTS = frozenset({"overline", "vec", "hat", "tilde"})
_OPENING = frozenset({"frac", "sqrt", "binom", "|", "begin matrix", "begin det", *_CLOSING, *_ROUND, *_ACCENTS})
_AFTER_LETTER = tuple("+-*/^_=<>≤≥≠∪∩∖,;:)]|")  # then the letter is part of the mathematics
_APPLIED = re.compile(r"((?:' )*)(\^ (?:\{ - 1 \}|- 1) )?(?=\( )")
_NUMBER = re.compile(r"(\d*)(?:\.(\d*))?(?:e([-+]?\d+))?")


def read(tokens: list[Token], letter_units: bool = True, asked: frozenset[str] = frozenset()) -> Tree:
    """The tree of an answer. Without `letter_units`, `5 m` is a product, as `5m` is; `asked` are further units."""
    reader = _Reader(tokens, letter_units, asked)
    members: list[Member] = []
    separators: set[str] = set()
    while reader.more_members(separators):
        members.append(reader.member_or_text())
    try:
        parts = joined(members, separators)
    except Unreadable:
        return text_of(tokens)
    return parts[0] if len(parts) == 1 else Node("list", tuple(parts))


def split_choice(tokens: list[Token]) -> tuple[str | None, list[Token]]:
    r"""The letter of a multiple-choice answer that also gives its value, and the value: `(A) 18`, `A. 18`, `A) 18`."""
    texts = [token.text for token in tokens[:4]]
    start = 1 if texts[:1] == ["("] else 0
    if len(tokens) > start + 2 and texts[start] in tuple("ABCDEFGHIJ"):
        mark, first = tokens[start + 1], tokens[start + 2]
        marked = mark.text == ")" or (not start and (mark.text == "." or (mark.text == ":" and not mark.gap)))
        second = tokens[start + 3] if len(tokens) > start + 3 else END
        signed = first.text in ("-", "|") and first.gap and not second.gap  # `(A) -5`, not `(A) - 5`
        if marked and (first.gap or mark.text != ":") and (signed or first.text not in _AFTER_LETTER):
            return texts[start], tokens[start + 2 :]
    return None, tokens


def text_of(tokens: list[Token]) -> Node:
    """What cannot be read: its tokens, spelled alike."""
    texts = [token.text for token in tokens]
    return Node("text", tuple(text for text in texts if text not in "{}"))


class _Reader(Cursor):
    def __init__(self, tokens: list[Token], letter_units: bool, asked: frozenset[str]) -> None:
        super().__init__(tokens)
        self.units = Units(self, letter_units, asked)
        self.depth = 0
        self.bars = 0  # open | of an absolute value, or of a set's condition to come

    # Lists and their members

    def more_members(self, separators: set[str]) -> bool:
        """Step over separators to the next member, if there is one; keeps those that were there."""
        found = set()
        while self.at_separator():
            found.add(self.peek().text)
            self.position += 1
        if self.peek() is END:
            return False
        separators |= found
        return True

    def member_or_text(self) -> Member:
        """A member that ends where one may end; or as text, what precedes the next separator outside brackets."""
        start, units = self.position, len(self.units.words)
        self.skip_preface()
        before = [singular(t.text) for t in self.tokens[start : self.position] if t.kind == "word" and t.text != "is"]
        try:
            member = self.member()
            if self.peek() is END or self.at_separator():
                return Member(member, spoken(before), spoken(self.units.words[units:]))
        except Unreadable:
            pass
        self.position, self.depth, self.bars = start, 0, 0
        nested = 0
        while (token := self.peek()) is not END and (nested > 0 or not self.at_separator()):
            if token.kind == "mark":
                opens = token.text in _CLOSING or token.text.startswith("begin")
                nested += opens - (token.text in (")", "]", "\\}", "}", "⟩") or token.text.startswith("end"))
            self.position += 1
        return Member(text_of(self.tokens[start : self.position]), "", "")

    def skip_preface(self) -> None:
        """Step over words before the answer: `about`, `≈`, `=`, `Total:`, `Area =`, `The answer is`."""
        for _ in range(_MAX_MARKS):
            length = 0
            if not (self.at("≈", "~", "=", "⇒") or self.peek().text in HEDGES):
                while self.peek(length).kind in ("word", "name") or self.peek(length).text in tuple("(){}_'"):
                    length += 1
                before = self.tokens[self.position : self.position + length]
                if not any(token.kind == "word" for token in before):
                    return
                if self.peek(length).text not in (":", "=", "≈"):
                    if "is" not in [token.text for token in before]:
                        return
                    length = [token.text for token in before].index("is")
                if not all(introduces(token.text) for token in before[:length]):
                    return
            self.position += length + 1

    def items(self) -> list[Tree]:
        found: list[Member] = []
        separators: set[str] = set()
        while not found or (self.at_separator() and self.more_members(separators)):
            units = len(self.units.words)
            found.append(Member(self.member(), "", spoken(self.units.words[units:])))
        return joined(found, separators)

    def member(self) -> Tree:
        parts: list[Tree] = [self.set()]
        while self.peek().kind == "mark" and self.peek().text in RELATIONS:
            parts.append(self.peek().text)
            self.position += 1
            if parts[-1] in ("<", ">") and self.take("="):
                parts[-1] = {"<": "≤", ">": "≥"}[str(parts[-1])]
            parts.append(self.set())
        return parts[0] if len(parts) == 1 else Node("chain", tuple(parts))

    # Operators, from the loosest to the tightest

    def set(self) -> Tree:
        parts = [self.ratio()]
        while self.peek().kind == "mark" and self.peek().text in _SET_MARKS:
            parts.append(self.peek().text)
            self.position += 1
            parts.append(self.ratio())
        return parts[0] if len(parts) == 1 else Node("∪ ∩ ∖", tuple(parts))

    def ratio(self) -> Tree:
        parts = [self.residue()]
        while self.take(":"):
            parts.append(self.residue())
        whole = parts[0] if len(parts) == 1 else Node("ratio", tuple(parts))
        if self.peek().kind == "word" and self.peek().text in ("am", "pm"):
            self.position += 1
            return Node("time", (whole, self.tokens[self.position - 1].text))
        return whole

    def residue(self) -> Tree:
        """A sum, and its modulus, if it has one: `3 \\pmod 7`, `3 (mod 7)`."""
        of = self.sum()
        bracketed = self.at_modulus(1) and self.take("(")
        if not self.at_modulus():
            return of
        self.position += 1
        modulus = self.product()
        if bracketed:
            self.expect(")")
        return Node("mod", (of, modulus))

    def at_modulus(self, ahead: int = 0) -> bool:
        return self.peek(ahead).kind == "word" and self.peek(ahead).text == "mod"

    def sum(self) -> Tree:
        terms = [self.signed(self.expect(*_SIGNS) if self.at(*_SIGNS) else "+")]
        while self.at(*_SIGNS):
            terms.append(self.signed(self.expect(*_SIGNS)))
        return terms[0] if len(terms) == 1 else Node("sum", tuple(terms))

    def signed(self, sign: str) -> Tree:
        term = self.product()
        return term if sign == "+" else Node("negative" if sign == "-" else sign, (term,))

    def product(self) -> Tree:
        over: list[Tree] = [self.power()]
        under: list[Tree] = []
        while not self.units.skip():
            if self.take("*") or self.at_times():
                over.append(self.factor())
            elif self.take("/"):
                under.append(self.factor())
            elif not self.at_atom():
                break
            elif not under and self.at_whole(over) and self.at("frac"):
                over.append(_mixed(over.pop(), self.power()))
            elif not under and self.at_whole(over) and self.at_slashed():
                over.append(self.mixed(over.pop()))
            elif self.peek().kind == "number" and not (isinstance(over[-1], Node) and over[-1].kind in ("power", "!")):
                raise Unreadable  # 12 34, and x2
            else:
                over.append(self.power())
        top = over[0] if len(over) == 1 else Node("product", tuple(over))
        if not under:
            return top
        return Node("quotient", (top, under[0] if len(under) == 1 else Node("product", tuple(under))))

    def factor(self) -> Tree:
        """What follows a `*` or `/`: it may have a sign, `\\frac{1}{2} * -3`."""
        return Node("negative", (self.power(),)) if self.take("-") else self.power()

    def at_times(self) -> bool:
        """Step over the x of `1.5 x 10^3`."""
        x = [self.peek(ahead).text for ahead in range(3)] in (["x", "10", "^"], ["X", "10", "^"])
        if x and self.position and self.tokens[self.position - 1].kind == "number":
            self.position += 1
            return True
        return False

    def at_atom(self) -> bool:
        token = self.peek()
        if token.kind == "mark":
            ends = (token.text == "|" and self.bars) or (token.text == "(" and self.at_modulus(1))
            return token.text in _OPENING and not ends
        return token.kind in ("number", "name", "function")

    def at_whole(self, over: list[Tree]) -> bool:
        """Whether all that was read of a product is a whole number."""
        return len(over) == 1 and isinstance(over[0], Fraction) and self.tokens[self.position - 1].text.isdigit()

    def at_slashed(self) -> bool:
        return [self.peek(ahead).kind for ahead in (0, 2)] == ["number", "number"] and self.peek(1).text == "/"

    def mixed(self, whole: Tree) -> Tree:
        """The fraction of `1 1/2`; another number there is none of ours, `1 5/2`."""
        top = self.number()
        self.expect("/")
        found = _mixed(whole, Node("quotient", (top, self.number())))
        if found.kind != "mixed":
            raise Unreadable
        return found

    def power(self) -> Tree:
        base = self.atom()
        for _ in range(_MAX_MARKS):
            if self.take("^"):
                base = Node("power", (base, self.exponent()))
                if self.at("^"):
                    raise Unreadable  # 2^3^2
            elif self.take("_"):
                base = Node("sub", (base, self.index()))
            elif self.at("!") and self.peek(1).text == "!":
                raise Unreadable  # n!! is not (n!)!
            elif self.at("!", "'"):
                base = Node(self.expect("!", "'"), (base,))
            elif self.at("°") and self.peek(1).text not in ("C", "F"):
                base = Node(self.expect("°"), (base,))
            elif self.take("%"):
                pass
            else:
                return base
        raise Unreadable

    def exponent(self) -> Tree:
        """An argument, all its digits; a sign may come first: `x^-1`."""
        if self.take("-"):
            return Node("negative", (self.argument(one_digit=False),))
        self.take("+")
        return self.argument(one_digit=False)

    # Atoms

    def atom(self) -> Tree:
        if self.depth > _MAX_DEPTH:
            raise Unreadable
        self.depth += 1
        token = self.peek()
        if token.kind == "number":
            found: Tree = self.number()
        elif token.kind == "name":
            self.position += 1
            found = token.text
            if found in FUNCTION_NAMES:
                found = self.applied(found)
        elif token.kind == "function":
            found = self.call()
        elif token.kind == "mark":
            self.position += 1
            found = self.marked(token.text)
        else:
            raise Unreadable
        self.depth -= 1
        return found

    def applied(self, function: Tree) -> Tree:
        """A letter's function and what it is of, or only the letter: `f(2)`, `f'(x)`, `f^{-1}(x)`."""
        match = _APPLIED.match("".join(self.peek(ahead).text + " " for ahead in range(8)))
        if match is None:
            return function
        self.position += match[0].count(" ")
        for _ in range(match[1].count("'")):
            function = Node("'", (function,))
        if match[2]:
            function = Node("power", (function, Fraction(-1)))
        return Node("call", (function, self.atom()))

    def number(self) -> Fraction:
        token = self.peek()
        if token.kind != "number":
            raise Unreadable
        self.position += 1
        value = number(token.text)
        places = len(token.text.partition(".")[2])
        if "." in token.text and (self.take("overline") or self.at_digits_in_brackets()):
            if self.at("(") and places:
                raise Unreadable  # 0.1(6), which may be a product
            value += self.repeating(places)  # 0.1\overline{6}, 0.(3)
        return value

    def at_digits_in_brackets(self) -> bool:
        opening, digits, closing = (self.peek(ahead) for ahead in range(3))
        return not opening.gap and opening.text + closing.text == "()" and digits.text.isdigit()

    def repeating(self, places: int) -> Fraction:
        opened = self.take("{", "(")
        digits = self.peek().text
        if self.peek().kind != "number" or not digits.isdigit() or len(digits) + places > MAX_DIGITS:
            raise Unreadable
        self.position += 1
        if opened:
            self.expect("}", ")")
        return Fraction(int(digits), (10 ** len(digits) - 1) * 10**places)

    def index(self) -> Tree:
        """An argument, or a word: `x_{\\max}`."""
        opening, word, closing = (self.peek(ahead) for ahead in range(3))
        if word.kind in ("word", "function") and (opening.text, closing.text) == ("{", "}"):
            self.position += 3
            return word.text
        return self.argument(one_digit=False)

    def argument(self, one_digit: bool = True) -> Tree:
        r"""What a command takes: a group, or the next thing, of a whole number the first digit: `\frac12`."""
        token = self.peek()
        if one_digit and token.kind == "number" and len(token.text) > 1 and token.text[0] != ".":
            if not token.text.isdigit():
                raise Unreadable  # \frac1.5, \frac1e5
            rest = token._replace(text=token.text[1:], gap=False)
            self.tokens[self.position : self.position + 1] = [token._replace(text=token.text[0]), rest]
        return self.atom()

    def marked(self, mark: str) -> Tree:
        """What begins with a mark, which was taken."""
        if mark in _CLOSING:
            return self.bracket(mark)
        if mark == "frac":
            return Node("quotient", (self.argument(), self.argument()))
        if mark == "binom":
            return Node("binom", (self.argument(), self.argument()))
        if mark == "sqrt":
            degree: Tree = Fraction(2)
            if self.take("["):
                degree = self.sum()
                self.expect("]")
            return Node("root", (self.argument(), degree))
        if mark in _ACCENTS:
            return Node(mark, (self.argument(),))
        if mark == "|":
            self.bars += 1
            inside = self.sum()
            self.bars -= 1
            self.expect("|")
            return Node("abs", (inside,))
        if mark in _ROUND:
            inside = self.sum()
            self.expect(_ROUND[mark])
            return Node(mark, (inside,))
        if mark.startswith("begin "):
            return self.matrix(mark.removeprefix("begin "))
        raise Unreadable

    def bracket(self, opening: str) -> Tree:
        """A group, tuple, interval or set."""
        bars, self.bars = self.bars, int(opening == "\\{")
        if opening == "\\{" and self.take("\\}"):
            self.bars = bars
            return "∅"
        items = self.items()
        if self.bars and self.take("|"):
            self.bars = 0
            items = [Node("such that", (*items, *self.items()))]
        self.bars = bars
        closing = self.expect(*_CLOSING[opening])
        if opening == "\\{" or (opening == "{" and len(items) > 1):
            return Node("set", tuple(items))
        if len(items) == 1 and opening != "⟨":
            if closing != _CLOSING[opening][0]:
                raise Unreadable  # (x-3](x+8)
            return items[0]
        return Node(f"tuple {opening}{closing}", tuple(items))

    def matrix(self, kind: str) -> Tree:
        rows: list[Tree] = []
        cells: list[Tree] = []
        while True:
            cells.append(self.member())
            if self.take("&"):
                continue
            self.take(",", ".", ";")
            rows.append(Node("row", tuple(cells)))
            cells = []
            more = self.take("\\\\")
            if self.take(f"end {kind}"):
                return Node(kind, tuple(rows))
            if not more:
                raise Unreadable

    def call(self) -> Tree:
        r"""A function and what it is of: a bracket, or the factors up to the next function: `\sin 2x \cos x`."""
        name: Tree = self.peek().text
        self.position += 1
        exponent: Tree | None = None
        for _ in range(2):
            if self.take("^"):
                exponent = self.exponent()
            elif self.take("_"):
                name = Node("sub", (name, self.index()))
        if self.at("(", "[", "{", "|"):
            of = self.atom()
        else:
            factors = [self.power()]
            while self.at_atom() and self.peek().kind in ("name", "number") and len(factors) < _MAX_MARKS:
                factors.append(self.power())
            of = factors[0] if len(factors) == 1 else Node("product", tuple(factors))
        if isinstance(name, str) and name in INVERSES and exponent == Node("negative", (Fraction(1),)):
            name, exponent = INVERSES[name], None
        value = Node("call", (name, of))
        return value if exponent is None else Node("power", (value, exponent))


def _mixed(whole: Tree, fraction: Tree) -> Node:
    """The sum of a whole number and a proper fraction; the product of what is none."""
    if isinstance(fraction, Node) and fraction.kind == "quotient":
        top, bottom = fraction.parts
        if isinstance(top, Fraction) and isinstance(bottom, Fraction) and 0 < top < bottom:
            return Node("mixed", (whole, fraction))
    return Node("product", (whole, fraction))


def number(digits: str) -> Fraction:
    """The value of a number's text, exactly. Raises Unreadable for one with too many digits."""
    match = _NUMBER.fullmatch(digits)
    assert match is not None, digits
    whole, places, exponent = match[1], match[2] or "", int(match[3] or 0) if len(match[3] or "") < 6 else 10**6
    if len(whole) + len(places) > MAX_DIGITS or abs(exponent) > MAX_DIGITS:
        raise Unreadable
    value = Fraction(int(whole + places or "0"), 10 ** len(places)) * Fraction(10) ** exponent
    if max(abs(value.numerator), value.denominator) >= 10**MAX_DIGITS:
        raise Unreadable
    return value
