"""How much two sequences of tokens begin alike, found without reading them.

Each sequence keeps a digest of its every beginning of whole blocks, so two of any length are compared in a few steps,
and only inside the first block that differs token by token. The digests are cryptographic: nobody can write a
prompt that passes for another's.
"""

import hashlib
from array import array
from collections.abc import Iterable, Sequence
from typing import Self

BLOCK = 64  # tokens


class Prefix:
    """Digests of a sequence that grows."""

    def __init__(self, ids: Iterable[int] = ()) -> None:
        self._digests: list[bytes] = []  # of the first block, of the first two, …
        self._hash = hashlib.blake2b(digest_size=16)
        self._rest: list[int] = []  # short of a block
        self.extend(ids)

    def extend(self, ids: Iterable[int]) -> None:
        """Add tokens."""
        self._rest += ids
        whole = len(self._rest) // BLOCK * BLOCK
        for start in range(0, whole, BLOCK):
            self._hash.update(array("q", self._rest[start : start + BLOCK]))
            self._digests.append(self._hash.digest())
        del self._rest[:whole]

    def fork(self) -> Self:
        """A copy that grows on its own; costs far less than reading the tokens again."""
        other = type(self)()
        other._digests, other._hash, other._rest = self._digests.copy(), self._hash.copy(), self._rest.copy()
        return other

    def equal_tokens(self, other: "Prefix", most: int) -> int:
        """How many tokens both certainly begin with alike, in whole blocks, `most` or fewer."""
        ours, theirs = self._digests, other._digests
        equal, different = 0, min(len(ours), len(theirs), most // BLOCK) + 1
        while different - equal > 1:
            middle = (equal + different) // 2
            if ours[middle - 1] == theirs[middle - 1]:
                equal = middle
            else:
                different = middle
        return equal * BLOCK


def common_length(one: Sequence[int], other: Sequence[int]) -> int:
    """How many items two short sequences begin with alike."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((place for place, (ours, theirs) in pairs if ours != theirs), min(len(one), len(other)))
