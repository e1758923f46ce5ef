"""What is counted or measured, behind a number: `18 red apples`, `5 km/h`, `12 m^2`. Leaves no trace but its words."""

import re

from trm.answers.cursor import END, Cursor
from trm.answers.words import BESIDE, LETTERS, UPRIGHT, describes, is_unit, singular

_EXPONENT = re.compile(r"\^ (?:- )?(?:\d+\.?|\{ (?:- )?\d+\.? \}) ")


class Units:
    """Steps over units. words: those of all that were stepped over."""

    def __init__(self, cursor: Cursor, letter_units: bool, asked: frozenset[str]) -> None:
        self.cursor = cursor
        self.letter_units = letter_units
        self.asked = asked
        self.words: list[str] = []
        self.no_unit = 0  # up to where no unit begins, so that each token is looked at once

    def skip(self) -> bool:
        """Step over what is counted or measured, if that is all that follows in this member."""
        start = self.cursor.position
        if start < self.no_unit or not self.begins_unit():
            return False
        found = known = self.cursor.tokens[start - 1].text == "%"  # a unit at all; and whether the last word is one
        power = False  # whether an exponent came just before
        while True:
            token = self.cursor.peek()
            if self.cursor.at_separator():
                break
            beside = token.text in BESIDE and (token.kind == "word" or token.gap)
            unit = token.kind == "word" and (is_unit(token.text, self.asked) or self.at_inches())
            if beside or unit or (token.kind == "word" and describes(token.text)):
                found, known = found or unit, unit or beside
                self.cursor.position += 1
            elif self.cursor.at("°"):
                self.cursor.position += 1
                if self.cursor.peek().text in ("C", "F"):
                    self.cursor.position += 1
                found = known = True
            elif self.is_letter_unit():
                found = known = True
                self.cursor.position += 1
            elif found and not power and self.whole_exponent():
                power = True
                continue
            elif self.cursor.at("/", "*", "-") and self.cursor.peek(1).kind in ("word", "name"):
                self.cursor.position += 1
                continue
            elif self.cursor.at("(") and self.remark():
                known = True
                found = True
            else:
                break
            power = False
        if found and known and self.cursor.at_end_of_member():
            self.words += [
                singular(t.text) for t in self.cursor.tokens[start : self.cursor.position] if t.kind in ("word", "name")
            ]
            return True
        self.no_unit, self.cursor.position = self.cursor.position, start
        return False

    def whole_exponent(self) -> bool:
        """Step over the exponent of a unit, `^2` or `^{-1}`."""
        exponent = _EXPONENT.match("".join(self.cursor.peek(ahead).text + " " for ahead in range(5)))
        self.cursor.position += exponent[0].count(" ") if exponent else 0
        return exponent is not None

    def at_inches(self) -> bool:
        """Whether `in` is no preposition, as nothing follows that it could belong to."""
        return self.cursor.peek().text == "in" and (
            self.cursor.peek(1) is END or self.cursor.peek(1).text in tuple("^,;)")
        )

    def begins_unit(self) -> bool:
        token, following = self.cursor.peek(), self.cursor.peek(1)
        if token.kind == "mark":
            return (token.text in ("/", "(", "-") and following.kind == "word") or token.text == "°"
        return token.kind == "word" or self.is_letter_unit()

    def is_letter_unit(self) -> bool:
        """A letter that is a unit: upright, or apart from the number before it, or under another unit."""
        token, before = self.cursor.peek(), self.cursor.tokens[self.cursor.position - 1]
        if token.kind != "name" or not self.letter_units:
            return False
        apart = token.gap and before.kind == "number"
        if token.prose and (apart or (token.text in LETTERS and not before.prose)):
            return token.text in UPRIGHT
        return token.text in LETTERS and (apart or before.text in ("/", "*") or before.kind == "word")

    def remark(self) -> bool:
        """Step over words in brackets, `18 (eighteen)`."""
        length = 1
        while self.cursor.peek(length).kind == "word" or self.cursor.peek(length).text == "-":
            length += 1
        if length > 1 and self.cursor.peek(length).text == ")":
            self.cursor.position += length + 1
            return True
        return False
