"""A request of a conversation while it is in progress: its prompt, its program, and how its turn is taken in."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from astraea_jax.agents.continuity import Why
from astraea_jax.agents.turns import Owner, Program, Turn

End = Callable[[Sequence[int], Any, bool], None]
ENDS = ("stop", "length", "tool_calls")
"""Finish reasons of turns that a client may send back."""


@dataclass(frozen=True)
class Continuation:
    """The prompt of a request, and how much of it was known."""

    prompt: list[int]
    kept: int
    """Tokens at its beginning that are those of known turns, as they were computed."""
    message: int | None
    """Index of the first message that is not known like this; None: every known message goes on, or none was known."""
    why: Why


@dataclass(frozen=True)
class Running:
    """A request in progress, as its conversation knows it."""

    owner: Owner
    program: Program
    turn: Turn | None
    """The turn that it follows."""


class Opened:
    """A request of a conversation. Whoever has opened it says :meth:`ended`, however it ends."""

    def __init__(self, running: Running, report: Continuation, begins_job: bool, end: End, drop: Callable[[], None]):
        self.prompt = report.prompt
        self.program = running.program.name
        """Name of its program: the session's for its first conversation, ``name/2`` and so on for others."""
        self.parent = running.program.parent
        """Name of the program from which this one branches."""
        self.begins_job = begins_job
        """Whether a new job begins; else the request answers calls of the previous turn."""
        self.report = report
        self._end, self._drop = end, drop
        self._open = threading.Lock()
        """Taken once it has ended."""

    def ended(
        self,
        output_ids: Sequence[int] = (),
        message: Mapping[str, Any] | str | None = None,
        finish_reason: str = "cancelled",
        *,
        whole: bool = True,
    ) -> None:
        """Take in the turn, unless it was cancelled or has failed. Only the first call counts.

        Args:
            output_ids: all tokens that were generated, the stop token among them.
            message: the assistant's message as it was read; of a plain text, the text that was delivered.
            finish_reason: as in :class:`astraea_jax.engine.generation.Delta`, ``"tool_calls"``, or ``"error"``.
            whole: the client was given all that was generated. It was not if a stop string or a stop token of the
                request's own has cut it, or if calls were left out: such a turn is rendered again, not continued.
        """
        if self._open.acquire(blocking=False):
            self._end(output_ids, message if finish_reason in ENDS else None, whole)

    def __del__(self) -> None:
        if self._open.acquire(blocking=False):
            self._drop()
