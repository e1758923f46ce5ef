"""Values of OpenAI's own Python types: each alternative of each part once, so that none of them goes unseen."""

import types
import typing
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal, Required

from openai._types import SequenceNotStr
from typing_extensions import get_type_hints, is_typeddict

DEPTH = 6  # of TypedDicts in one another
PLAIN: dict[Any, list[Any]] = {str: ["a"], int: [1], float: [0.5], bool: [True, False], object: [{}], Any: [{}]}


def examples(kind: Any, depth: int = 0) -> Iterator[Any]:
    """Some values of a type: each alternative of each part of it once."""
    if kind in PLAIN:
        yield from PLAIN[kind]
    elif kind is types.NoneType:
        yield None
    elif is_typeddict(kind):
        yield from dicts(kind, depth)
    elif (origin := typing.get_origin(kind)) is Literal:
        yield from typing.get_args(kind)
    elif origin in (typing.Union, types.UnionType):
        for alternative in typing.get_args(kind):
            yield from examples(alternative, depth)
    elif origin in (list, Iterable, Sequence, SequenceNotStr):
        yield []
        yield from ([item] for item in examples(typing.get_args(kind)[0], depth))
    elif origin is dict:
        yield {}
        yield from ({"a": value} for value in examples(typing.get_args(kind)[1], depth))
    else:
        raise AssertionError(f"no examples of {kind}")


def dicts(kind: Any, depth: int) -> Iterator[dict[str, Any]]:
    """The least one, then each field in turn with each of its values."""
    hints = get_type_hints(kind)
    least = {name: next(examples(hints[name], depth + 1)) for name in required(kind)}
    yield least
    if depth < DEPTH:
        for name, hint in hints.items():
            yield from (least | {name: value} for value in examples(hint, depth + 1))


def required(kind: Any) -> list[str]:
    """The keys that one must have. OpenAI's annotations are strings, in which `Required` hides from typing itself."""
    hints = get_type_hints(kind, include_extras=True)
    said: dict[str, Any] = {name: typing.get_origin(hint) for name, hint in hints.items()}
    return [name for name in hints if name in kind.__required_keys__ or said[name] is Required]


def fields(params: Any) -> list[tuple[str, Any]]:
    """Each field of a request with each of its values, null among them; not the model, which is the server's."""
    hints = get_type_hints(params)
    return [(name, value) for name, hint in hints.items() for value in (None, *examples(hint)) if name != "model"]
