"""Reads JSON schemas as schemas, and prepares them for the library that makes grammars of them.

Knows which keywords hold schemas, and nothing of the library but what it does with some of them. An unknown `format`
is an annotation and goes. A subschema that no finite text meets is made unsatisfiable, so that no reply nests for ever
in it; unknown keywords count as met, for the library refuses what it does not keep. Raises BadRequest where nothing
finite is left. All lists of keywords end here; nothing else walks a schema.
"""

import math
from collections.abc import Iterable, Iterator
from decimal import Decimal
from typing import Any
from urllib.parse import unquote

from trm.errors import BadRequest

MAX_DEPTH = 127  # what the library reads
MAX_MULTIPLE = 10_000  # the library needs a state for every remainder, and no limit of its own stops it in time
MAX_CONNECTIONS = 200_000  # between schemas that are looked at for endless ones: a fifth of a second
MAX_PARTS = 16  # of a schema, under allOf or behind $ref, and alternatives, that are looked at together
MAX_OPTIONAL = 400  # properties of one object: the library looks at all of them at once, and at no more than about 500
LARGE = 10**18  # the library's integers have 64 bits
FORMATS = {"date", "date-time", "duration", "email", "hostname", "ipv4", "ipv6", "time", "unknown", "uri", "uuid"}
"""Those that the library keeps."""

SINGLE = (
    *("additionalItems", "additionalProperties", "contains", "contentSchema", "else", "if", "items", "not"),
    *("propertyNames", "then", "unevaluatedItems", "unevaluatedProperties"),
)
LISTS = ("allOf", "anyOf", "items", "oneOf", "prefixItems")
MAPS = ("$defs", "definitions", "dependencies", "dependentSchemas", "patternProperties", "properties")
LOWER, UPPER = ("minimum", "exclusiveMinimum"), ("maximum", "exclusiveMaximum")
TYPES = ("array", "boolean", "integer", "null", "number", "object", "string")
Schema = dict[str, Any]


class Refused(BadRequest):
    """A grammar that cannot be kept to. param: the field that asks for it."""

    def __init__(self, reason: str, param: str | None = "response_format") -> None:
        super().__init__(f"{param} cannot be served: {reason}", param=param)
        self.reason = reason


def prepare(schema: Schema) -> list[int | float]:
    """Change a freshly read schema, in place, so that the library makes the right grammar of it.

    Returns the numbers that it names, in `enum`s and `const`s.
    """
    nodes = _Nodes(schema)
    if math.lcm(*nodes.multiples()) > MAX_MULTIPLE:
        raise Refused(f"the least common multiple of its multipleOf values is above {MAX_MULTIPLE}")
    named = [number for node in nodes for number in _numbers([node.get("const"), node.get("enum")])]
    for number in named:
        if not _is_exact(number):
            raise Refused(f"{number} has more digits than a double keeps")
    for node in nodes:
        if isinstance(node.get("format"), str) and node["format"] not in FORMATS:
            del node["format"]
        if (optional := _num_optional(node)) > MAX_OPTIONAL:
            raise Refused(f"an object has {optional} optional properties; the limit is {MAX_OPTIONAL}: require some")
        if _allows_any_name(node.get("propertyNames")):
            del node["propertyNames"]
    _bound_multiples(nodes, named)
    _Finiteness(nodes).prune()
    return named


def _num_optional(node: Schema) -> int:
    properties, required = node.get("properties"), node.get("required")
    if not isinstance(properties, dict):
        return 0
    return len(properties.keys() - set(map(str, required if isinstance(required, list) else ())))


def _allows_any_name(names: Any) -> bool:
    """Whether `propertyNames` says nothing. The library does not know it, and zod writes it for every record."""
    known = {"type": "string"}
    return names is True or (isinstance(names, dict) and all(known.get(key) == names[key] for key in names))


