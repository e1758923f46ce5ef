"""Whether two answers are equal by algebra: `x+1` and `1+x`, `\\frac{\\sqrt3}{2}` and `\\frac12\\sqrt3`. Needs sympy.

Reads the trees of `trm.answers`. What it says may take forever or all memory, and may raise anything, so it runs in a
process of its own (`training.evaluation.algebra`), as `python -m training.evaluation.symbolic SECONDS BYTES`: one
question a line, one verdict a line.
"""

import json
import random
import resource
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from itertools import pairwise

import sympy

from trm.answers.commands import INVERSES, NAMES
from trm.answers.comparison import other_choice, pairs, trees, value
from trm.answers.grammar import FUNCTION_NAMES
from trm.answers.lists import is_claim
from trm.answers.rules import normal, subject
from trm.answers.tree import Node, Tree

Equality = Callable[[Tree, Tree], bool]

_SCALES = (1, 3, 30, 1000, Fraction(1, 30))  # how far from zero two expressions are compared
_DIGITS = 40
_CERTAIN_BITS = 16  # a number other than zero has more, unless it is small beside what cancels
_LITTLE, _MUCH = -130, 1000  # powers of two, 10^-40 and 10^300
_BENT = (sympy.Abs, sympy.Max, sympy.Min, sympy.floor, sympy.ceiling, sympy.sign)  # one thing here, another there
_CONSTANTS = {"\\pi": sympy.pi, "∞": sympy.oo, "e": sympy.E, "i": sympy.I}
_FUNCTIONS = {"ln": sympy.log, "lg": lambda x: sympy.log(x, 10), "max": sympy.Max, "min": sympy.Min, "gcd": sympy.gcd}
_FUNCTIONS |= {"lcm": sympy.lcm} | {arc: getattr(sympy, f"a{name}") for name, arc in INVERSES.items()}
_BINDERS = ("\\sum", "\\prod", "\\int", "\\lim")  # these reach to the end of their product
_RELATIONS = {"<": sympy.Lt, "≤": sympy.Le, "=": sympy.Eq, "≠": sympy.Ne}


class Inexpressible(Exception):
    """A tree for which there is no sympy expression."""


def equal(answer: str, gold: str, question: str = "") -> bool:
    """Whether algebra finds an answer and a gold equal, in one of the ways in which each can be read."""
    if other_choice(answer, gold):
        return False
    first = zip(trees(answer, question)[:1], trees(gold, question)[:1], strict=False)
    if any(_attempt(_equal_relations, *logs) for pair in first for logs in _with_logarithms(*pair)):
        return True
    readings = ((value(one), value(other)) for one, other in pairs(answer, gold, question))
    return any(_attempt(equal_values, *logs) for pair in readings for logs in _with_logarithms(*pair))


def _with_logarithms(one: Tree, other: Tree) -> Iterator[tuple[Tree, Tree]]:
    r"""Two trees with a base for their `\log`: 10, and e unless one of them says `\ln` as well."""
    ten = (_log_as("lg", one), _log_as("lg", other))
    yield ten
    if ten != (one, other) and not any(name in repr((one, other)) for name in ("'ln'", "('log', 'e')")):
        yield _log_as("ln", one), _log_as("ln", other)


def _log_as(name: str, tree: Tree) -> Tree:
    if tree == "log":
        return name
    if not isinstance(tree, Node) or (tree.kind == "sub" and tree.parts[0] == "log"):
        return tree
    return Node(tree.kind, tuple(_log_as(name, part) for part in tree.parts))


def _attempt(compare: Equality, one: Tree, other: Tree) -> bool:
    try:
        return compare(one, other)
    except (Inexpressible, ArithmeticError, ValueError, TypeError, AttributeError, NotImplementedError, RecursionError):
        return False


def equal_values(one: Tree, other: Tree) -> bool:
    """Two normal trees: structures member by member, everything else as expressions, matrices or sets."""
    if one == other:
        return True
    if isinstance(one, Node) and isinstance(other, Node) and one.kind == other.kind:
        if len(one.parts) == len(other.parts) and (
            one.kind.startswith("tuple") or one.kind in ("in order", "matrix", "row", "named")
        ):
            return all(_attempt(equal_values, *pair) for pair in zip(one.parts, other.parts, strict=True))
        if one.kind in ("set", "∪", "all") and _matched(one.parts, other.parts):
            return True
        if one.kind in ("chain", "equation") and _attempt(_equal_relations, one, other):
            return True
    return any(_attempt(compare, one, other) for compare in (_equal_expressions, _equal_matrices, _equal_sets))


