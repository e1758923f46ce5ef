"""A tree to its normal form: equal answers, equal trees.

Arithmetic on numbers is done, exactly and as far as its results stay small. A product begins with its number, signs
included; the terms of a sum and the members of a set have no order. A chain of equalities is its last member, if it
holds. No algebra: `(x+1)^2` stays what it is (`training.evaluation.algebra`).
"""

from collections.abc import Iterable, Sequence
from decimal import Context, Decimal, DecimalException
from fractions import Fraction
from functools import reduce
from math import ceil, comb, factorial, floor

from trm.answers.grammar import FUNCTION_NAMES, MAX_DIGITS
from trm.answers.tree import Node, Tree

_MAX_BITS = MAX_DIGITS * 3  # a number of so many bits has fewer digits
_MAX_FACTORIAL = 170
_MAX_DEGREE = 64
_CONSTANTS = frozenset({"\\pi", "∞", "∅", "\\mathbb{R}", "\\mathbb{Z}", "\\mathbb{N}", "\\mathbb{Q}", "\\mathbb{C}"})
_OF_NAMES = frozenset({"product", "quotient", "ratio", "tuple ()", "abs", "'", "overline", "vec", "hat", "∪ ∩ ∖"})
_UNORDERED = frozenset({"list", "any", "set"})
_EQUAL = frozenset("=≈∈")
_NEAR = Decimal("1e-20")  # two values that differ by a larger part are not equal
_ROUNDED = Decimal("0.05")  # how much an approximation may be off
_DIGITS = Context(prec=40)
_PI = Decimal("3.141592653589793238462643383279502884197")
_REVERSED = {">": "<", "≥": "≤"}


def normal(tree: Tree) -> Tree:
    """The normal form of a tree as it was read; a set of one thing that is no set is that thing."""
    found = _normal(tree)
    if isinstance(found, Node) and found.kind == "set" and len(found.parts) == 1 and not _is_set(found.parts[0]):
        return found.parts[0]
    return found


def _normal(tree: Tree) -> Tree:
    if not isinstance(tree, Node) or tree.kind == "text":
        return tree
    if tree.kind in _UNORDERED:
        return _set(tree.parts, tree.kind)
    if tree.kind == "call":
        return Node("call", tuple(_normal(_in_radians(part)) for part in tree.parts))
    kind, parts = tree.kind, [_normal(part) for part in tree.parts]
    match kind:
        case "sum" | "mixed":
            return _sum(parts)
        case "negative":
            return _product([Fraction(-1), *parts], [])
        case "product":
            return _product(parts, [])
        case "quotient":
            return _product(parts[:1], parts[1:])
        case "power":
            return _power(parts[0], parts[1])
        case "root":
            return _root(parts[0], parts[1])
        case "chain":
            return _chain(parts)
        case "°":
            return parts[0]
        case "tuple ⟨⟩":
            return Node("tuple ()", tuple(parts))
        case "all":
            return Node("all", _ordered(dict.fromkeys(_values(tree.parts))))
        case "∪ ∩ ∖" if set(parts[1::2]) == {"∪"}:
            return Node("∪", _ordered(parts[::2]))
    return _counted(Node(kind, tuple(parts)))


def number(tree: Tree) -> Fraction | None:
    """The number that a tree as it was read *plainly* is: `-3/4`, `1 1/2`, `2 * 10^3`, not `2^10` or `2 * 3`."""
    value = normal(tree)
    return value if isinstance(value, Fraction) and _is_plain(tree, value) else None


def _is_plain(tree: Tree, value: Fraction) -> bool:
    if not isinstance(tree, Node):
        return True
    kind, parts = tree.kind, tree.parts
    if kind == "chain":
        return any(_is_plain(part, value) for part in parts[::2] if normal(part) == value)
    if kind in ("negative", "°", "list"):
        return all(_is_plain(part, value) for part in parts)
    if kind == "quotient":
        return all(isinstance(_unsigned(part), Fraction) for part in parts)
    if kind == "product":
        return len(parts) == 2 and isinstance(parts[0], Fraction) and _is_power_of_ten(parts[1])
    return kind == "mixed" or _is_power_of_ten(tree)


