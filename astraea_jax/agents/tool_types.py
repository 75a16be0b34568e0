"""Maps the annotations of a tool's parameters to JSON schemas and to checks of JSON values."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin


class ToolError(TypeError):
    """A function cannot become a tool; the message says which part of it and why."""


@dataclass(frozen=True)
class Kind:
    """One type of argument."""

    schema: Mapping[str, Any]
    """JSON schema."""
    read: Callable[[Any], Any]
    """Converts a JSON value, or raises ``ValueError`` with what was expected."""


def kind_of(annotation: Any, where: str) -> Kind:
    """Return the kind of an evaluated annotation; ``where`` names it in errors.

    Raises:
        ToolError: a type that JSON arguments cannot be checked against.
    """
    if annotation is None:  # as in list[None]; elsewhere typing has made it NoneType
        annotation = NoneType
    if annotation in PLAIN:
        return PLAIN[annotation]
    origin, inner = get_origin(annotation), get_args(annotation)
    if isinstance(annotation, type) and issubclass(annotation, Enum):
        return _choice({member.value: member for member in annotation}, where)
    if origin is Literal:
        return _choice({value: value for value in inner}, where)
    if origin in (Union, UnionType):
        kinds = [kind_of(part, where) for part in inner]
        return _union(sorted(kinds, key=lambda kind: kind is PLAIN[float]))  # last: it would round a large integer
    if origin is list and inner:
        return _list(kind_of(inner[0], where))
    if origin is dict and inner[:1] == (str,):
        return _dict(kind_of(inner[1], where))
    raise ToolError(
        f"{where}: {annotation!r} is not supported; use str, int, float, bool, list[...], dict[str, ...], "
        "Literal, an Enum, or a union of these"
    )


def shown(value: object) -> str:
    """Return a JSON value, cut to a length that fits into an error message."""
    text = json.dumps(value, ensure_ascii=False, default=repr)
    return text if len(text) <= 60 else f"{text[:60]}…"


def _expected(what: str, value: object) -> ValueError:
    return ValueError(f"expected {what}, got {shown(value)}")


def _exactly(python: type, what: str) -> Callable[[Any], Any]:
    def read(value: Any) -> Any:
        if not isinstance(value, python):
            raise _expected(what, value)
        return value

    return read


def _integer(value: Any) -> int:
    if isinstance(value, float) and value.is_integer():  # JSON knows one kind of number: 3.0 is an integer
        return int(value)
    if isinstance(value, bool) or not isinstance(value, int):
        raise _expected("an integer", value)
    return value


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise _expected("a number", value)
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise ValueError("expected a finite number")
    return number


PLAIN: Mapping[Any, Kind] = {
    str: Kind({"type": "string"}, _exactly(str, "a string")),
    bool: Kind({"type": "boolean"}, _exactly(bool, "true or false")),
    int: Kind({"type": "integer"}, _integer),
    float: Kind({"type": "number"}, _number),
    list: Kind({"type": "array"}, _exactly(list, "an array")),
    dict: Kind({"type": "object"}, _exactly(dict, "an object")),
    NoneType: Kind({"type": "null"}, _exactly(NoneType, "null")),
}


def _choice(choices: Mapping[Any, Any], where: str) -> Kind:
    names = {str: "string", bool: "boolean", int: "integer", float: "number", NoneType: "null"}
    types = {names.get(type(value), "") for value in choices}
    if not types or "" in types:
        raise ToolError(f"{where}: choices must be strings, numbers, booleans or None, and at least one")
    by_json = {json.dumps(value): result for value, result in choices.items()}  # keeps 1 and true apart
    what = "one of " + ", ".join(by_json)

    def read(value: Any) -> Any:
        key = json.dumps(value) if isinstance(value, str | int | float | None) else ""
        if key not in by_json:
            raise _expected(what, value)
        return by_json[key]

    schema = {"enum": list(choices)}
    return Kind({"type": types.pop(), **schema} if len(types) == 1 else schema, read)


def _union(kinds: list[Kind]) -> Kind:
    def read(value: Any) -> Any:
        reasons = []
        for kind in kinds:
            try:
                return kind.read(value)
            except ValueError as error:
                reasons.append(str(error))
        raise ValueError("; or ".join(dict.fromkeys(reasons)))

    return Kind({"anyOf": [dict(kind.schema) for kind in kinds]}, read)


def _list(item: Kind) -> Kind:
    def read(value: Any) -> list[Any]:
        values = PLAIN[list].read(value)
        return [_inside(f"item {i}", item, part) for i, part in enumerate(values)]

    return Kind({"type": "array", "items": dict(item.schema)}, read)


def _dict(item: Kind) -> Kind:
    def read(value: Any) -> dict[str, Any]:
        values = PLAIN[dict].read(value)
        return {key: _inside(f"key {shown(key)}", item, part) for key, part in values.items()}

    return Kind({"type": "object", "additionalProperties": dict(item.schema)}, read)


def _inside(where: str, kind: Kind, value: Any) -> Any:
    try:
        return kind.read(value)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
