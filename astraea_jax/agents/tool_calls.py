"""Reads whole turns of a model for the agent loop: what it said, and what it calls.

Nothing that a model writes is an exception here. A call that cannot be read, or can be read in two ways, becomes a
:class:`ToolCall` that carries its ``error``; the caller gives it to the model as the call's result.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

from astraea_jax.agents.call_bodies import Tools
from astraea_jax.agents.call_json import STRING
from astraea_jax.agents.formats import DEFAULT, CallFormat, named
from astraea_jax.agents.formats import DRAFT_TAGS as THOUGHT_TAGS
from astraea_jax.agents.json_calls import MAX_CALL_CHARS, MAX_CALLS, MAX_DEPTH, ToolCall
from astraea_jax.agents.parts import Span
from astraea_jax.agents.reply import ReplyReader

__all__ = [
    "MAX_CALLS",
    "MAX_CALL_CHARS",
    "MAX_DEPTH",
    "THOUGHT_TAGS",
    "ToolCall",
    "Turn",
    "assistant_message",
    "parse",
    "read_turn",
]

THOUGHT_END = re.compile(f"(?P<thought_end>(?ai:{'|'.join(map(re.escape, THOUGHT_TAGS.values()))}))")
STRING_OR_THOUGHT_END = re.compile(f"{STRING}|{THOUGHT_END.pattern}", re.DOTALL)
WHOLE_STRINGS = re.compile(rf'(?:[^"]|{STRING})*+', re.DOTALL)
EMPTY_FENCE = re.compile(r"```\w*+\s*+```")


@dataclass(frozen=True)
class Turn:
    """A whole turn."""

    text: str
    """As the model wrote it."""
    content: str
    """What it said without its calls; thoughts included, as templates expect them, unless they are apart."""
    calls: list[ToolCall]
    thought: str = ""
    """What it thought, if the chat template wants that apart."""

    def message(self) -> dict[str, Any]:
        """Return the turn as an OpenAI-shaped message."""
        if not self.thought:
            return assistant_message(self.text, self.content, self.calls)
        return {**assistant_message(self.content, self.content, self.calls), "reasoning_content": self.thought}


def parse(
    text: str, first: int = 0, tools: Collection[str] | Tools | None = None, format: CallFormat | None = None
) -> tuple[str, list[ToolCall]]:
    """Split a model's turn into what it said, thoughts included, and what it calls; see :func:`read_turn`."""
    turn = read_turn(text, first, tools, format)
    return turn.content, turn.calls


def read_turn(
    text: str, first: int = 0, tools: Collection[str] | Tools | None = None, format: CallFormat | None = None
) -> Turn:
    """Read a model's turn.

    Args:
        text: the whole turn. The last call may lack its closing tag if its JSON is complete. A thought may lack its
            opening tag, as chat templates write it, or its closing tag: then the turn ends within it.
        first: number of the first call; calls get the ids ``call_<first>``, ``call_<first + 1>``, …, or what the
            format has in their place.
        tools: what is known of the tools, or their names. A turn that is JSON without a tag is a call only if it names
            one of them; None: if it has no keys but a call's.
        format: how the model writes calls; without one, as JSON behind any tag that stands before such.
    """
    format = format or named(DEFAULT)
    known = tools if isinstance(tools, Tools) else Tools(tools)
    begin = 0
    while True:  # a thought that the prompt has opened reaches up to the last closing tag without an opening one
        reader = ReplyReader(format, "", known)
        reader.feed(text[begin:])
        reader.finish()
        end = _unopened_thought_end(reader.spans)
        if not end:
            break
        begin += end
    calls = [replace(call, id=format.call_id(first + i)) for i, call in enumerate(reader.outcomes)]
    if format.thoughts_apart:
        return Turn(text, reader.reply.text, calls, reader.reply.thought)
    content = "".join(span.text for span in reader.spans if span.kind in ("thought", "draft", "text"))
    content = text[:begin] + (EMPTY_FENCE.sub("", content) if calls else content)
    return Turn(text, content.strip(), calls)


def assistant_message(text: str, content: str, calls: Sequence[ToolCall]) -> dict[str, Any]:
    """Return the turn as an OpenAI-shaped message.

    A turn with an unreadable call keeps its raw ``text``: the model should see its own mistake.
    """
    if not calls or any(call.error for call in calls):
        return {"role": "assistant", "content": text}
    entries = [
        {"type": "function", "id": call.id, "function": {"name": call.name, "arguments": call.arguments}}
        for call in calls
    ]
    return {"role": "assistant", "content": content, "tool_calls": entries}


def _unopened_thought_end(spans: Sequence[Span]) -> int:
    """Return the position after the last closing tag of a thought that has no opening one; 0: there is none.

    In a call with whole strings, the tag may be a part of a string.
    """
    last = at = 0
    for kind, group in itertools.groupby(spans, key=lambda span: span.kind):
        text = "".join(span.text for span in group)
        if kind in ("text", "unreadable"):
            strings = kind == "unreadable" and WHOLE_STRINGS.fullmatch(text)
            for found in (STRING_OR_THOUGHT_END if strings else THOUGHT_END).finditer(text):
                last = at + found.end() if found["thought_end"] else last
        at += len(text)
    return last