def _is_power_of_ten(tree: Tree) -> bool:
    return isinstance(tree, Node) and tree.kind == "power" and tree.parts[0] == 10


def _unsigned(tree: Tree) -> Tree:
    return tree.parts[0] if isinstance(tree, Node) and tree.kind == "negative" else tree


def label(tree: Tree) -> Tree | None:
    r"""What a member names before it gives the value: x of `x = 5` and `x \in [0, 1]`, f(x) of `f(x) = 2`."""
    if isinstance(tree, Node) and tree.kind == "chain" and tree.parts[1] in _EQUAL and is_name(tree.parts[0]):
        return tree.parts[0]
    return None


def is_name(tree: Tree) -> bool:
    """Whether a tree names something, and computes nothing: `x`, `x_1`, `f(x)`, `(p, q)`, `|AB|`, `A : B`."""
    if isinstance(tree, str):
        return tree not in _CONSTANTS and tree not in ("∪", "∩", "∖")
    if not isinstance(tree, Node):
        return False
    kind, parts = tree.kind, tree.parts
    if kind == "sub":
        return is_name(parts[0])
    if kind == "call":
        function = parts[0]
        while isinstance(function, Node) and function.kind in ("'", "power"):
            function = function.parts[0]  # f'(x), f^{-1}(x)
        return function in FUNCTION_NAMES
    return kind in _OF_NAMES and all(is_name(part) for part in parts if part not in ("∪", "∩", "∖"))


def subject(tree: Tree) -> Tree | None:
    """What a member says something of: x of `x = 5`, and of `1 < x`."""
    name = label(tree)
    if name is None and isinstance(tree, Node) and tree.kind == "chain":
        names = [part for part in tree.parts[::2] if is_name(part)]
        return names[0] if len(names) == 1 else None
    return name


# Arithmetic


def _small(value: Fraction) -> bool:
    return max(abs(value.numerator), value.denominator).bit_length() <= _MAX_BITS


def _sum(parts: Iterable[Tree]) -> Tree:
    total = Fraction(0)
    terms: list[Tree] = []
    for term in _flat(parts, "sum"):
        if isinstance(term, Fraction) and _small(total + term):
            total += term
        else:
            terms.append(term)
    if total != 0 or not terms:
        terms.append(total)
    return terms[0] if len(terms) == 1 else Node("sum", _ordered(terms))


def _product(over: Sequence[Tree], under: Sequence[Tree]) -> Tree:
    """A number, then the factors in their order: letters may be matrices, or the ends of a line."""
    value = Fraction(1)
    top: list[Tree] = []
    bottom: list[Tree] = []
    for factors, rest, mirrored in ((over, top, bottom), (under, bottom, top)):
        for factor in _flat(factors, "product"):
            if isinstance(factor, Node) and factor.kind == "quotient":
                mirrored += _flat(factor.parts[1:], "product")
                numerator = _flat(factor.parts[:1], "product")
            else:
                numerator = [factor]
            for part in numerator:
                if not isinstance(part, Fraction):
                    rest.append(part)
                elif rest is top and _small(value * part):
                    value *= part
                elif rest is bottom and part != 0 and _small(value / part):
                    value /= part
                else:
                    rest.append(part)
    if value != 1 or not top:
        top.insert(0, value)
    whole = top[0] if len(top) == 1 else Node("product", tuple(top))
    if not bottom:
        return whole
    return Node("quotient", (whole, bottom[0] if len(bottom) == 1 else Node("product", tuple(bottom))))