def check_depth(schema: Any) -> None:
    """Raise BadRequest where values nest too deeply to be read."""
    level = [schema]
    for _ in range(MAX_DEPTH):
        inside = (value.values() if isinstance(value, dict) else value for value in level)
        level = [value for values in inside for value in values if isinstance(value, dict | list)]
        if not level:
            return
    raise Refused(f"it nests more than {MAX_DEPTH} levels deep")


class _Nodes:
    """The schemas that are objects inside a schema, itself included: where keywords hold them and where $refs lead."""

    def __init__(self, root: Schema) -> None:
        self.root = root
        self._targets: dict[int, Any] = {}  # by the id of the schema that holds the $ref; None: not found
        self._pointed: set[int] = set()  # the ids of those schemas that $refs point to
        self._seen: dict[int, Schema] = {}
        waiting: list[tuple[Any, Schema]] = [(root, root)]  # each with the schema that its $refs start from
        while waiting:
            node, base = waiting.pop()
            if not isinstance(node, dict) or id(node) in self._seen:
                continue
            self._seen[id(node)] = node
            base = node if isinstance(node.get("$id"), str) else base
            waiting += ((child, base) for child in _children(node))
            if "$ref" in node:
                target = _target(node["$ref"], base)
                self._targets[id(node)] = target
                self._pointed.add(id(target))
                waiting.append((target, base))

    def __iter__(self) -> Iterator[Schema]:
        return iter(self._seen.values())

    def target(self, node: Schema) -> Any:
        """What its $ref points to: a schema, or None where there is no $ref or it is not followed here."""
        return self._targets.get(id(node))

    def is_target(self, node: Schema) -> bool:
        """Whether a $ref points to it."""
        return id(node) in self._pointed

    def multiples(self) -> Iterator[int]:
        """The numbers behind `multipleOf`, without their decimal point. Those that a $ref may hide are not missed."""
        hidden = any(target is None for target in self._targets.values())
        for node in _objects(self.root) if hidden else self:
            value = node.get("multipleOf")
            if _is_number(value):
                digits, exponent = Decimal(repr(value)).as_tuple()[1:]
                yield int("".join(map(str, digits))) * 10 ** max(0, int(exponent))


