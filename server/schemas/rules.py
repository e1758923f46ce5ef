"""Rules between the fields of one body: what is checked is what the JSON schema says, as far as tools understand that.

`null` is as good as absent.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

JSONSchema = dict[str, Any]


@dataclass(frozen=True)
class Rule:
    """A body that it does not hold for is refused with `message`, for the field `param`.

    `schema` says the same, or nothing where that would be too much for tools.
    """

    param: str
    message: str
    holds: Callable[[Any], bool]
    schema: JSONSchema


def at_most_one(first: str, second: str, param: str) -> Rule:
    """Not both fields."""
    return Rule(
        param,
        f"give either {first} or {second}, not both",
        lambda body: getattr(body, first) is None or getattr(body, second) is None,
        {"anyOf": [_absent(first), _absent(second)]},
    )


def at_least_one(first: str, second: str) -> Rule:
    """One of the fields, or both."""
    return Rule(
        first,
        f"give either {first} or {second}",
        lambda body: getattr(body, first) is not None or getattr(body, second) is not None,
        {"anyOf": [_present(first), _present(second)]},
    )


def needs(field: str, other: str) -> Rule:
    """A field only with another one."""
    return Rule(
        field,
        f"{field} needs {other}",
        lambda body: getattr(body, field) is None or getattr(body, other) is not None,
        {"anyOf": [_absent(field), _present(other)]},
    )


def needs_true(field: str, switch: str) -> Rule:
    """A field, unless it says false or 0, only where a switch is on."""
    off: JSONSchema = {"properties": {field: {"enum": [None, False, 0]}}}
    on: JSONSchema = {"properties": {switch: {"const": True}}, "required": [switch]}
    return Rule(
        field,
        f"{field} needs {switch}: true",
        lambda body: not getattr(body, field) or getattr(body, switch) is True,
        {"anyOf": [off, on]},
    )


def _absent(field: str) -> JSONSchema:
    return {"properties": {field: {"type": "null"}}}


def _present(field: str) -> JSONSchema:
    return {"properties": {field: {"not": {"type": "null"}}}, "required": [field]}
