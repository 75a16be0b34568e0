"""The interface of a strategy: what becomes of a program's KV while it does not run.

A strategy decides; :class:`~.residency.Residency` carries out. Retention is best effort: whatever a strategy says,
pages that no running request uses are evicted when somebody needs them, so a wish to keep KV can delay nobody for ever.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from .prediction import Predictor
from .program import Program, Request

KEEP, OFFLOAD, DISCARD, EVICT_FIRST = "keep", "offload", "discard", "evict first"


class Decision(NamedTuple):
    """An action for the KV of a program that begins to wait, and the reason."""

    action: str
    """``KEEP``; ``DISCARD`` now; ``OFFLOAD``: copy it ahead of need; ``EVICT_FIRST``: keep it, but evict it before the
    KV of other programs."""
    why: str


class Strategy:
    """Decides what becomes of KV."""

    ahead = (0.0, 0.0)
    """With a host tier: when free and clean pages fall below the first share of the pool, pages are offloaded until
    they reach the second."""
    uses_host = False
    """Pages go to the host tier, if there is one, when they are needed; otherwise they are dropped."""
    evicts_clean = False
    """Pages offloaded ahead of need leave the device at once."""

    def __init__(self, predictor: Predictor):
        self.predict = predictor
        self.running_tokens = 0.0
        """Tokens of context of all running requests."""
        self.host_tier = False
        """Whether there is a host tier. Written by Residency."""

    def waits(self, program: Program, slack: float, now: float) -> Decision:
        """Decide for a program that begins to wait for a tool, or that has just named the tool.

        Args:
            program: it.
            slack: share of the pool that is free or clean.
            now: seconds.
        """
        raise NotImplementedError

    def offloads(self, program: Program) -> bool:
        """Whether a program's pages are offloaded when they are needed; if not, they are dropped."""
        return self.uses_host

    def order(self, programs: Iterable[Program], now: float) -> Iterable[Program] | None:
        """Order in which ``programs``, least recently used first, are evicted; None: as they come."""
        return None

    def pinned(self, program: Program, now: float) -> bool:
        """Whether a program's KV is to be kept: a preference, never a guarantee."""
        return False

    def returned(self, program: Program, now: float) -> None:
        """A program that waited has got its next request, which waits for a slot."""

    def started(self, request: Request, now: float) -> None:
        """A request has got its pages; ``reused`` says how many tokens it need not compute."""
        self.running_tokens += request.num_tokens

    def stopped(self, request: Request) -> None:
        """A request has ended or is preempted."""
        self.running_tokens = max(0.0, self.running_tokens - request.num_tokens)

    def forgotten(self, program: Program) -> None:
        """A program has ended."""
