"""What the recursion changed its mind about, told in words, from the traces of a reply's tokens.

A line for each piece of the reply that was not said so from the first: what the backbone would have said in its place,
and what each supervision step. Digits side by side are one piece, and so are other changed tokens.
"""

from collections.abc import Iterator, Sequence
from itertools import groupby

from server.token_bytes import TokenBytes
from trm.engine.request import TokenTrace

Said = list[int]  # a token's best candidate after step 0 and after each supervision step


class Reasoner:
    """Reads the tokens of one reply in order; a piece is told as soon as its last token is known."""

    def __init__(self, token_bytes: TokenBytes) -> None:
        self._token_bytes = token_bytes
        self._piece: list[tuple[int, Said]] = []
        self._is_number = False

    def feed(self, tokens: Sequence[tuple[int, TokenTrace]]) -> str:
        """What is to be told after some more tokens, each with its trace of one candidate or more."""
        return "".join(self._read(tokens))

    def finish(self) -> str:
        """What is left to be told at the end."""
        told, self._piece = self._tell(), []
        return told

    def _read(self, tokens: Sequence[tuple[int, TokenTrace]]) -> Iterator[str]:
        for token, trace in tokens:
            said = [candidates[0][0] for candidates in trace]
            is_number = (self._token_bytes(token) or b"").isdigit()
            belongs = is_number or _changed(token, said)  # to some piece
            if not belongs or is_number != self._is_number:
                yield self.finish()
            if belongs:
                self._piece.append((token, said))
            self._is_number = is_number

    def _tell(self) -> str:
        if not any(_changed(token, said) for token, said in self._piece):
            return ""
        reply = self._spell([token for token, _ in self._piece])
        most = max(len(said) for _, said in self._piece)
        stages = [self._spell([said[min(step, len(said) - 1)] for _, said in self._piece]) for step in range(most)]
        told, first = [f"the backbone said {stages[0]}"], 1
        for stage, same in groupby(stages[1:]):
            last = first + len(list(same)) - 1
            told.append(f"{f'step {first}' if first == last else f'steps {first} to {last}'} {stage}")
            first = last + 1
        return f"In place of {reply} {', '.join(told)}.\n"

    def _spell(self, tokens: Sequence[int]) -> str:
        text = b"".join(self._token_bytes(token) or b"" for token in tokens).decode(errors="replace")
        return '"' + text.replace("\n", "⏎") + '"'


def _changed(token: int, said: Said) -> bool:
    """Whether the last step's candidate, which was said, is not that of all stages. Else a form or a dice chose."""
    return said[-1] == token and any(each != token for each in said)
