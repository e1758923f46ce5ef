"""What an answer is: numbers, names, and structures of them. Trees that are equal are equal answers (`rules`)."""

from fractions import Fraction
from typing import NamedTuple, TypeAlias


class Node(NamedTuple):
    """A structure. kind: "sum", "quotient", "tuple (]", …; what the parts mean depends on it (`grammar`)."""

    kind: str
    parts: "tuple[Tree, ...]"


Tree: TypeAlias = Fraction | str | Node  # a str is a name: a letter, a command or a word


class Unreadable(Exception):
    """These tokens are no mathematics that we know. Never leaves `grammar.read`."""
