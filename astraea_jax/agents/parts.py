"""The parts of a model's turn, as it streams, and the whole turn."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from astraea_jax.agents.json_calls import ToolCall


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
    """A tool call begins; ``index`` counts the calls of this reply that have begun, from 0."""

    index: int
    id: str
    name: str


@dataclass(frozen=True)
class CallArguments:
    """More of a call's arguments; all of a call's, joined, are the JSON of an object.

    They are JSON only once the call is complete: the brace that closes them comes with :class:`CallEnded`.
    """

    index: int
    text: str


@dataclass(frozen=True)
class CallEnded:
    """A tool call is complete."""

    index: int
    call: ToolCall


@dataclass(frozen=True)
class CallDropped:
    """What has begun as a tool call cannot be read, or is cut off: nothing is to be run, and its text is said."""

    index: int


CallPart = CallBegan | CallArguments | CallEnded | CallDropped
Part = Thought | Said | CallPart


@dataclass(frozen=True)
class Reply:
    """A whole turn."""

    thought: str
    text: str
    calls: list[ToolCall]
    """The calls that can be run, in order."""
    errors: list[str]
    """Why calls could not be read; these stand in ``text`` as the model wrote them."""


@dataclass(frozen=True)
class Span:
    """A part of the turn exactly as the model wrote it."""

    kind: Literal["thought", "draft", "text", "markup", "call", "unreadable"]
    text: str
    calls: tuple[ToolCall, ...] = ()


class Trimmed:
    """A text that grows, without the whitespace between it and markup."""

    def __init__(self) -> None:
        self._shown: list[str] = []
        self._space: list[str] = []
        """Whitespace that is text if more text follows."""
        self._after_markup = False

    @property
    def shown(self) -> str:
        """All that :meth:`add` and :meth:`rest` have returned."""
        return "".join(self._shown)

    def add(self, text: str) -> str:
        """Return what is certain to be text now."""
        if not text or text.isspace():
            self._space.append(text)
            return ""
        body = text.rstrip()
        shown = "".join([*self._space, body])
        if self._after_markup and not self._shown:
            shown = shown.lstrip()
        self._space, self._after_markup = [text[len(body) :]], False
        self._shown.append(shown)
        return shown

    def cut(self) -> None:
        """Markup stands here."""
        self._after_markup = True
        if not self._shown:
            self._space = []

    def rest(self) -> str:
        """Return the whitespace at the end of the turn, unless markup ends it."""
        rest = "" if self._after_markup else "".join(self._space)
        self._shown.append(rest)
        return rest