def _matched(ours: Sequence[Tree], theirs: Sequence[Tree]) -> bool:
    """Whether each member has a partner of its own. Equality is transitive, so the first that fits will do."""
    left = list(theirs)
    for one in ours:
        partner = next((other for other in left if _attempt(equal_values, one, other)), None)
        if partner is None:
            return False
        left.remove(partner)
    return not left


# Expressions


def expression(tree: Tree) -> sympy.Expr:
    """The sympy expression of a tree, exact; nothing is evaluated that `trm.answers` found too large."""
    if isinstance(tree, Fraction):
        return sympy.Rational(tree.numerator, tree.denominator)
    if isinstance(tree, str):
        if tree[0] == "\\" and tree[-1] != "}" and tree not in NAMES.values():
            raise Inexpressible  # \\subset and \\forall are no factors; \\mathcal{F} may be one
        return _CONSTANTS.get(tree) or sympy.Symbol(tree)
    kind, parts = tree.kind, tree.parts
    if kind in ("sum", "mixed"):
        return sympy.Add(*map(expression, parts))
    if kind == "negative":
        return -expression(parts[0])
    if kind == "product":
        return _product(parts)
    if kind == "quotient":
        return expression(parts[0]) / expression(parts[1])
    if kind == "power":
        return _power(parts[0], parts[1])
    if kind == "root":
        degree = expression(parts[1])
        return sympy.sqrt(expression(parts[0])) if degree == 2 else expression(parts[0]) ** (1 / degree)
    if kind == "abs":
        return sympy.Abs(expression(parts[0]))
    if kind == "!":
        return sympy.factorial(expression(parts[0]))
    if kind == "binom":
        return sympy.binomial(*map(expression, parts))
    if kind in ("⌊", "⌈"):
        return (sympy.floor if kind == "⌊" else sympy.ceiling)(expression(parts[0]))
    if kind == "call":
        return _call(parts[0], parts[1])
    if kind in ("sub", "'", "overline", "vec", "hat", "tilde"):
        return sympy.Symbol(repr(normal(tree)))
    raise Inexpressible


def _product(factors: Sequence[Tree]) -> sympy.Expr:
    for index, factor in enumerate(factors):
        if _is_binder(factor):
            rest = expression(Node("product", tuple(factors[index + 1 :])))
            bound = sympy.Function("bound")(sympy.Symbol(repr(normal(factor))), rest)
            return sympy.Mul(*map(expression, factors[:index]), bound)
    return sympy.Mul(*map(expression, factors))


def _is_binder(tree: Tree) -> bool:
    while isinstance(tree, Node) and tree.kind in ("power", "sub"):
        tree = tree.parts[0]
    return tree in _BINDERS


def _power(base: Tree, exponent: Tree) -> sympy.Expr:
    if _is_binder(base):
        raise Inexpressible
    power = sympy.Pow(expression(base), expression(exponent), evaluate=not isinstance(base, Fraction))
    return (
        power
        if isinstance(base, Fraction) and isinstance(exponent, Fraction) and exponent.denominator == 1
        else power.doit()
    )


def _call(function: Tree, of: Tree) -> sympy.Expr:
    arguments = of.parts if isinstance(of, Node) and of.kind.startswith("tuple") else (of,)
    values = [expression(argument) for argument in arguments]
    if isinstance(function, Node) and function.kind == "sub" and function.parts[0] == "log":
        return sympy.log(values[0], expression(function.parts[1]))
    if not isinstance(function, str):
        raise Inexpressible
    if function in FUNCTION_NAMES:
        return sympy.Function(function)(*values)
    return (_FUNCTIONS.get(function) or getattr(sympy, function))(*values)


def _equal_expressions(one: Tree, other: Tree) -> bool:
    return is_zero(expression(one) - expression(other))


