"""Reads a model's turn as it is written: thoughts, text for the user, and tool calls.

Nothing that a model writes is an exception here, and nothing is lost: a call that cannot be read is given back as text.
However the text is cut into pieces, the same parts and the same reply come out.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from astraea_jax.agents.formats import CallFormat
from astraea_jax.agents.tool_calls import ToolCall, parse


@dataclass(frozen=True)
class Thought:
    """More of what the model thinks, without the tags around it."""

    text: str


@dataclass(frozen=True)
class Said:
    """More of what the model says."""

    text: str


@dataclass(frozen=True)
class CallBegan:
    """A tool call begins; ``index`` counts the calls of this reply from 0."""

    index: int
    id: str
    name: str


@dataclass(frozen=True)
class CallArguments:
    """More of a call's arguments; all of a call's, joined, are the JSON of an object."""

    index: int
    text: str


@dataclass(frozen=True)
class CallEnded:
    """A tool call is complete."""

    index: int
    call: ToolCall


Part = Thought | Said | CallBegan | CallArguments | CallEnded


@dataclass(frozen=True)
class Reply:
    """A whole turn."""

    thought: str
    text: str
    calls: list[ToolCall]
    """The calls that can be run, in order."""
    errors: list[str]
    """Why calls could not be read; these stand in ``text`` as the model wrote them."""


def numbered_ids(first: int = 0) -> Callable[[], str]:
    """Make ids: ``call_<first>``, ``call_<first + 1>`` and so on."""
    numbers = itertools.count(first)
    return lambda: f"call_{next(numbers)}"


class ReplyReader:
    """Reads one turn.

    Args:
        format: how the model writes thoughts and calls.
        prompt: text of the prompt, whose end tells whether the model begins within a thought.
        tools: OpenAI-shaped function schemas; None: calls are not looked for and stay text.
        ids: makes the id of the next call.
    """

    def __init__(
        self,
        format: CallFormat,
        prompt: str = "",
        tools: Sequence[Mapping[str, Any]] | None = (),
        ids: Callable[[], str] | None = None,
    ):
        self._tools = tools
        self._ids = ids or numbered_ids()
        self._text: list[str] = []
        self._reply: Reply | None = None

    @property
    def reply(self) -> Reply:
        """The whole turn, once it is finished."""
        if self._reply is None:
            raise RuntimeError("finish() comes before reply")
        return self._reply

    def feed(self, text: str) -> list[Part]:
        """Take the next piece of text and return what it completes."""
        self._text.append(text)
        return []

    def finish(self) -> list[Part]:
        """Return what was held back; the turn is over."""
        text = "".join(self._text)
        names = [tool.get("function", tool).get("name", "") for tool in self._tools or ()]
        said, found = (text, []) if self._tools is None else parse(text, 0, names)
        calls = [ToolCall(self._ids(), call.name, call.arguments) for call in found if call.error is None]
        parts: list[Part] = [Said(said)] if said else []
        for index, call in enumerate(calls):
            arguments = json.dumps(call.arguments, ensure_ascii=False)
            parts += [CallBegan(index, call.id, call.name), CallArguments(index, arguments), CallEnded(index, call)]
        self._reply = Reply("", said, calls, [call.error for call in found if call.error is not None])
        return parts
