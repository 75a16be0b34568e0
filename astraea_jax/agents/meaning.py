"""What messages mean, whatever a client makes of them when it sends them back: a digest for each prefix of a history.

Clients print arguments of calls anew, give calls other ids, leave thoughts out, cut texts into parts and trim them.
None of this changes what was said.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from hashlib import sha256
from typing import Any

Message = Mapping[str, Any]
"""A chat message as :func:`astraea_jax.models.chat.normalise_messages` returns it."""

START = b"astraea_jax history"
"""The digest of a history without messages."""

_PRINTER = json.JSONEncoder(sort_keys=True, ensure_ascii=False)


def digests(messages: Sequence[Message]) -> list[bytes]:
    """Return the digests of the histories that end with the first message, with the second, and so on.

    Raises:
        ValueError: arguments of a call are nested too deeply.
    """
    found, digest = [], START
    try:
        for message in messages:
            digest = extended(digest, message)
            found.append(digest)
    except RecursionError:
        raise ValueError("the arguments of a call are nested too deeply") from None
    return found


def extended(digest: bytes, message: Message) -> bytes:
    """Return the digest of a history that goes on with ``message``. Reasoning and ids of calls are no part of it."""
    role, content = message["role"], text_of(message)
    calls = ""
    if role == "assistant":
        content = content.strip()
        if isinstance(given := message.get("tool_calls"), list) and given:
            calls = _PRINTER.encode([_call(call) for call in given])
    said = content.encode("utf-8", "surrogatepass")
    called = calls.encode("utf-8", "surrogatepass")
    return sha256(b"%b%b\0%d\0%b%b" % (digest, role.encode("utf-8", "replace"), len(said), said, called)).digest()


def text_of(message: Message) -> str:
    """Return the text of a message; none is an empty one."""
    content = message.get("content")
    if isinstance(content, str):
        return content
    return "".join(part["text"] for part in content) if isinstance(content, list) else ""


def reasoning_of(message: Message) -> str:
    """Return the thoughts that a message carries beside its text."""
    reasoning = message.get("reasoning_content")
    return reasoning.strip() if isinstance(reasoning, str) else ""


def restored(held: Message, given: Message) -> dict[str, Any]:
    """Return the assistant's message as it was generated, with the ids that a client has given to its calls."""
    message = dict(held)
    if calls := held.get("tool_calls"):
        theirs = given.get("tool_calls") or calls
        message["tool_calls"] = [
            {**call, "id": their["id"]} if "id" in their else call for call, their in zip(calls, theirs, strict=True)
        ]
    return message


def answers_calls(messages: Sequence[Message]) -> bool:
    """Return whether ``messages``, which follow an assistant's turn, answer its calls: then its job goes on."""
    return any(message["role"] == "tool" for message in messages)


def _call(call: Mapping[str, Any]) -> Any:
    function = call.get("function", call)
    return [function.get("name"), _canonical(function.get("arguments"))]


def _canonical(value: Any) -> Any:
    """Return arguments with numbers as JavaScript, too, would print them: 2.0 is 2."""
    match value:
        case float() if value.is_integer():
            return int(value)
        case str():
            return value
        case dict():
            return {key: _canonical(item) for key, item in value.items()}
        case list():
            return [_canonical(item) for item in value]
    return value