def is_zero(difference: sympy.Expr) -> bool:
    """Whether an expression vanishes at several points, to many digits; what that cannot show, simplifying must.

    Points where it is not real do not count, unless it is complex by what is written. They show nothing if fewer than
    two count, or if the expression is bent: it may be zero at every one of them and not beyond.
    """
    if difference == 0:
        return True
    if difference.has(sympy.zoo, sympy.nan) or difference.has(sympy.oo):
        return False
    vanished = 0
    for point in _points(sorted(difference.free_symbols, key=str)):
        at_point = _evaluated(difference.subs(point))
        if not at_point.is_number or at_point.has(sympy.nan, sympy.zoo, sympy.oo):
            continue
        real, imaginary = map(_vanishes, at_point.as_real_imag())
        if imaginary or difference.has(sympy.I):
            if not (real and imaginary):
                return False
            vanished += 1
    if vanished > 1 and not _is_bent(difference):
        return True
    real_symbols = {symbol: sympy.Symbol(symbol.name, real=True) for symbol in difference.free_symbols}
    return any(sympy.simplify(one) == 0 for one in (difference, difference.subs(real_symbols)))


def _is_bent(difference: sympy.Expr) -> bool:
    """Whether it has an absolute value, rounding, … or a root of a power, of something unknown."""
    roots = (power.base for power in difference.atoms(sympy.Pow) if power.exp.is_Rational and not power.exp.is_Integer)
    bent = {base for base in roots if any(inner.exp.is_even for inner in base.atoms(sympy.Pow))}
    return any(one.free_symbols for one in bent | difference.atoms(*_BENT))


