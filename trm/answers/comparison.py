r"""What counts as the same answer.

`key` is for voting: answers with equal keys are one vote. `same` is for grading. It also accepts what only another
reading makes equal: `(A) 18` answers A and 18, `5 m` is five metres or 5·m, `1,234` a number or two of them. It does
not accept two values with different names, `x = 5` and `y = 5`, which are one vote.
`canonical` is for people: what was written, tidied, and the plainest spelling of a number.
"""

import math
from collections.abc import Hashable, Iterator
from decimal import Decimal
from fractions import Fraction
from itertools import product

from trm.answers.boxes import extract_boxed
from trm.answers.grammar import read, split_choice
from trm.answers.lists import is_claim
from trm.answers.rules import both_signs, is_name, is_near, label, normal, number, subject
from trm.answers.spelling import MAX_CHARS, plain, tidy
from trm.answers.tokens import Tokens, tokenize
from trm.answers.tree import Node, Tree
from trm.answers.words import LETTERS, asked_units

_NOTHING = (Node("list", ()), Node("text", ()))


def is_correct(reply: str, gold: str | int | Fraction | Decimal, question: str = "") -> bool:
    r"""Whether the box of a whole reply has the gold answer.

    A gold text is a bare answer, a boxed one, or a GSM8K answer with its `####`. The question says what it wants
    counted. A gold that says nothing has no right answer. Raises TypeError for a gold of another type.
    """
    answer = gold_answer(gold)
    box = extract_boxed(reply)
    return box is not None and not _says_nothing(answer) and same(box, answer, question)


def gold_answer(gold: str | int | Fraction | Decimal) -> str:
    """The answer that a gold states, as text."""
    if isinstance(gold, str):
        return gold.rpartition("####")[2] if "####" in gold else extract_boxed(gold) or gold
    if isinstance(gold, Decimal):
        return str(gold)
    if isinstance(gold, (int, Fraction)) and not isinstance(gold, bool):
        digits = [f"{Decimal(part):f}" for part in gold.as_integer_ratio()]  # str() of an int takes 4300 at most
        return digits[0] if digits[1] == "1" else "/".join(digits)
    raise TypeError(f"a gold answer is a str, int, Fraction or Decimal, not {type(gold).__name__}")


