"""What the members of a list are to each other: apart, told apart by their words, or one claim together."""

from collections.abc import Sequence
from typing import NamedTuple

from trm.answers.tree import Node, Tree, Unreadable
from trm.answers.words import BESIDE, HEDGES

_INEQUALITIES = frozenset("<>≤≥≠")
_JOINTS = {"and": "all", "∧": "all", "or": "any", "∨": "any"}


class Member(NamedTuple):
    """One of a list: what was read, and the words that stood before it and behind it, as `length: 3` and `3 boys`."""

    tree: Tree
    before: str
    behind: str


def joined(members: Sequence[Member], separators: set[str]) -> list[Tree]:
    """The trees of members, by names if their words differ; or the one tree of claims that `and` or `or` joins.

    Raises Unreadable for claims that are joined by both.
    """
    claims = any(is_claim(one.tree) for one in members)
    sentences = not separators.isdisjoint("∧∨") and any(isinstance(one.tree, str) for one in members)
    joints = {_JOINTS[separator] for separator in separators if separator in _JOINTS}
    if joints and (claims or sentences):
        if len(joints) > 1:
            raise Unreadable
        return [Node(joints.pop(), tuple(one.tree for one in members))]
    for names in ([one.before for one in members], [one.behind for one in members]):
        if len({*names} - {""}) > 1:
            return [_named(name, one.tree) for name, one in zip(names, members, strict=True)]
    return [one.tree for one in members]


def is_claim(tree: Tree) -> bool:
    """Whether a tree is an inequality: two of them are another thing together than apart."""
    return isinstance(tree, Node) and tree.kind == "chain" and not _INEQUALITIES.isdisjoint(tree.parts[1::2])


def _named(name: str, tree: Tree) -> Tree:
    """A member as the value of a name, unless it has one, as `x = 5 cm`."""
    if not name or (isinstance(tree, Node) and tree.kind in ("chain", "text")):
        return tree
    return Node("chain", (name, "=", tree))


def spoken(words: Sequence[str]) -> str:
    """What words say of a number beyond that it is one: not `the`, nor `about`."""
    return " ".join(word for word in words if word not in BESIDE and word not in HEDGES)