def _power(base: Tree, exponent: Tree) -> Tree:
    if exponent == 1:
        return base
    if isinstance(exponent, Fraction) and exponent.numerator == 1:
        return _root(base, Fraction(exponent.denominator))
    if isinstance(base, Fraction) and isinstance(exponent, Fraction) and exponent.denominator == 1:
        bits = max(abs(base.numerator), base.denominator).bit_length()
        if abs(exponent) * bits <= _MAX_BITS and (base != 0 or exponent > 0):
            return base ** int(exponent)
    return Node("power", (base, exponent))


def _root(of: Tree, degree: Tree) -> Tree:
    if (
        isinstance(of, Fraction)
        and isinstance(degree, Fraction)
        and degree.denominator == 1
        and 0 < degree <= _MAX_DEGREE
    ):
        n, sign = int(degree), -1 if of < 0 else 1
        top, bottom = _whole_root(abs(of.numerator), n), _whole_root(of.denominator, n)
        if top is not None and bottom is not None and (sign > 0 or n % 2 == 1):
            return Fraction(sign * top, bottom)
    return Node("root", (of, degree))


def _whole_root(value: int, degree: int) -> int | None:
    """The root of a whole number that has one, by bisection."""
    low, high = 0, 1 << (value.bit_length() // degree + 1)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if middle**degree <= value else (low, middle - 1)
    return low if low**degree == value else None


def _counted(node: Node) -> Tree:
    """Factorials, binomial coefficients, absolute values and rounding of numbers."""
    kind, numbers = node.kind, [part for part in node.parts if isinstance(part, Fraction)]
    if len(numbers) < len(node.parts) or not numbers:
        return node
    first = numbers[0]
    whole = all(part.denominator == 1 and 0 <= part <= _MAX_FACTORIAL for part in numbers)
    if kind == "!" and whole:
        return Fraction(factorial(int(first)))
    if kind == "binom" and whole:
        return Fraction(comb(int(first), int(numbers[1])))
    if kind == "abs":
        return abs(first)
    if kind in ("⌊", "⌈"):
        return Fraction(floor(first) if kind == "⌊" else ceil(first))
    return node


def _in_radians(tree: Tree) -> Tree:
    """Degrees in the argument of a function are no unit."""
    if not isinstance(tree, Node):
        return tree
    parts = tuple(map(_in_radians, tree.parts))
    return Node("product", (*parts, "\\pi", Fraction(1, 180))) if tree.kind == "°" else Node(tree.kind, parts)


# Chains, sets


def _chain(parts: Sequence[Tree]) -> Tree:
    """What a chain of equalities comes to; other relations point one way, `x < 5` for `5 > x`."""
    members, relations = list(parts[::2]), list(parts[1::2])
    named = 0
    while relations and relations[0] in _EQUAL and is_name(members[0]):
        del members[0], relations[0]
        named += 1
    while relations and relations[-1] == "≈" and is_near(members[-2], members[-1]):
        del members[-1], relations[-1]  # what it approximates is the answer
    if not relations:
        return members[0]
    if set(relations) == {"="}:
        if not _may_hold(members):
            return Node("chain", tuple(parts))
        if all(isinstance(member, Fraction) for member in members) or named or len(members) > 2:
            return members[-1]
        if is_name(members[-1]):
            return members[0]  # 5 = x
        return Node("equation", _ordered(members))
    if set(relations) <= {">", "≥"}:
        members, relations = members[::-1], [_REVERSED[str(relation)] for relation in relations[::-1]]
    elif relations == ["≠"]:
        members = list(_ordered(members))
    woven: list[Tree] = [members[0]]
    for relation, member in zip(relations, members[1:], strict=True):
        woven += [relation, member]
    return Node("chain", tuple(woven))


def is_near(exactly: Tree, roughly: Tree) -> bool:
    """Whether a value may be rounded so, as far as that can be told: `\\pi` to 3, not to 100."""
    exact, rough = _estimate(exactly), _estimate(roughly)
    return exact is None or rough is None or abs(exact - rough) <= _ROUNDED * abs(exact)


def _may_hold(members: Sequence[Tree]) -> bool:
    """False if two of these have different values: `\\pi = 2\\pi`, `\\sqrt{2} = 5`."""
    if len({member for member in members if isinstance(member, Fraction)}) > 1:
        return False
    values = [found for member in members if (found := _estimate(member)) is not None]
    return all(abs(found - values[0]) <= _NEAR * abs(values[0]) for found in values)


def _estimate(tree: Tree) -> Decimal | None:
    """The value of what has no letters, to many digits; it decides only what is *not* equal."""
    if isinstance(tree, Fraction):
        return _DIGITS.divide(Decimal(tree.numerator), Decimal(tree.denominator))
    if not isinstance(tree, Node) or tree.kind not in ("sum", "product", "quotient", "power", "root"):
        return _PI if tree == "\\pi" else None
    values = [_estimate(part) for part in tree.parts]
    known = [found for found in values if found is not None]
    if len(known) < len(values):
        return None
    first, second = known[0], known[1]
    try:
        if tree.kind == "quotient":
            return _DIGITS.divide(first, second)
        if tree.kind == "power":
            return _DIGITS.power(first, second)
        if tree.kind == "root":
            return _DIGITS.power(first, _DIGITS.divide(Decimal(1), second))
        return reduce(_DIGITS.add if tree.kind == "sum" else _DIGITS.multiply, known)
    except DecimalException:  # too large, a root of a negative number, by zero
        return None


def _set(raw: Sequence[Tree], kind: str) -> Tree:
    """Members without order, and both values of a member with ±. A list of one is that one.

    Those of a set count once, and so do points: `(1, 2), (1, 2)` is one solution; `2, 2, 3` are three sides.
    """
    members = _values(raw)
    points = all(isinstance(member, Node) and member.kind.startswith("tuple") for member in members)
    ordered = _ordered(dict.fromkeys(members) if kind != "list" or points else members)
    return ordered[0] if len(ordered) == 1 and kind == "list" else Node("set", ordered)


def _values(raw: Sequence[Tree]) -> list[Tree]:
    """What members come to. Names before values go, `x = 2, x = 3`, unless they tell them apart: `x = 1, y = 2`."""
    apart = len({subject(member) for member in raw} - {None}) > 1
    values: list[Tree] = []
    for member in raw:
        name = label(member)
        for value in dict.fromkeys(map(_normal, both_signs(member))):
            values.append(Node("named", (_normal(name), value)) if name is not None and apart else value)
    return values


def _is_set(tree: Tree) -> bool:
    return tree == "∅" or (isinstance(tree, Node) and tree.kind == "set")


def both_signs(tree: Tree) -> list[Tree]:
    """The two values of a tree with ±, or the one of another; all its ± are plus together, and ∓ the opposite."""
    if not _has_sign(tree):
        return [tree]
    return [_signed(tree, False), _signed(tree, True)]


def _has_sign(tree: Tree) -> bool:
    if not isinstance(tree, Node) or tree.kind in _UNORDERED or tree.kind == "all":
        return False  # the members of a list are taken one by one
    return tree.kind in ("±", "∓") or any(_has_sign(part) for part in tree.parts)


def _signed(tree: Tree, minus: bool) -> Tree:
    if not isinstance(tree, Node):
        return tree
    parts = tuple(_signed(part, minus) for part in tree.parts)
    if tree.kind in ("±", "∓"):
        return Node("negative", parts) if minus == (tree.kind == "±") else parts[0]
    return Node(tree.kind, parts)


def _flat(parts: Iterable[Tree], kind: str) -> list[Tree]:
    """Parts, and in the place of those of that kind theirs."""
    return [one for part in parts for one in (part.parts if isinstance(part, Node) and part.kind == kind else (part,))]


def _ordered(parts: Iterable[Tree]) -> tuple[Tree, ...]:
    return tuple(sorted(parts, key=repr))
