"""The calls of one turn: which of them have begun, what was told of them, and which have ended."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from astraea_jax.agents.call_stream import CallStream
from astraea_jax.agents.json_calls import MAX_CALLS, ToolCall, refused
from astraea_jax.agents.parts import CallArguments, CallBegan, CallDropped, CallEnded, Part


@dataclass
class _Growing:
    """A call that is being written."""

    stream: CallStream
    began: CallBegan | None = None
    """None: nothing was told of it."""


class ReplyCalls:
    """Calls of one turn, as parts.

    Args:
        ids: makes the id of the next call.
        early: tell calls while they are written; otherwise each comes as a whole.
    """

    def __init__(self, ids: Callable[[], str], *, early: bool):
        self.read: list[ToolCall] = []
        """Those that can be run."""
        self.outcomes: list[ToolCall] = []
        """All in order, those that cannot be read among them."""
        self._ids, self._early = ids, early
        self._begun = 0
        self._growing: _Growing | None = None

    @property
    def full(self) -> bool:
        """Whether no more calls are run."""
        return len(self.outcomes) >= MAX_CALLS

    def open(self, stream: CallStream) -> list[Part]:
        """Take in that calls begin, of which ``stream`` reads the first."""
        self._growing = _Growing(stream)
        return self.tell("")

    @property
    def ends_at(self) -> int | None:
        """Position at which the call that is being written ends by itself."""
        return None if self._growing is None else self._growing.stream.ends_at

    def tell(self, text: str) -> list[Part]:
        """Take in more of their text."""
        if (growing := self._growing) is None:
            return []
        arguments, parts = growing.stream.feed(text), list[Part]()
        if self._early and growing.began is None and growing.stream.name is not None:
            growing.began = self._begin(growing.stream.name)
            parts.append(growing.began)
        if growing.began is not None and arguments:
            parts.append(CallArguments(growing.began.index, arguments))
        return parts

    def end(self, calls: Sequence[ToolCall]) -> list[Part]:
        """Take in that calls have ended, of which the first may have been told."""
        parts: list[Part] = []
        for call in calls:
            if self.full:
                break
            arguments = json.dumps(call.arguments, ensure_ascii=False)
            began, told = self._told_of(call, arguments)
            if began is None:
                parts += self._drop()
                began = self._begin(call.name)
                parts.append(began)
            call = replace(call, id=began.id)
            self.read.append(call)
            self.outcomes.append(call)
            parts += [CallArguments(began.index, arguments[told:]), CallEnded(began.index, call)]
        return [*parts, *self._drop()]

    def refuse(self, reason: str | None = None) -> list[Part]:
        """Take in that there are no calls here after all, or that they cannot be read for a ``reason``."""
        if reason is not None:
            self.outcomes.append(refused(reason))
        return self._drop()

    def _begin(self, name: str) -> CallBegan:
        self._begun += 1
        return CallBegan(self._begun - 1, self._ids(), name)

    def _told_of(self, call: ToolCall, arguments: str) -> tuple[CallBegan | None, int]:
        """Return how the call was told to begin, if it was, and how many characters of its arguments were."""
        growing = self._growing
        if growing is None or growing.began is None:
            return None, 0
        told = growing.stream.arguments
        if call.name != growing.began.name or not arguments.startswith(told):
            return None, 0
        self._growing = None
        return growing.began, len(told)

    def _drop(self) -> list[Part]:
        growing, self._growing = self._growing, None
        return [] if growing is None or growing.began is None else [CallDropped(growing.began.index)]
