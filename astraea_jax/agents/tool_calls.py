"""Reads the tool calls in a model's turn.

Calls stand between ``<tool_call>`` and ``</tool_call>`` (Hermes, Qwen), behind ``<|python_tag|>`` (Llama 3) or
``[TOOL_CALLS]`` (Mistral), or they are all there is in the turn (Llama 3). Each is JSON such as
``{"name": "price", "arguments": {"item": "lamp"}}``. Calls inside a thought are drafts and stay text.

Nothing that a model writes is an exception here. A call that cannot be read, or can be read in two ways, becomes a
:class:`ToolCall` that carries its ``error``; the caller gives it to the model as the call's result.
"""

from __future__ import annotations

import contextlib
import functools
import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from astraea_jax.agents.call_json import STRING, read_values, without_fence

MAX_CALLS = 64
"""Calls of one turn that are run; the rest becomes one call that says so."""

MAX_CALL_CHARS = 65_536
MAX_DEPTH = 32
"""Nesting of arguments, far below where JSON encoders and chat templates run out of stack."""

CALL_TAGS = {"<tool_call>": "</tool_call>", "<|python_tag|>": None, "[TOOL_CALLS]": None}
"""Opening tag of calls -> closing tag; None: they go on to the end of the turn."""

THOUGHT_TAGS = {
    "<think>": "</think>",
    "<thinking>": "</thinking>",
    "<thought>": "</thought>",
    "<reasoning>": "</reasoning>",
    "<scratch_pad>": "</scratch_pad>",
    "<scratchpad>": "</scratchpad>",
    "<|begin_of_thought|>": "<|end_of_thought|>",
    "[think]": "[/think]",
}
"""Opening tag of a thought -> closing tag, in lower case; models write them in any."""

NAME_KEYS = ("name", "function", "tool", "tool_name", "function_name")
ARGUMENT_KEYS = ("arguments", "parameters", "args", "params", "kwargs", "input")
CALL_TYPES = ("function", "function_call", "tool_call", "tool_use")
EXPECTED = 'expected {"name": "<tool>", "arguments": {…}}'


def _any_of(texts: Collection[str]) -> str:
    return "|".join(map(re.escape, texts))


TAGS = re.compile(f"{_any_of(CALL_TAGS)}|(?ai:{_any_of([*THOUGHT_TAGS, *THOUGHT_TAGS.values()])})")
THOUGHT_END = re.compile(f"(?P<thought_end>(?ai:{_any_of(THOUGHT_TAGS.values())}))")
STRING_OR_THOUGHT_END = re.compile(f"{STRING}|{THOUGHT_END.pattern}", re.DOTALL)
SEPARATOR = re.compile(rf"[\s;,]++|{_any_of(CALL_TAGS)}")
UNREADABLE_BARE = re.compile(
    rf"""[\[{{\s]*+(["'])(?:{_any_of(NAME_KEYS)})\1\s*+:\s*+(["'])(?P<name>[\w-]++)\2.*?["'](?:{_any_of(ARGUMENT_KEYS)})["']\s*:""",
    re.DOTALL,
)
EMPTY_FENCE = re.compile(r"```\w*+\s*+```")


@dataclass(frozen=True)
class ToolCall:
    """One call. With ``error`` set there is nothing to run, and ``name`` is empty."""

    id: str
    """``call_<n>``, unique in a conversation; an id that the model wrote is not used."""
    name: str
    arguments: dict[str, Any] = field(default_factory=dict)
    error: str | None = None


def parse(text: str, first: int = 0, tools: Collection[str] | None = None) -> tuple[str, list[ToolCall]]:
    """Split a model's turn into what it said, thoughts included, and what it calls.

    Args:
        text: the whole turn. The last call may lack its closing tag if its JSON is complete. A thought may lack its
            opening tag, as chat templates write it, or its closing tag: then the turn ends within it.
        first: calls get the ids ``call_<first>``, ``call_<first + 1>``, …
        tools: names of the tools that the model has. A turn that is JSON without a tag is a call only if it names one
            of them; None: if it has no keys but a call's.
    """
    said, calls = "", _bare_calls(text, tools)  # first, since its strings may hold tags
    if not calls or calls[0].error:
        said, calls = _tagged_calls(text)
        if calls:
            said = EMPTY_FENCE.sub("", said)
        elif calls := _bare_calls(text[(begin := _thought_end(text)) :], tools):
            said = text[:begin]
    if len(calls) > MAX_CALLS:
        calls[MAX_CALLS:] = [_refused(f"too many calls: at most {MAX_CALLS} in one turn are run")]
    return said.strip(), [replace(call, id=f"call_{first + i}") for i, call in enumerate(calls)]


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


def _tagged_calls(text: str) -> tuple[str, list[ToolCall]]:
    """The text without its calls, and the calls."""
    said: list[str] = []
    calls: list[ToolCall] = []
    kept = at = 0  # text before `kept` is in `said` or was a call
    tried = 0
    while tag := TAGS.search(text, at):
        if thought := THOUGHT_TAGS.get(tag[0].lower()):
            at = _after(text, thought, tag.end())
        elif tag[0] not in CALL_TAGS:  # the prompt has opened this thought: nothing so far was a call
            said, calls = [], []
            kept, at = 0, tag.end()
        elif tried > MAX_CALLS:  # more would take quadratic time; but they may all turn out to be drafts
            ends = [found.end() for found in THOUGHT_END.finditer(text, at)]
            if not ends:
                return "".join(said), calls
            said, calls, tried = [], [], 0
            kept, at = 0, ends[-1]
        else:
            tried += 1
            at = tag.end()
            if found := _calls_at(text, at, CALL_TAGS[tag[0]]):
                said.append(text[kept : tag.start()])
                calls += found[0]
                kept = at = found[1]
    return "".join([*said, text[kept:]]), calls