class _Finiteness:
    """Which schemas some finite text meets: the least fixed point, in time linear in the number of connections.

    Schemas are gates in a circuit: a gate opens when as many of its inputs are open as it needs. What only opens if it
    was open before stays shut.
    """

    def __init__(self, nodes: _Nodes) -> None:
        self._nodes = nodes
        self._left = MAX_CONNECTIONS
        self._needs: list[int] = []
        self._feeds: list[list[int]] = []  # the gates that each gate is an input of
        self._open, self._shut = self._gate(0), self._gate(1)
        self._of = {id(node): self._gate(0) for node in nodes}
        self._branches: list[tuple[Schema, int]] = []  # under anyOf and oneOf, each beside its siblings
        for node in nodes:
            self._build(node)
        self._flow()

    def prune(self) -> None:
        """Make unsatisfiable what no finite text meets. Raises BadRequest where that is the whole schema.

        What is inside stays in its place, for a $ref may point there.
        """
        if self._is_shut(self._of[id(self._nodes.root)]):
            raise Refused("no finite text meets the schema: what it requires never ends, or contradicts itself")
        shut = [node for node in self._nodes if self._is_shut(self._of[id(node)])]
        shut += (node for node, gate in self._branches if self._is_shut(gate) and not self._nodes.is_target(node))
        for node in shut:
            node["allOf"] = [*_list(node, "allOf"), False]

    def _is_shut(self, gate: int) -> bool:
        return self._needs[gate] > 0

    def _gate(self, need: int, inputs: Iterable[int] = ()) -> int:
        gate = len(self._needs)
        self._needs.append(0)
        self._feeds.append([])
        self._connect(gate, need, inputs)
        return gate

    def _connect(self, gate: int, need: int, inputs: Iterable[int]) -> None:
        self._needs[gate] = need
        for feeding in inputs:
            self._left -= 1
            self._feeds[feeding].append(gate)
        if self._left < 0:
            raise Refused("its parts have too much to do with one another; make it simpler")

    def _all(self, inputs: list[int]) -> int:
        return self._gate(len(inputs), inputs)

    def _any(self, inputs: Iterable[int]) -> int:
        return self._gate(1, inputs)

    def _gate_of(self, schema: Any) -> int:
        """Whatever is no schema counts as met."""
        return self._shut if schema is False else self._of.get(id(schema), self._open)

    def _flow(self) -> None:
        opened = [gate for gate, need in enumerate(self._needs) if need <= 0]
        while opened:
            for gate in self._feeds[opened.pop()]:
                self._needs[gate] -= 1
                if self._needs[gate] == 0:
                    opened.append(gate)

    def _build(self, node: Schema) -> None:
        parts = self._parts(node)
        inputs = [self._shape(parts), *(self._gate_of(child) for child in _list(node, "allOf"))]
        if (target := self._nodes.target(node)) is not None:
            inputs.append(self._gate_of(target))
        for keyword in ("anyOf", "oneOf"):
            if isinstance(branches := node.get(keyword), list):
                together = parts if len(branches) <= MAX_PARTS else []
                inputs.append(self._any([self._branch(together, branch) for branch in branches]))
        self._connect(self._of[id(node)], len(inputs), inputs)

    def _branch(self, parts: list[Schema], branch: Any) -> int:
        """A schema under anyOf or oneOf, met together with the parts around it."""
        gate = self._gate_of(branch)
        if parts and isinstance(branch, dict):
            gate = self._all([gate, self._shape([*parts, *self._parts(branch)])])
            self._branches.append((branch, gate))
        return gate

    def _parts(self, node: Schema) -> list[Schema]:
        """The schemas that a text must meet to meet `node`, itself included, as far as they are many."""
        parts, seen = [node], {id(node)}
        for part in parts:
            for other in (*_list(part, "allOf"), self._nodes.target(part)):
                if isinstance(other, dict) and id(other) not in seen and len(parts) < MAX_PARTS:
                    seen.add(id(other))
                    parts.append(other)
        return parts

    def _shape(self, parts: list[Schema]) -> int:
        """Some value of a type that all parts allow."""
        types = set.intersection(*map(_types, parts))
        return self._any([self._typed(type_, parts) for type_ in types])

    def _typed(self, type_: str, parts: list[Schema]) -> int:
        match type_:
            case "object":
                return self._object(parts)
            case "array":
                return self._array(parts)
        return self._open

    def _object(self, parts: list[Schema]) -> int:
        least = max(_bounds(parts, "minProperties"), default=0)
        required = {name for part in parts for name in _list(part, "required") if isinstance(name, str)}
        inputs: list[int] = []
        for part in parts:
            properties, patterns = _map(part, "properties"), _map(part, "patternProperties")
            others = [] if patterns else [part.get("additionalProperties", True)]  # a pattern may match any name
            for name in required if properties or others != [True] else ():
                inputs += map(self._gate_of, [properties[name]] if name in properties else others)
            if least:
                gates = [self._gate_of(child) for child in properties.values()]
                more = [*patterns.values(), part.get("additionalProperties", True)]
                inputs.append(self._any([self._gate(math.ceil(least), gates), *map(self._gate_of, more)]))
        return self._all(inputs)

    def _array(self, parts: list[Schema]) -> int:
        least = math.ceil(max(_bounds(parts, "minItems"), default=0))
        inputs: list[int] = []
        for part in parts:
            first, rest = self._items(part)
            inputs += map(self._gate_of, first[:least] + ([rest] if least > len(first) else []))
        return self._all(inputs)

    def _items(self, part: Schema) -> tuple[list[Any], Any]:
        """The schemas of the first items, and of all behind them. Old drafts write them differently."""
        items = part.get("items", True)
        if isinstance(items, list):
            return items, part.get("additionalItems", True)
        old = "additionalItems" in part or "2020-12" not in str(self._nodes.root.get("$schema", "2020-12"))
        return ([] if old else _list(part, "prefixItems")), items


