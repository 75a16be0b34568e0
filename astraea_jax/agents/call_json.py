"""JSON as models write it: read where it can have one meaning only, refused otherwise."""

from __future__ import annotations

import json
import math
import re
from typing import Any, NoReturn

STRING = r'"(?:[^"\\]|\\.)*+"'

# Strings with either quote (also one without an end, which keeps the search linear), commas, and Python's constants.
LOOSE = re.compile(
    r"""(?P<quote>["'])(?P<text>(?:\\.|(?!(?P=quote))[^\\])*+)(?P<end>(?P=quote))?+
    | (?P<leading>[\[{:,]\s*+,)
    | (?P<trailing>,\s*+(?=[}\]]))
    | \b(?P<constant>True|False|None)\b""",
    re.DOTALL | re.VERBOSE,
)
CONSTANTS = {"True": "true", "False": "false", "None": "null"}
ESCAPES = re.compile(r'\\.|"', re.DOTALL)


def read_values(text: str, separator: re.Pattern[str]) -> list[Any]:
    """Read one or more JSON values, with anything that ``separator`` matches around them.

    Control characters in strings are read as they are. So are, if there is no other way, trailing commas, strings in
    single quotes and Python's ``True``, ``False`` and ``None``.

    Raises:
        ValueError: the text is something else, or a key appears twice in an object, or a number is not finite.
        RecursionError: the nesting is too deep.
    """
    try:
        return _values(text, separator)
    except ValueError as error:
        strict = LOOSE.sub(_strict, text)
        if strict == text:
            raise
        try:
            return _values(strict, separator)
        except ValueError:
            raise error from None  # its position is one in the text as it was written


def without_fence(text: str) -> str:
    """Return the text inside a Markdown code fence, or all of it."""
    text = text.strip()
    if len(text) < 6 or not (text.startswith("```") and text.endswith("```")):
        return text
    return re.sub(r"\A\w*+", "", text[3:-3]).strip()


def _values(text: str, separator: re.Pattern[str]) -> list[Any]:
    values: list[Any] = []
    at = _skip(text, 0, separator)
    while at < len(text) or not values:
        value, at = DECODER.raw_decode(text, at)
        values.append(value)
        at = _skip(text, at, separator)
    return values


def _skip(text: str, at: int, separator: re.Pattern[str]) -> int:
    while (found := separator.match(text, at)) and found.end() > at:
        at = found.end()
    return at


def _strict(found: re.Match[str]) -> str:
    """Turn one piece of Python-like JSON into JSON."""
    if found["constant"]:
        return CONSTANTS[found["constant"]]
    if found["trailing"]:
        return found["trailing"][1:]
    if found["leading"] or not found["end"]:
        return found[0]
    return '"' + ESCAPES.sub(lambda escape: {"\\'": "'", '"': '\\"'}.get(escape[0], escape[0]), found["text"]) + '"'


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _finite(digits: str) -> float:
    number = float(digits)
    if not math.isfinite(number):
        raise ValueError(f"{digits[:30]} is too large a number")
    return number


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value: dict[str, Any] = {}
    for key, part in pairs:
        if key in value:
            raise ValueError(f"the key {key!r} appears twice")
        value[key] = part
    return value


DECODER = json.JSONDecoder(
    strict=False, parse_constant=_refuse_constant, parse_float=_finite, object_pairs_hook=_unique
)
