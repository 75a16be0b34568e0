"""What a program waits for between two of its requests, and how such a wait came out."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

MAX_HINT_S = 3600.0
"""Seconds that a hint may name at most: the longest time to live that clients' cache controls know."""

ACCEPTED, CLIPPED, IGNORED = "accepted", "clipped", "ignored"
"""Outcomes of a hint."""

TOOL_WAIT, HUMAN_WAIT = "tool", "human"


@dataclass(frozen=True)
class Wait:
    """What a program waits for, as its client or its last turn says. Hints never change results."""

    tools: tuple[str, ...] = ()
    """The tools called, those called in parallel together; none: the job has ended, and a human is waited for."""
    expected_s: float | None = None
    """The client's estimate of how long the wait takes. It replaces the prediction until it has passed."""
    keep_s: float | None = None
    """Seconds for which the client asks that the KV be kept: a lease, which puts off eviction and forbids nothing."""

    @property
    def human(self) -> bool:
        """Whether the job has ended."""
        return not self.tools


@dataclass(frozen=True)
class BoundedWait:
    """A wait as the scheduler takes it: every time is finite and bounded, and said is what became of each hint."""

    wait: Wait
    hinted: str | None
    """``"accepted"``, ``"clipped"`` or ``"ignored"``, of ``expected_s``; None: there was none."""
    leased: str | None
    """The same of ``keep_s``."""

    @classmethod
    def of(cls, wait: Wait) -> BoundedWait:
        """Bound the hints of a wait."""
        expected_s, hinted = _bounded(wait.expected_s)
        keep_s, leased = _bounded(wait.keep_s)
        return cls(replace(wait, expected_s=expected_s, keep_s=keep_s), hinted, leased)


def _bounded(seconds: float | None) -> tuple[float | None, str | None]:
    if seconds is None:
        return None, None
    if math.isnan(seconds) or seconds < 0:
        return None, IGNORED
    return (seconds, ACCEPTED) if seconds <= MAX_HINT_S else (MAX_HINT_S, CLIPPED)


@dataclass(frozen=True)
class WaitOutcome:
    """How a wait came out."""

    predicted_s: float
    """What was expected: the client's hint, or else what such waits have taken before."""
    actual_s: float
    kind: str | None = None
    """``"tool"``, ``"human"``, or None if nobody has said."""
    hinted: str | None = None
    """What became of the hint ``expected_s``: ``"accepted"``, ``"clipped"`` or ``"ignored"``; None: there was none."""
    leased: str | None = None
    """The same of ``keep_s``."""


NEW, DEVICE, HOST, RECOMPUTED = "new", "device", "host", "recomputed"
"""Where the KV of a program comes from that goes on; ``"new"``: it had none."""
EVICTED, DISCARDED, FAILED, DIFFERS = "evicted", "discarded", "failed", "prefix differs"
"""Why KV of a program's last request is computed again: its memory was needed, the strategy keeps none, a copy or a
step failed, or the prompt begins differently."""


@dataclass(frozen=True, slots=True)
class Resumed:
    """How a request came by the KV of its prompt when it first got a slot."""

    source: str = NEW
    """The slowest source of what its program's last request had computed: ``"device"``, ``"host"`` or
    ``"recomputed"``; ``"new"``: there was no such request."""
    why: str = ""
    """Why some was computed again: ``"evicted"``, ``"discarded"``, ``"failed"`` or ``"prefix differs"``."""
    device_tokens: int = 0
    """Tokens of the prompt whose KV was on the device, computed by anybody."""
    host_tokens: int = 0
    """Tokens of the prompt whose KV came back from the host."""
    recomputed_tokens: int = 0
    """Tokens of the last request's that were computed again, or whose KV is of no use any more."""


UNKNOWN = Resumed()
"""Of a request that has not started."""
