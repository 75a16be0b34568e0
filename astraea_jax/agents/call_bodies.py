"""The calls that stand between the opening and the closing tag of a format."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from astraea_jax.agents.call_json import read_values, without_fence
from astraea_jax.agents.call_values import tagged_values, with_json_strings
from astraea_jax.agents.json_calls import (
    MAX_CALL_CHARS,
    SEPARATOR,
    ToolCall,
    arguments_of,
    bare_calls,
    call_of,
    calls_in,
    checked,
    flat,
    reason,
    refused,
)
from astraea_jax.agents.response_templates import ResponseTemplateField, parse_content, process_field

WHOLE = {"type": "function", "function": "{content}"}
NAMED = {"type": "function", "function": {"name": "{name}", "arguments": "{content}"}}
NEXT_CALL = re.compile(r"""("(?:[^"\\]|\\.)*+"?+|'(?:[^'\\]|\\.)*+'?+)|\)\s*+(?=[A-Za-z_])""", re.DOTALL)
"""A string, which is kept (also one without an end, so that the search is linear), or what stands between two calls."""


@dataclass(frozen=True)
class Tools:
    """The tools that a model has.

    Args:
        names: of all; None: not known.
        properties: schemas of the arguments of each tool.
    """

    names: Collection[str] | None = None
    properties: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    @classmethod
    def of(cls, schemas: Sequence[Mapping[str, Any]]) -> Tools:
        """Collect the tools of OpenAI-shaped function schemas; anything else is left out."""
        properties: dict[str, Mapping[str, Any]] = {}
        for schema in schemas:
            function = schema.get("function", schema)
            if isinstance(function, Mapping) and isinstance(name := function.get("name"), str):
                parameters = function.get("parameters", function.get("input_schema"))
                given = parameters.get("properties") if isinstance(parameters, Mapping) else None
                properties[name] = given if isinstance(given, Mapping) else {}
        return cls(tuple(properties), properties)


def read_body(form: ResponseTemplateField, captures: Mapping[str, str], body: str, tools: Tools) -> list[ToolCall]:
    """Return the calls in ``body``, which a region of the field ``form`` holds.

    Args:
        form: the field.
        captures: named groups of its opening tag.
        body: text of the region.
        tools: tell the types of arguments.

    Raises:
        ValueError: it cannot be read.
        RecursionError: the nesting is too deep.
    """
    if len(body) > MAX_CALL_CHARS:
        raise ValueError(f"{len(body)} characters; at most {MAX_CALL_CHARS} are read")
    name = captures.get("name", "").strip()
    if form.content == "python-call-list":
        return python_calls(body)
    if form.content == "json" and form.transform == WHOLE:
        return calls_in(body)
    if form.content == "json" and form.transform == NAMED:
        return [checked(name, _named_arguments(body, form.content_args))]
    if form.content == "xml-inline" and form.transform == NAMED:
        values = tagged_values(body, form.content_args["tag_pattern"], tools.properties.get(name, {}))
        return [checked(name, values)]
    try:
        value = process_field(body, form, dict(captures))
    except Exception as error:  # whatever a stranger's specification leads to
        raise ValueError(_first_line(error)) from error
    return [call_of(call) for call in flat([value])]


def read_item(form: ResponseTemplateField, captures: Mapping[str, str], body: str, tools: Tools) -> list[ToolCall]:
    """Read ``body`` as :func:`read_body` does, or the calls at the end of a list that has begun before it."""
    try:
        return read_body(form, captures, body, tools)
    except ValueError:
        if not body.rstrip().endswith("]"):
            raise
        return read_body(form, captures, f"[{body}", tools)


def python_calls(body: str) -> list[ToolCall]:
    """Read calls in Python's syntax: ``[price(item="lamp"), stock()]``, or each in its own line without brackets.

    Raises:
        ValueError: it is something else.
        RecursionError: the nesting is too deep.
    """
    text = body.strip()
    if not text.startswith("["):
        text = f"[{NEXT_CALL.sub(lambda found: found[1] or '),', text)}]"
    try:
        return [checked(call["name"], call["arguments"]) for call in flat(parse_content(text, "python-call-list", {}))]
    except ValueError as error:
        raise ValueError(_first_line(error).removeprefix("python-call-list: ")) from error


def unmarked_calls(content: str, text: str, tools: Tools) -> list[ToolCall]:
    """Return the calls of a text that is nothing but calls without any tag, or none."""
    if content == "json":
        return bare_calls(text, tools.names)
    if len(text) > MAX_CALL_CHARS:
        return []
    try:
        calls = python_calls(text)
    except (ValueError, RecursionError) as error:
        known = re.match(r"\s*\[\s*([\w.-]+)\(", text)
        return [refused(reason(error))] if known and known[1] in (tools.names or ()) else []
    return calls if tools.names is None or any(call.name in tools.names for call in calls) else []


def _named_arguments(body: str, form: Mapping[str, Any]) -> dict[str, Any]:
    text = without_fence(body)
    if delimiters := form.get("string_delims", []):
        text = with_json_strings(text, delimiters, form.get("unquoted_keys", False))
    if not text:
        return {}
    values = read_values(text, SEPARATOR)
    if len(values) != 1:
        raise ValueError("the arguments must be one object")
    return arguments_of("arguments", values[0])


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0][:200]
