"""A picture of one program at one moment, for status pages."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import NamedTuple

from .program import Program, Request

MAX_SHOWN = 256
"""Characters of the tools' names that are shown."""


class Held(NamedTuple):
    """What a request would find computed, in tokens of its prompt."""

    tokens: int
    """All of them."""
    matched: int
    """Those that the program's last request began with; 0 if there is none, or it runs."""
    device: int
    """Those whose KV is on the device, computed by anybody of the same salt."""
    host: int
    """Those after them whose KV is on the host."""

    @property
    def nowhere(self) -> int:
        """Those that would have to be computed."""
        return self.tokens - self.device - self.host


@dataclass(frozen=True)
class ProgramView:
    """A program as a status page shows it. Times are seconds before the moment of the picture."""

    number: int
    key: Hashable | None
    """The caller's name for it."""
    state: str
    """``"queued"``, ``"restoring"``, ``"prefill"``, ``"decode"``, ``"tool_wait"`` or ``"human_wait"``."""
    state_s: float
    """How long it has been queued, on its slot, or in its wait."""
    age_s: float
    turns: int
    """Requests that have ended."""
    tool: str | None
    """The tools it waits for, joined by ``"+"``, if the client has said so; of many the first."""
    tokens: int
    """Of its present or last request, prompt and output."""
    device_pages: int
    host_pages: int
    residency: str
    """Where its KV is: ``"device"``, ``"host"``, ``"both"`` or ``"nowhere"``."""

    @classmethod
    def of(cls, program: Program, request: Request | None, now: float) -> ProgramView:
        """Look at a program; ``request`` is the one that it has queued or running."""
        state, since = _state(program, request)
        shown = request or program.last
        pages = (program.running or program).pages
        device, host = len(pages), sum(copy.used for copy in program.copies)
        residency = {(True, True): "both", (True, False): "device", (False, True): "host"}.get(
            (device > 0, host > 0), "nowhere"
        )
        return cls(
            number=program.number,
            key=program.key,
            state=state,
            state_s=max(0.0, now - since),
            age_s=max(0.0, now - program.arrival),
            turns=program.turns,
            tool="+".join(program.wait.wait.tools)[:MAX_SHOWN] or None if program.wait is not None else None,
            tokens=shown.num_tokens if shown is not None else 0,
            device_pages=device,
            host_pages=host,
            residency=residency,
        )


def _state(program: Program, request: Request | None) -> tuple[str, float]:
    """The state of a program, and when it entered it."""
    if request is None:
        return "human_wait" if program.awaits_human else "tool_wait", program.wait_began
    if request.slot < 0:
        return "queued", request.queued
    if request.loading is not None:
        return "restoring", request.started
    if request.num_computed < len(request.prompt):
        return "prefill", request.started
    return "decode", request.first_token or request.started
