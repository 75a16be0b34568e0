"""Arguments that models write in tags, with types that only the tool's schema tells, and JSON with other quotes."""

from __future__ import annotations

import functools
import json
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

import regex

from astraea_jax.agents.call_json import read_values

INTEGER = re.compile(r"-?(?:0|[1-9][0-9]*)(?:\.0+)?")
NUMBER = re.compile(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?")
NOTHING = re.compile(r"\s+")
MAX_SCHEMA_DEPTH = 8
JSON_TYPES = {dict: "object", list: "array", str: "string", bool: "boolean", int: "integer", float: "number"}


def tagged_values(body: str, tag_pattern: str, properties: Mapping[str, Any]) -> dict[str, Any]:
    """Read arguments in tags, such as ``<parameter=item>lamp</parameter>``.

    Args:
        body: tags, with nothing but whitespace in between.
        tag_pattern: matches one; has the groups ``key`` and ``value``, and perhaps ``string``, which is ``"true"`` or
            ``"false"``.
        properties: schemas of the arguments by name.

    Raises:
        ValueError: there is something else, such as a tag without its end, or a key appears twice.
    """
    pattern = _compiled(tag_pattern)
    values: dict[str, Any] = {}
    at = _after_space(body, 0)
    while at < len(body):
        found = pattern.match(body, at)
        if found is None or found.end() == at:
            raise ValueError(f"no whole argument at {body[at : at + 40]!r}")
        key = found["key"].strip()
        if key in values:
            raise ValueError(f"the key {key!r} appears twice")
        is_string = found.groupdict().get("string")
        schema = {"type": "string"} if is_string == "true" else properties.get(key)
        values[key] = typed(found["value"], schema)
        at = _after_space(body, found.end())
    return values


def typed(raw: str, schema: Any) -> Any:
    """Return the value that ``raw`` means under a JSON schema; the text itself if it means no other.

    Without a type in the schema it is what it is as JSON, unless that is a string. Where several types are allowed, a
    string is the last choice.
    """
    types = set(_types(schema, MAX_SCHEMA_DEPTH))
    text = raw.strip()
    if (not types or "null" in types) and text in ("null", "None"):
        return None
    if types == {"string"}:
        return raw
    if (not types or types & {"integer", "number"}) and NUMBER.fullmatch(text):
        if "number" not in types and types and not INTEGER.fullmatch(text):
            return raw
        number = float(text)
        if INTEGER.fullmatch(text) and ("integer" in types or "." not in text):
            return int(text.partition(".")[0]) if len(text) < 1000 else raw
        return number if math.isfinite(number) else raw
    if (not types or "boolean" in types) and text.lower() in ("true", "false"):
        return text.lower() == "true"
    if (not types or types & {"object", "array"}) and text[:1] in ("{", "["):
        return _structure(text, types or {"object", "array"}, raw)
    return raw


def with_json_strings(body: str, delimiters: list[list[str]], unquoted_keys: bool) -> str:
    """Turn JSON with its strings between other delimiters, or with keys without quotes, into JSON."""

    def replaced(found: regex.Match[str]) -> str:
        if found["key"] is not None:
            return found["space"] + json.dumps(found["key"])
        return found[0] if found["text"] is None else json.dumps(found["text"], ensure_ascii=False)

    return _strings(json.dumps(delimiters), unquoted_keys).sub(replaced, body)


@functools.lru_cache(64)
def _strings(delimiters: str, unquoted_keys: bool) -> regex.Pattern[str]:
    strings = [f"{regex.escape(begin)}(?P<text>.*?){regex.escape(end)}" for begin, end in json.loads(delimiters)]
    key = r"(?<=[{,])(?P<space>\s*+)(?P<key>[\w.$-]++)(?=\s*+:)" if unquoted_keys else "(?P<key>(?!))"
    return regex.compile("|".join([*(strings or ["(?P<text>(?!))"]), r'"(?:[^"\\]|\\.)*+"?+', key]), regex.DOTALL)


@functools.lru_cache(64)
def _compiled(pattern: str) -> regex.Pattern[str]:
    return regex.compile(pattern, regex.DOTALL)


def _after_space(text: str, at: int) -> int:
    found = NOTHING.match(text, at)
    return found.end() if found else at


def _structure(text: str, types: set[str], raw: str) -> Any:
    try:
        [value] = read_values(text, NOTHING)
    except ValueError:
        return raw
    return value if JSON_TYPES.get(type(value)) in types else raw


def _types(schema: Any, depth: int) -> Iterator[str]:
    """Return the JSON types that a schema allows; none: it does not say."""
    if not isinstance(schema, Mapping) or depth == 0:
        return
    declared = schema.get("type")
    yield from (item for item in (declared if isinstance(declared, list) else [declared]) if isinstance(item, str))
    for union in ("anyOf", "oneOf", "allOf"):
        for choice in schema[union] if isinstance(schema.get(union), list) else []:
            yield from _types(choice, depth - 1)
    if schema.get("nullable") is True:
        yield "null"
    if declared is None:
        yield from (
            name for key, name in (("$ref", "object"), ("properties", "object"), ("items", "array")) if key in schema
        )
        values = (
            schema["enum"] if isinstance(schema.get("enum"), list) else [schema["const"]] if "const" in schema else []
        )
        yield from (JSON_TYPES.get(type(value), "null") for value in values)
