"""Chat messages as plain data, whatever the caller's messages are made of."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

Message = Mapping[str, Any]
"""A chat message in OpenAI's shape."""

TEXT_PARTS = ("text", "input_text", "output_text")
"""Types of content parts that are text, in OpenAI's Chat Completions and Responses APIs."""

FIELDS = (
    *("role", "content", "reasoning_content", "name", "tool_calls", "tool_call_id"),
    *("id", "type", "function", "arguments", "text"),
)
"""Attributes that are read of an object that is neither a mapping, nor a dataclass, nor has ``model_dump()``."""

REASONING_FIELDS = ("reasoning_content", "thinking", "reasoning")
"""Names under which a message's reasoning travels; templates read the first, or the second (gpt-oss)."""


def normalise_messages(messages: Sequence[Any]) -> list[dict[str, Any]]:
    """Messages as fresh dicts of JSON's types, as chat templates expect them.

    Mappings, dataclasses, objects with ``model_dump()`` (Pydantic, the OpenAI SDK) and plain objects with a ``role``
    are accepted. Fields that are None are left out, arguments of tool calls are decoded from JSON text, content parts
    are checked to be text, and reasoning is copied to every name that templates know. It is idempotent.

    Raises:
        TypeError: something is no message, or holds what has no JSON form.
        ValueError: there are no messages, or a content part is not text.
    """
    if isinstance(messages, str | bytes | Mapping) or not isinstance(messages, Sequence):
        raise TypeError(f"messages must be a list of chat messages, not {type(messages).__name__}")
    if not messages:
        raise ValueError("there are no messages; a chat needs at least one")
    try:
        return [_normalise(message) for message in messages]
    except RecursionError:
        raise ValueError("a message is nested too deeply, or contains itself") from None


def plain(value: Any) -> Any:
    """A copy of ``value`` made of dicts with string keys, lists, strings, numbers, booleans and None only.

    Raises:
        TypeError: there is something else in it.
    """
    match value:
        case None | bool():
            return value
        case str():  # an enumeration's, too: only what JSON knows reaches a template
            return str.__str__(value)
        case int():
            return int(value)
        case float():
            return float(value)
        case list() | tuple():
            return [plain(item) for item in value]
        case dict() | Mapping():  # whether something is a mapping takes ten times as long as whether it is a dict
            return {_key(key): plain(item) for key, item in value.items()}
        case np.generic():
            return plain(value.item())
    return plain(_fields(value))


def _key(key: Any) -> str:
    if not isinstance(key, str):
        raise TypeError(f"keys in messages and tools must be strings, not {type(key).__name__}")
    return str.__str__(key)


def _fields(value: Any) -> dict[str, Any]:
    if not isinstance(value, type):
        if callable(dump := getattr(value, "model_dump", None)) and isinstance(dumped := dump(), dict):
            return dumped
        if dataclasses.is_dataclass(value):
            return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        found = {name: getattr(value, name) for name in FIELDS if hasattr(value, name)}
        if found and not any(callable(item) for item in found.values()):
            return {name: item for name, item in found.items() if item is not None}
    raise TypeError(f"messages, tools and template arguments cannot hold {type(value).__name__} objects; use dicts")


def _normalise(given: Any) -> dict[str, Any]:
    message = plain(given)
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise TypeError(f"a chat message needs a role and content; this is {type(given).__name__}: {str(given)[:80]!r}")
    message = {key: value for key, value in message.items() if value is not None}
    if isinstance(content := message.get("content"), list):
        message["content"] = [_text_part(part) for part in content]
    if isinstance(calls := message.get("tool_calls"), list):
        for call in calls:
            _decode_arguments(call)
    if (reasoning := next((message[name] for name in REASONING_FIELDS if name in message), None)) is not None:
        message = {"thinking": reasoning, **message, "reasoning_content": reasoning}
    return message


def _text_part(part: Any) -> dict[str, str]:
    if isinstance(part, str):
        return {"type": "text", "text": part}
    if not isinstance(part, dict) or part.get("type") not in TEXT_PARTS or not isinstance(part.get("text"), str):
        kind = part.get("type") if isinstance(part, dict) else part
        raise ValueError(f'a content part of type {kind!r} is not served, only {{"type": "text", "text": "…"}}')
    return {"type": "text", "text": part["text"]}


def _decode_arguments(call: Any) -> None:
    """Turn the arguments of a tool call from JSON text into an object; none are an empty one.

    What is not the JSON of an object stays as it is, so that a model sees its own mistake.
    """
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or "name" not in function:
        raise ValueError(f"a tool call needs a function with a name and arguments: {str(call)[:80]}")
    arguments = function.get("arguments")
    if arguments is None or (isinstance(arguments, str) and not arguments.strip()):
        function["arguments"] = {}
    elif isinstance(arguments, str):
        try:
            decoded = json.loads(arguments)
        except (ValueError, RecursionError):
            return
        if isinstance(decoded, dict):
            function["arguments"] = decoded