def _children(node: Schema) -> Iterator[Any]:
    """The schemas right inside `node`."""
    for keyword, value in node.items():
        if keyword in MAPS and isinstance(value, dict):
            yield from value.values()
        elif keyword in LISTS and isinstance(value, list):
            yield from value
        elif keyword in SINGLE:
            yield value


def _target(reference: Any, base: Schema) -> Any:
    """What a reference points to: a place in `base`. None for other references, and for a place that is not there."""
    if not isinstance(reference, str) or not (reference == "#" or reference.startswith("#/")):
        return None
    found: Any = base
    for step in unquote(reference[1:]).split("/")[1:]:
        step = step.replace("~1", "/").replace("~0", "~")
        if isinstance(found, dict) and step in found:
            found = found[step]
        elif isinstance(found, list) and step.isdecimal() and len(step) < 6 and int(step) < len(found):
            found = found[int(step)]
        else:
            return None
        if found is not base and isinstance(found, dict) and isinstance(found.get("$id"), str):
            return None  # from here on the library would start from there
    return found


def _types(node: Schema) -> set[str]:
    """The types of what `node` allows, as far as it names them or values."""
    declared = node.get("type")
    types = {declared} if isinstance(declared, str) else set(map(str, _list(node, "type") or TYPES))
    if "number" in types:
        types.add("integer")
    if "const" in node:
        types &= {*_types_of(node["const"])}
    if isinstance(values := node.get("enum"), list):
        types &= {type_ for value in values for type_ in _types_of(value)}
    return types


def _types_of(value: Any) -> tuple[str, ...]:
    match value:
        case None:
            return ("null",)
        case bool():
            return ("boolean",)
        case str():
            return ("string",)
        case list():
            return ("array",)
        case dict():
            return ("object",)
    return ("number", "integer") if value == int(value) else ("number",)


def _bound_multiples(nodes: _Nodes, named: list[int | float]) -> None:
    """Bounds for multiples, which could else be sought for ever, unless the schema speaks of as large numbers."""
    spoken = [*named, *(node[key] for node in nodes for key in (*LOWER, *UPPER) if _is_number(node.get(key)))]
    if max(map(abs, spoken), default=0) > LARGE // 2:
        return
    for node in nodes:
        if "multipleOf" in node:
            for keys, bound in ((LOWER, -LARGE), (UPPER, LARGE)):
                if not any(key in node for key in keys):
                    node[keys[0]] = bound


def _is_exact(number: int | float) -> bool:
    """Whether the library writes it as it is. It writes integers of 64 bits out, and of others a double's digits."""
    try:
        double = float(number)
    except OverflowError:
        return False
    if isinstance(number, float):
        return True
    return int(double) == number if abs(number) < 2**63 else Decimal(repr(double)) == number


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _bounds(parts: list[Schema], keyword: str) -> Iterator[float]:
    return (part[keyword] for part in parts if _is_number(part.get(keyword)))


def _numbers(value: Any) -> Iterator[int | float]:
    """The numbers inside a JSON value."""
    if isinstance(value, dict | list):
        for inside in value.values() if isinstance(value, dict) else value:
            yield from _numbers(inside)
    elif _is_number(value):
        yield value


def _objects(value: Any) -> Iterator[Schema]:
    """The objects inside a JSON value, itself included, whether they are schemas or not."""
    if isinstance(value, dict):
        yield value
    if isinstance(value, dict | list):
        for inside in value.values() if isinstance(value, dict) else value:
            yield from _objects(inside)


def _list(node: Schema, keyword: str) -> list[Any]:
    value = node.get(keyword)
    return value if isinstance(value, list) else []


def _map(node: Schema, keyword: str) -> dict[str, Any]:
    value = node.get(keyword)
    return value if isinstance(value, dict) else {}