def _thought_end(text: str) -> int:
    """Position after the last thought of a turn; 0: there is none."""
    last = 0
    at = 0
    while tag := TAGS.search(text, at):
        thought = THOUGHT_TAGS.get(tag[0].lower())
        at = _after(text, thought, tag.end()) if thought else tag.end()
        last = last if tag[0] in CALL_TAGS else at
    return last


def _after(text: str, thought_end: str, start: int) -> int:
    """Position after the closing tag of a thought; without one, the end of the text."""
    found = re.compile(f"(?ai:{re.escape(thought_end)})").search(text, start)
    return found.end() if found else len(text)


def _calls_at(text: str, start: int, close: str | None) -> tuple[list[ToolCall], int] | None:
    """The calls that begin at ``start``, and where the text goes on after them; None: a thought ends within them."""
    first = text.find(close, start) if close else -1
    ends = [first if first >= 0 else len(text)]
    try:
        return _calls(text[start : ends[0]]), ends[0] + len(close or "")
    except (ValueError, RecursionError) as error:
        refused = _refused(_reason(error))
    limit = start + MAX_CALL_CHARS + len(close or "")
    quoting = [pattern.match(text, start, limit) for pattern in _up_to(close)] if close else []
    for end in sorted({found.end() for found in quoting if found and found.end() > first}):
        ends.append(end)
        with contextlib.suppress(ValueError, RecursionError):
            return _calls(text[start:end]), end + len(close or "")
    # In a body with whole strings, the end of a thought may be a part of a string.
    thought_end = STRING_OR_THOUGHT_END if quoting and quoting[0] else THOUGHT_END
    if any(found["thought_end"] for found in thought_end.finditer(text, start, ends[-1])):
        return None
    return [refused], ends[-1] + len(close or "")


@functools.cache
def _up_to(close: str) -> tuple[re.Pattern[str], re.Pattern[str]]:
    """Patterns that match up to a closing tag outside of strings: of JSON's, and also of Python's. Both are linear."""
    double = rf'(?:(?!{re.escape(close)})[^"]|{STRING})*+(?={re.escape(close)})'
    both = rf"""(?:(?!{re.escape(close)})[^"']|{STRING}|{STRING.replace('"', "'")})*+(?={re.escape(close)})"""
    return re.compile(double, re.DOTALL), re.compile(both, re.DOTALL)


def _bare_calls(text: str, tools: Collection[str] | None) -> list[ToolCall]:
    """The calls of a turn that is nothing but calls without a tag, or none."""
    body = without_fence(text)
    if not body.startswith(("{", "[")) or len(body) > MAX_CALL_CHARS:
        return []
    try:
        values = _flat(read_values(body, SEPARATOR))
    except (ValueError, RecursionError) as error:
        found = UNREADABLE_BARE.match(body)
        return [_refused(_reason(error))] if found and found["name"] in (tools or ()) else []
    if not any(_is_bare_call(value, tools) for value in values):
        return []
    try:
        return [_call(value) for value in values]
    except (ValueError, RecursionError) as error:
        return [_refused(_reason(error))]


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


def _calls(body: str) -> list[ToolCall]:
    if len(body) > MAX_CALL_CHARS:
        raise ValueError(f"{len(body)} characters; at most {MAX_CALL_CHARS} are read")
    return [_call(value) for value in _flat(read_values(without_fence(body), SEPARATOR))]


def _flat(values: list[Any]) -> list[Any]:
    """The calls themselves, which may stand in lists."""
    flat = [part for value in values for part in (value if isinstance(value, list) else [value])]
    if not flat:
        raise ValueError(EXPECTED)
    return flat


def _call(value: Any) -> ToolCall:
    """The call that a JSON value means.

    Raises:
        ValueError: it means none, or what it means is not certain.
    """
    if not isinstance(value, dict):
        raise ValueError(EXPECTED)
    if isinstance(inner := value.get("function"), dict):  # as OpenAI's API writes calls
        _refuse_unknown(value, {"function"}, labelled=True)
        return _call(inner)
    names = [key for key in NAME_KEYS if key in value]
    given = [key for key in ARGUMENT_KEYS if key in value]
    if len(names) != 1 or not isinstance(name := value[names[0]], str) or not name:
        raise ValueError(EXPECTED)
    if len(given) > 1:
        raise ValueError(f'both "{given[0]}" and "{given[1]}"; write the arguments once')
    _refuse_unknown(value, {*names, *given}, labelled=bool(given))
    arguments = _arguments(given[0], value[given[0]]) if given else {}
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


def _arguments(key: str, value: Any) -> dict[str, Any]:
    """Arguments as an object; models also write them as JSON text, and none as null or empty text."""
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


def _reason(error: Exception) -> str:
    return f"unreadable tool call: {'nested too deeply' if isinstance(error, RecursionError) else error}"


def _refused(reason: str) -> ToolCall:
    return ToolCall("", "", error=reason)
