"""Tool calls in a model's text, in the format of Hermes and Qwen.

They look like ``<tool_call>{"name": "price", "arguments": {"item": "lamp"}}</tool_call>``. Nothing a model
writes is an error here: what cannot be read becomes a call that carries its own ``error``, which is then the
result that the model gets to read.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

MAX_CALLS = 64
"""In one turn; the rest is refused as one call that says so."""

MAX_CALL_CHARS = 65_536
MAX_DEPTH = 32
"""Nesting of arguments, far below where JSON encoders and chat templates run out of stack."""

OPEN, CLOSE = "<tool_call>", "</tool_call>"

# A call up to the first closing tag outside of JSON strings; possessive, so it takes linear time on any text.
QUOTED = re.compile(r'((?:[^"<]++|"(?:[^"\\]|\\.)*+"|<(?!/tool_call>))*+)</tool_call>', re.DOTALL)


@dataclass(frozen=True)
class ToolCall:
    """One call. With ``error`` set there is nothing to run, and ``name`` may be empty."""

    id: str
    name: str
    arguments: dict[str, Any] = field(default_factory=dict)
    error: str | None = None


def parse(text: str, first: int = 0) -> tuple[str, list[ToolCall]]:
    """Split a model's turn into what it said and what it calls.

    Args:
        text: the whole turn. A last call may lack its closing tag if its JSON is complete.
        first: calls get the ids ``call_<first>``, ``call_<first + 1>``, …
    """
    said = []
    calls: list[ToolCall] = []
    at = 0
    while (start := text.find(OPEN, at)) >= 0:
        said.append(text[at:start])
        call_id = f"call_{first + len(calls)}"
        if len(calls) == MAX_CALLS:
            calls.append(ToolCall(call_id, "", error=f"too many calls: at most {MAX_CALLS} in one turn are run"))
            at = len(text)
            break
        call, at = _read_at(text, start + len(OPEN), call_id)
        calls.append(call)
    said.append(text[at:])
    return "".join(said).strip(), calls


def assistant_message(text: str, content: str, calls: Sequence[ToolCall]) -> dict[str, Any]:
    """The turn as an OpenAI-shaped message.

    A turn with an unreadable call keeps its raw ``text``: the model should see its own mistake.
    """
    if not calls or any(call.error for call in calls):
        return {"role": "assistant", "content": text}
    entries = [
        {"type": "function", "id": call.id, "function": {"name": call.name, "arguments": call.arguments}}
        for call in calls
    ]
    return {"role": "assistant", "content": content, "tool_calls": entries}


def _read_at(text: str, start: int, call_id: str) -> tuple[ToolCall, int]:
    """The call whose body begins at ``start``, and where the text goes on after it."""
    end = text.find(CLOSE, start)
    if end < 0:
        return _read(call_id, text[start:]), len(text)
    call = _read(call_id, text[start:end])
    if call.error and (longer := QUOTED.match(text, start)) and longer.end(1) > end:
        quoting = _read(call_id, longer[1])
        if not quoting.error:
            return quoting, longer.end()
    return call, end + len(CLOSE)


def _read(call_id: str, body: str) -> ToolCall:
    try:
        name, arguments = _name_and_arguments(body)
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        return ToolCall(call_id, "", error=f"unreadable tool call: {reason}")
    return ToolCall(call_id, name, arguments)


def _name_and_arguments(body: str) -> tuple[str, dict[str, Any]]:
    if len(body) > MAX_CALL_CHARS:
        raise ValueError(f"{len(body)} characters; at most {MAX_CALL_CHARS} are read")
    call = json.loads(body, parse_constant=_refuse_constant)
    if not isinstance(call, dict) or not isinstance(call.get("name"), str) or not call["name"]:
        raise ValueError('expected {"name": "<tool>", "arguments": {…}}')
    arguments = call.get("arguments", {})
    if not isinstance(arguments, dict):
        raise ValueError('"arguments" must be an object')
    if _deeper_than(arguments, MAX_DEPTH):
        raise ValueError(f"nested too deeply; at most {MAX_DEPTH} levels are read")
    try:
        json.dumps(call, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise ValueError("half a surrogate pair in a string") from None
    return call["name"], arguments


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _deeper_than(value: object, levels: int) -> bool:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return levels < 0 or any(_deeper_than(part, levels - 1) for part in inner if isinstance(part, dict | list))
