"""Where a reader of tokens stands, and what comes next."""

from trm.answers.tokens import Token
from trm.answers.tree import Unreadable

RELATIONS = frozenset("=<>≤≥≠≈∈∉≡→⇔~")
END = Token("end", "", False, False)


class Cursor:
    def __init__(self, tokens: list[Token]) -> None:
        self.tokens = list(tokens)
        self.position = 0

    def peek(self, ahead: int = 0) -> Token:
        index = self.position + ahead
        return self.tokens[index] if index < len(self.tokens) else END

    def at(self, *marks: str) -> bool:
        token = self.peek()
        return token.kind == "mark" and token.text in marks

    def take(self, *marks: str) -> bool:
        """Step over one of these marks, if it is next."""
        if found := self.at(*marks):
            self.position += 1
        return found

    def expect(self, *marks: str) -> str:
        if not self.at(*marks):
            raise Unreadable
        self.position += 1
        return self.tokens[self.position - 1].text

    def at_separator(self) -> bool:
        token = self.peek()
        return self.at(",", ";", "\\\\", "∧", "∨") or (token.kind == "word" and token.text in ("and", "or"))

    def at_end_of_member(self) -> bool:
        token = self.peek()
        closes = self.at(")", "]", "}", "\\}", "⟩", "&")
        return token is END or self.at_separator() or closes or token.text in RELATIONS