def canonical(answer: str) -> str:
    """One spelling per number (integer, terminating decimal, else `a/b`); anything else as it was written, tidied."""
    plainly = normalize(answer)
    if isinstance(plainly, str):
        return plainly
    rest, places = plainly.denominator, 0
    while (factor := math.gcd(rest, 10)) > 1:
        rest, places = rest // factor, places + 1
    if places == 0 or rest > 1:
        return str(plainly)
    digits = str(abs(plainly.numerator) * 10**places // plainly.denominator).rjust(places + 1, "0")
    return f"{'-' if plainly < 0 else ''}{digits[:-places]}.{digits[-places:]}"


def normalize(answer: str) -> Fraction | str:
    """The number that an answer plainly is, else what was written, tidied."""
    tokens = _tokens(answer)
    if tokens is None or split_choice(tokens.tokens)[0] is not None:
        return tidy(answer)
    plainly = number(read(tokens.tokens))
    return tidy(answer) if plainly is None else plainly


def key(answer: str, question: str = "") -> Hashable:
    """Equal for answers that are one vote. A multiple-choice letter stands for its value, too: `(A) 18` votes for A."""
    tokens = _tokens(answer)
    if tokens is None:
        return _long(answer)
    letter, rest = split_choice(tokens.tokens)
    return value(read(rest, asked=asked_units(question))) if letter is None else letter


def same(one: str, other: str, question: str = "") -> bool:
    """Whether two answers are the same, in one of the ways in which each can be read."""
    if _tokens(one) is None or _tokens(other) is None:
        return key(one, question) == key(other, question)
    if one == other or any(value(left) == value(right) for left, right in pairs(one, other, question)):
        return True
    # the one without a letter and a value may be that letter
    return [_choice(one), _choice(other)].count(None) == 1 and key(one, question) == key(other, question)


def pairs(one: str, other: str, question: str = "") -> Iterator[tuple[Tree, Tree]]:
    """The readings of two answers that may be compared, as trees: none where `x = 5` meets `y = 5`, or A meets B."""
    ours, theirs = trees(one, question), trees(other, question)
    if not ours or not theirs or other_choice(one, other):
        return
    if not _contradict(_name(ours[0]), _name(theirs[0])):
        named = [_named(ours[0]), _named(theirs[0])]
        several = all(named) and max(map(len, named)) > 1
        yield from zip(ours[:1], theirs[:1], strict=True) if several else product(ours, theirs)


def other_choice(one: str, other: str) -> bool:
    """Whether two answers give their values under different letters: `(A) 18` and `(B) 18`."""
    return len({_choice(one), _choice(other)} - {None}) > 1


def _choice(answer: str) -> str | None:
    """The letter of a multiple-choice answer that gives its value, too."""
    tokens = _tokens(answer)
    return None if tokens is None else split_choice(tokens.tokens)[0]


def trees(answer: str, question: str = "") -> list[Tree]:
    """Every way in which an answer can be read, the likeliest first; not in normal form. No way if it says nothing.

    Beyond the kinds of `grammar` there is "in order": a list that may be meant as it is written.
    """
    tokens = _tokens(answer)
    if tokens is None:
        return []
    _, rest = split_choice(tokens.tokens)
    asked = asked_units(question)
    found = [read(rest, asked=asked)]
    if found[0] in _NOTHING:
        return []
    if any(token.kind == "name" and token.text in LETTERS for token in rest):
        found.append(read(rest, letter_units=False, asked=asked))
    ways = [way for tree in found for way in (tree, *_otherwise(tree))]
    return ways + _separated(answer, asked) if tokens.grouped else ways


def _separated(answer: str, asked: frozenset[str]) -> list[Tree]:
    """An answer whose commas may group thousands, as the list that they separate: `1,234`, but not `1,001`."""
    _, rest = split_choice(tokenize(plain(answer), group=False).tokens)
    padded = any(token.kind == "number" and token.text[:1] == "0" and token.text[1:2].isdigit() for token in rest)
    tree = read(rest, asked=asked)
    return [] if padded or not isinstance(tree, Node) else [Node("in order", tree.parts)]


def _tokens(answer: str) -> Tokens | None:
    """The tokens of an answer, None where it is too long to be read."""
    if len(answer) > MAX_CHARS:
        return None
    text = plain(answer)
    return tokenize(text) if len(text) <= 2 * MAX_CHARS else None


def _says_nothing(answer: str) -> bool:
    """Whether an answer is only blanks, separators and dress."""
    tokens = _tokens(answer)
    return not answer.strip() if tokens is None else read(tokens.tokens) in _NOTHING


def _long(answer: str) -> Tree:
    return Node("text", (" ".join(answer.split()).casefold(),))


def value(tree: Tree) -> Tree:
    """The normal form of a whole answer, both values of one with ±."""
    return normal(Node("list", (tree,)) if len(both_signs(tree)) > 1 else tree)


def _name(tree: Tree) -> Tree | None:
    """What must not differ beside the value: x of `x = 5` and `x < 5`, and the half of the day of `9 a.m.`."""
    if isinstance(tree, Node) and tree.kind == "time":
        return tree.parts[1]
    name = subject(tree)
    return None if name is None else normal(name)


def _contradict(one: Tree | None, other: Tree | None) -> bool:
    """Whether two names are of two things: x and y, `f(x)` and `f'(x)`. But y and `f(x)` may be one."""
    if isinstance(one, Node) and isinstance(other, Node):
        return one != other and one.kind == other.kind and len(one.parts) == len(other.parts)
    return isinstance(one, str) and isinstance(other, str) and one != other


def _otherwise(tree: Tree) -> Iterator[Tree]:
    """What else an answer as it was read may mean."""
    if not isinstance(tree, Node):
        return
    if tree.kind == "list":
        yield Node("in order", tree.parts)
        values = [_assigned(part) for part in tree.parts]
        if None not in values:
            yield Node("in order", tuple(one for one in values if one is not None))  # x = 1, y = 2 as 1, 2
        if any(map(is_claim, tree.parts)):
            yield Node("all", tree.parts)  # x > 1, x < 2
    elif tree.kind == "time":
        yield tree.parts[0]  # 9 a.m. as 9
    elif tree.kind == "chain":
        if tree.parts[-2] == "≈" and is_near(normal(tree.parts[-3]), normal(tree.parts[-1])):
            yield tree.parts[-1]
        interval = _interval(normal(tree))
        if interval is not None:
            yield interval


def _named(tree: Tree) -> set[Tree | None]:
    """What the members of a list give values to: x and y of `x = 1, y = 2`."""
    return {label(part) for part in tree.parts} - {None} if isinstance(tree, Node) and tree.kind == "list" else set()


def _assigned(tree: Tree) -> Tree | None:
    return tree.parts[-1] if isinstance(tree, Node) and label(tree) is not None else None


def _interval(tree: Tree) -> Tree | None:
    """Where an inequality puts what it names: `0 < x <= 1` as (0, 1]."""
    if not isinstance(tree, Node) or tree.kind != "chain" or not set(tree.parts[1::2]) <= {"<", "≤"}:
        return None
    named = [is_name(part) for part in tree.parts[::2]]
    low: Tree = normal(Node("negative", ("∞",)))
    if named == [True, False]:
        below, closing, high = "<", tree.parts[1], tree.parts[2]
    elif named == [False, True]:
        low, below, closing, high = tree.parts[0], str(tree.parts[1]), "<", "∞"
    elif named == [False, True, False]:
        low, below, closing, high = tree.parts[0], str(tree.parts[1]), tree.parts[3], tree.parts[4]
    else:
        return None
    return Node(f"tuple {'(' if below == '<' else '['}{')' if closing == '<' else ']'}", (low, high))