def _evaluated(number: sympy.Expr) -> sympy.Expr:
    """An expression without unknowns, worked out; what cancels, to so many digits that little can be left of it.

    No number where that would take too many.
    """
    found = number.evalf(_DIGITS)
    left = max((part._mpf_[2] for part in found.atoms(sympy.Float) if _cancelled(part)), default=_LITTLE)
    if left > _MUCH:
        return sympy.nan
    return found if left <= _LITTLE else number.evalf(_DIGITS, maxn=300 + max(left, 0) // 3)


def _vanishes(number: sympy.Expr) -> bool:
    """Whether a number that was worked out is zero, as far as can be told."""
    return bool(number == 0) or (isinstance(number, sympy.Float) and _cancelled(number) and number._mpf_[2] < 0)


def _cancelled(number: sympy.Float) -> bool:
    """Whether hardly a digit is certain: it is zero, or smaller than the power of two in its `_mpf_`."""
    return bool(number._prec < _CERTAIN_BITS)


def _points(symbols: Sequence[sympy.Symbol]) -> list[dict[sympy.Symbol, sympy.Rational]]:
    """Where to look: near zero and far from it, above, below and on both sides, the same in every run."""
    draw = random.Random(0)
    return [
        {symbol: sign() * sympy.Rational(draw.randint(50, 400), 202) * scale for symbol in symbols}
        for scale in _SCALES
        for sign in (lambda: 1, lambda: -1, lambda: draw.choice((1, -1)))
    ]


# Equations and inequalities


def _equal_relations(one: Tree, other: Tree) -> bool:
    """Whether one is a multiple of the other: `2x = 4` and `x - 2 = 0`, `x < 1` and `-x > -1`."""
    (relation, ours), (as_well, theirs) = _relation(one), _relation(other)
    if relation != as_well or not ours.free_symbols or ours.free_symbols != theirs.free_symbols:
        return False
    ratio = sympy.simplify(ours / theirs)
    return bool(ratio.is_number and ratio != 0 and ratio.is_finite and (relation in "=≠" or ratio.is_positive))


def _relation(tree: Tree) -> tuple[str, sympy.Expr]:
    """An equation or inequality of two sides as `=`, `<`, … and what is compared with zero."""
    if isinstance(tree, Node) and tree.kind == "equation" and len(tree.parts) == 2:
        return "=", expression(tree.parts[0]) - expression(tree.parts[1])
    if not isinstance(tree, Node) or tree.kind != "chain" or len(tree.parts) != 3:
        raise Inexpressible
    left, relation, right = tree.parts[0], str(tree.parts[1]), tree.parts[2]
    if relation in (">", "≥"):
        left, relation, right = right, {">": "<", "≥": "≤"}[relation], left
    if relation not in _RELATIONS:
        raise Inexpressible
    return relation, expression(left) - expression(right)


# Matrices and sets


def _equal_matrices(one: Tree, other: Tree) -> bool:
    ours, theirs = _matrix(one), _matrix(other)
    if not isinstance(ours, sympy.MatrixBase) or not isinstance(theirs, sympy.MatrixBase) or ours.shape != theirs.shape:
        return False
    return all(map(is_zero, ours - theirs))


def _matrix(tree: Tree) -> sympy.MatrixBase | sympy.Expr:
    """A matrix, or a number or expression to multiply one with."""
    if not isinstance(tree, Node) or "matrix" not in repr(tree):
        return expression(tree)
    if tree.kind == "matrix":
        return sympy.Matrix([[expression(cell) for cell in row.parts] for row in tree.parts if isinstance(row, Node)])
    if tree.kind not in ("sum", "product", "negative"):
        raise Inexpressible
    total, *others = map(_matrix, tree.parts)
    for other in others:
        total = total + other if tree.kind == "sum" else total * other
    return -total if tree.kind == "negative" else total


def _equal_sets(one: Tree, other: Tree) -> bool:
    names = {name for tree in (one, other) if (name := subject(tree)) is not None}
    return len(names) < 2 and bool(_set(one) == _set(other))


def _set(tree: Tree) -> sympy.Set:
    """A set of reals: intervals, finite sets, their unions, and where an inequality in one variable holds.

    An empty one says nothing: it may be a point in the plane, `(3, 2)`.
    """
    if tree == "\\mathbb{R}":
        return sympy.S.Reals
    if not isinstance(tree, Node):
        raise Inexpressible
    if tree.kind == "∪":
        return sympy.Union(*map(_set, tree.parts))
    if tree.kind in ("all", "set") and any(map(is_claim, tree.parts)):
        return _joined(tree)
    if tree.kind == "set":
        members = sympy.FiniteSet(*map(expression, tree.parts))
        if len(members) < len(tree.parts):
            raise Inexpressible  # a list, which has something twice
        return members
    if tree.kind.startswith("tuple ") and len(tree.parts) == 2:
        low, high = map(expression, tree.parts)
        found = sympy.Interval(low, high, left_open="(" in tree.kind, right_open=")" in tree.kind)
        if (
            found is sympy.S.EmptySet
            or ("[" in tree.kind and low == -sympy.oo)
            or ("]" in tree.kind and high == sympy.oo)
        ):
            raise Inexpressible
        return found
    if tree.kind == "chain" and set(tree.parts[1::2]) <= _RELATIONS.keys():
        return _solutions(tree)
    raise Inexpressible


def _joined(tree: Node) -> sympy.Set:
    """Where all claims about one variable hold, or one of them; values beside them are its values."""
    [_] = {symbol.name for part in tree.parts if isinstance(part, Node) and is_claim(part) for symbol in _free(part)}
    parts = [_set(part) if is_claim(part) else sympy.FiniteSet(expression(part)) for part in tree.parts]
    return (sympy.Intersection if tree.kind == "all" else sympy.Union)(*parts)


def _free(chain: Node) -> set[sympy.Symbol]:
    """The variables of a chain's sides."""
    return set().union(*(expression(part).free_symbols for part in chain.parts[::2]))


def _solutions(chain: Node) -> sympy.Set:
    sides = [expression(part) for part in chain.parts[::2]]
    [symbol] = _free(chain)
    real = sympy.Symbol(symbol.name, real=True)
    sides = [side.subs(symbol, real) for side in sides]
    relations = [str(part) for part in chain.parts[1::2]]
    holds = [_RELATIONS[relation](*pair) for relation, pair in zip(relations, pairwise(sides), strict=True)]
    found = sympy.And(*holds).as_set()
    if found is sympy.S.EmptySet:
        raise Inexpressible
    return found


# The process


def math_verify(answer: str, gold: str) -> bool:
    """What Math-Verify says: a control."""
    from math_verify import parse, verify  # of the extra `algebra`

    return bool(verify(parse(f"${gold}$"), parse(rf"\boxed{{{answer}}}")))


def main() -> None:
    seconds, num_bytes = int(sys.argv[1]), int(sys.argv[2])
    resource.setrlimit(resource.RLIMIT_AS, (num_bytes, num_bytes))
    print(json.dumps("ready"), flush=True)  # noqa: T201
    for line in sys.stdin:
        by, answer, gold, question = json.loads(line)
        signal.alarm(seconds)  # if nobody is left to kill us
        try:
            verdict = equal(answer, gold, question) if by == "algebra" else math_verify(answer, gold)
        except MemoryError:
            sys.exit("out of memory")  # the judge sees us gone
        except Exception:  # noqa: BLE001  # a verdict of its own: they could not be found equal
            verdict = False
        signal.alarm(0)
        print(json.dumps(verdict), flush=True)  # noqa: T201


if __name__ == "__main__":
    main()
