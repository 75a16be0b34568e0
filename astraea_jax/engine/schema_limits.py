"""Checks JSON schemas and Lark grammars before they are compiled, so that none takes long or much memory.

The compiler has limits of its own, which count its work. Here is what they miss: texts that are read before anything is
counted, and the few constructs whose cost grows with a number in the text instead of its length.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from decimal import Decimal
from typing import Any

from astraea_jax.errors import RequestError, shown

MAX_SCHEMA_CHARS = 131_072
MAX_LARK_CHARS = 16_384
MAX_REGEX_CHARS = 8_192
MAX_NODES = 10_000
"""Values in a schema."""

MAX_DEPTH = 64
MAX_LITERAL_CHARS = 4_096
"""Length of a string that becomes part of the grammar, such as a value of an enum."""

MAX_DIVISOR = 1_000
"""Multiples of n are recognised by n states, and multiples of several numbers by their least common multiple."""

MAX_PROPERTIES = 400
"""Properties of an object, all of which may come next if none is required."""

MAX_PATTERNS = 16
"""Patterns for keys of an object, which are compared in pairs."""

ANNOTATIONS = ("description", "title", "default", "$comment", "$schema", "$id")
"""Keys whose strings do not become part of the grammar."""


def checked_schema(schema: Any) -> dict[str, Any]:
    """The schema as plain JSON.

    Args:
        schema: an object, or its JSON text.

    Raises:
        RequestError: it is no object, no JSON, or beyond a limit; the message says which.
    """
    if isinstance(schema, str):
        _limit("the JSON schema", len(schema), MAX_SCHEMA_CHARS, "characters")
        try:
            schema = json.loads(schema)
        except (ValueError, RecursionError) as error:
            raise RequestError(f"the JSON schema is no JSON: {_line(error)}") from None
    if not isinstance(schema, dict):
        raise RequestError(f"the JSON schema is {shown(schema)}; it must be an object")
    divisors = [1]
    for key, value in _walk(schema):
        if isinstance(value, str) and key not in ANNOTATIONS:
            _limit("a string in the JSON schema", len(value), MAX_LITERAL_CHARS, "characters")
        elif key in ("properties", "patternProperties") and isinstance(value, dict):
            _limit(key, len(value), MAX_PROPERTIES if key == "properties" else MAX_PATTERNS, "entries")
        elif key == "multipleOf" and isinstance(value, int | float):
            divisors.append(_divisor(value))
    if math.lcm(*divisors) > MAX_DIVISOR:
        raise RequestError(f"the least common multiple of the digits of all multipleOf exceeds {MAX_DIVISOR}")
    try:
        text = json.dumps(schema, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise RequestError(f"the JSON schema is no JSON: {_line(error)}") from None
    _limit("the JSON schema", len(text), MAX_SCHEMA_CHARS, "characters")
    plain: dict[str, Any] = json.loads(text)
    return plain


def checked_lark(source: Any) -> str:
    """The Lark grammar, whose ``%json`` schemas are within the limits of schemas.

    Raises:
        RequestError: it is no text, or beyond a limit; the message says which.
    """
    source = _checked_text("the Lark grammar", source, MAX_LARK_CHARS)
    for embedded in source.split("%json")[1:]:
        try:
            schema, _ = json.JSONDecoder().raw_decode(embedded.lstrip())
        except (ValueError, RecursionError) as error:
            raise RequestError(f"%json in the Lark grammar is no JSON: {_line(error)}") from None
        checked_schema(schema)
    return source


def checked_regex(pattern: Any) -> str:
    """The regular expression.

    Raises:
        RequestError: it is no text, or too long.
    """
    return _checked_text("the regular expression", pattern, MAX_REGEX_CHARS)


def _checked_text(what: str, text: Any, limit: int) -> str:
    if not isinstance(text, str):
        raise RequestError(f"{what} is {shown(text)}; it must be a string")
    _limit(what, len(text), limit, "characters")
    if any("\ud800" <= char <= "\udfff" for char in text):
        raise RequestError(f"{what} has half a surrogate pair, which is no text")
    return text


def _walk(schema: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Every value in the schema with the key that it stands under, keys themselves included."""
    nodes = 0
    pending: list[tuple[str, Any, int]] = [("", schema, 0)]
    while pending:
        key, value, depth = pending.pop()
        nodes += 1
        _limit("the JSON schema", nodes, MAX_NODES, "values")
        _limit("the JSON schema", depth, MAX_DEPTH, "levels")
        yield key, value
        if isinstance(value, dict):
            for name, inner in value.items():
                if not isinstance(name, str):
                    raise RequestError(f"the JSON schema has the key {shown(name)}; keys are strings")
                yield "", name
                pending.append((name, inner, depth + 1))
        elif isinstance(value, list | tuple):
            pending += [(key, inner, depth + 1) for inner in value]


def _divisor(value: float) -> int:
    """The number without its decimal point, which is what its multiples are recognised by."""
    if not 0 < value <= MAX_DIVISOR:
        raise RequestError(f"multipleOf is {shown(value)}; it must be above 0 and at most {MAX_DIVISOR}")
    divisor = Decimal(str(value)).normalize()
    exponent = divisor.as_tuple().exponent
    return int(divisor.scaleb(max(0, -exponent))) if isinstance(exponent, int) else 1


def _limit(what: str, count: int, limit: int, unit: str) -> None:
    if count > limit:
        raise RequestError(f"{what} has more than {limit} {unit}, which is the most that is served")


def _line(error: Exception) -> str:
    return "nested too deeply" if isinstance(error, RecursionError) else str(error).split("\n", 1)[0][:200]
