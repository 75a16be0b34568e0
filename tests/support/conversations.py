"""Conversations with a model that divides its text into tokens as no tokenizer does."""

from __future__ import annotations

import functools
from typing import Any

from support.histories import KEEPS, Template, tokenizer

from astraea_jax.agents.conversations import Conversations
from astraea_jax.agents.opened import Opened

make = functools.cache(tokenizer)
SYSTEM = {"role": "system", "content": "Help."}
START = [SYSTEM, {"role": "user", "content": "How much is it?"}]
MORE = {"role": "user", "content": "And now?"}
TOOLS = [{"type": "function", "function": {"name": "price", "parameters": {"type": "object"}}}]
ME = "me"


def conversations(template: Template = KEEPS, mode: Any = "job", **options: Any) -> Conversations:
    return Conversations(make("across", template), mode, **options)


def say(known: Conversations, opened: Opened, text: str = "It is 14.", reason: str = "stop", **fields: Any) -> Any:
    """End a request with a turn that was divided into tokens as no tokenizer does; returns the turn's message."""
    message = {"role": "assistant", "content": text, **fields}
    ids = [i for char in text for i in known._tokenizer.encode(char)]
    opened.ended([*ids, *known._tokenizer.encode(KEEPS.stop)], message, reason)
    return message


def calling(name: str = "price", id: str = "call00000") -> dict[str, Any]:
    return {"tool_calls": [{"id": id, "type": "function", "function": {"name": name, "arguments": {}}}]}


def result(content: str = "14", id: str = "call00000") -> dict[str, Any]:
    return {"role": "tool", "name": "price", "tool_call_id": id, "content": content}


def talk(known: Conversations, session: str | None, owner: str = ME, rounds: int = 2, **fields: Any) -> list[Any]:
    """Some rounds of a conversation; returns its messages, the last of which is the user's."""
    messages = [*START]
    for _ in range(rounds):
        messages += [say(known, known.begin(owner, session, messages), **fields), MORE]
    return messages
