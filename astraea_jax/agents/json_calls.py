"""Calls that a model writes as JSON, such as ``{"name": "price", "arguments": {"item": "lamp"}}``.

Each is read where it can have one meaning only, and refused with a sentence otherwise.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from astraea_jax.agents.call_json import read_values, without_fence

MAX_CALLS = 64
"""Calls of one turn that are run; the rest becomes one call that says so."""

MAX_CALL_CHARS = 65_536
MAX_DEPTH = 32
"""Nesting of arguments, far below where JSON encoders and chat templates run out of stack."""

NAME_KEYS = ("name", "function", "tool", "tool_name", "function_name")
ARGUMENT_KEYS = ("arguments", "parameters", "args", "params", "kwargs", "input")
CALL_TYPES = ("function", "function_call", "tool_call", "tool_use")
EXPECTED = 'expected {"name": "<tool>", "arguments": {…}}'

SEPARATOR = re.compile(r"[\s;,]++|<tool_call>|<\|python_tag\|>|\[TOOL_CALLS\]")
"""Separators of calls; models also forget a closing tag."""
UNREADABLE_BARE = re.compile(
    rf"""[\[{{\s]*+(["'])(?:{"|".join(NAME_KEYS)})\1\s*+:\s*+(["'])(?P<name>[\w-]++)\2.*?["'](?:{"|".join(ARGUMENT_KEYS)})["']\s*:""",
    re.DOTALL,
)


@dataclass(frozen=True)
class ToolCall:
    """One call. With ``error`` set there is nothing to run, and ``name`` is empty."""

    id: str
    """Unique in a conversation; an id that the model wrote is not used."""
    name: str
    arguments: dict[str, Any] = field(default_factory=dict)
    error: str | None = None


def bare_calls(text: str, tools: Collection[str] | None) -> list[ToolCall]:
    """Return the calls of a turn that is nothing but JSON without a tag, or none."""
    body = without_fence(text)
    if not body.startswith(("{", "[")) or len(body) > MAX_CALL_CHARS:
        return []
    try:
        values = flat(read_values(body, SEPARATOR))
    except (ValueError, RecursionError) as error:
        found = UNREADABLE_BARE.match(body)
        return [refused(reason(error))] if found and found["name"] in (tools or ()) else []
    if not any(_is_bare_call(value, tools) for value in values):
        return []
    try:
        return [call_of(value) for value in values]
    except (ValueError, RecursionError) as error:
        return [refused(reason(error))]


def _is_bare_call(value: Any, tools: Collection[str] | None) -> bool:
    if not isinstance(value, dict):
        return False
    value = value["function"] if isinstance(value.get("function"), dict) else value
    names = [key for key in NAME_KEYS if isinstance(value.get(key), str)]
    arguments = [key for key in ARGUMENT_KEYS if key in value]
    if not names or not arguments:
        return False
    if tools is None:
        return len(value) == 2 and isinstance(value[arguments[0]], dict)
    return any(value[key] in tools for key in names)


def calls_in(body: str) -> list[ToolCall]:
    """Return the calls that a text says, each as JSON, or in lists.

    Raises:
        ValueError: it says something else, or what it means is not certain.
        RecursionError: the nesting is too deep.
    """
    if len(body) > MAX_CALL_CHARS:
        raise ValueError(f"{len(body)} characters; at most {MAX_CALL_CHARS} are read")
    return [call_of(value) for value in flat(read_values(without_fence(body), SEPARATOR))]


def flat(values: list[Any]) -> list[Any]:
    """Return the calls themselves, which may stand in lists."""
    flat = [part for value in values for part in (value if isinstance(value, list) else [value])]
    if not flat:
        raise ValueError(EXPECTED)
    return flat


def call_of(value: Any) -> ToolCall:
    """Return the call that a JSON value means.

    Raises:
        ValueError: it means none, or what it means is not certain.
    """
    if not isinstance(value, dict):
        raise ValueError(EXPECTED)
    if isinstance(inner := value.get("function"), dict):  # as OpenAI's API writes calls
        _refuse_unknown(value, {"function"}, labelled=True)
        return call_of(inner)
    names = [key for key in NAME_KEYS if key in value]
    given = [key for key in ARGUMENT_KEYS if key in value]
    if len(names) != 1 or not isinstance(name := value[names[0]], str) or not name:
        raise ValueError(EXPECTED)
    if len(given) > 1:
        raise ValueError(f'both "{given[0]}" and "{given[1]}"; write the arguments once')
    _refuse_unknown(value, {*names, *given}, labelled=bool(given))
    return checked(name, arguments_of(given[0], value[given[0]]) if given else {})


def checked(name: str, arguments: dict[str, Any]) -> ToolCall:
    """Return the call of a tool.

    Raises:
        ValueError: it cannot be written as JSON, or is nested too deeply for those who read it.
    """
    if _deeper_than(arguments, MAX_DEPTH):
        raise ValueError(f"nested too deeply; at most {MAX_DEPTH} levels are read")
    try:
        json.dumps([name, arguments], ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise ValueError("half a surrogate pair in a string") from None
    return ToolCall("", name, arguments)


def _refuse_unknown(call: Mapping[str, Any], known: Collection[str], *, labelled: bool) -> None:
    """Refuse keys that may be arguments in the wrong place; a call that has its arguments may have a type and an id."""
    for key, value in call.items():
        label = (key == "type" and value in CALL_TYPES) or (key in ("id", "call_id") and isinstance(value, str | int))
        if key not in known and not (labelled and label):
            raise ValueError(f'unknown key "{key}" beside "name"; write all arguments into "arguments"')


def arguments_of(key: str, value: Any) -> dict[str, Any]:
    """Read arguments as an object; models also write them as JSON text, and none as null or empty text."""
    if isinstance(value, str):
        try:
            [value] = read_values(without_fence(value), SEPARATOR) if value.strip() else [{}]
        except ValueError:
            raise ValueError(f'"{key}" must be an object') from None
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ValueError(f'"{key}" must be an object')
    return value


def _deeper_than(value: object, levels: int) -> bool:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return levels < 0 or any(_deeper_than(part, levels - 1) for part in inner if isinstance(part, dict | list))


def reason(error: Exception) -> str:
    """Return the sentence that tells a model why its call could not be read."""
    return f"unreadable tool call: {'nested too deeply' if isinstance(error, RecursionError) else error}"


def refused(reason: str) -> ToolCall:
    """Return a call that cannot be run."""
    return ToolCall("", "", error=reason)
