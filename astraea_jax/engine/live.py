"""Requests that the scheduler knows and that somebody waits for, as the serving loop finds them."""

from __future__ import annotations

from dataclasses import dataclass

from astraea_jax.engine.extras import Tracker
from astraea_jax.engine.generation import Mailbox
from astraea_jax.engine.output import Output
from astraea_jax.engine.sampling import SamplingParams
from astraea_jax.scheduler.program import Request


@dataclass(slots=True)
class Live:
    """A request that the scheduler knows."""

    request: Request
    mailbox: Mailbox
    params: SamplingParams
    output: Output
    tracker: Tracker | None
    """Of a request that needs more than plain sampling."""


class LiveRequests:
    """All of them, found by their request or their mailbox."""

    def __init__(self) -> None:
        self.trackers = 0
        """Those that need more than plain sampling."""
        self._by_request: dict[Request, Live] = {}
        self._by_mailbox: dict[Mailbox, Live] = {}

    def add(self, live: Live) -> None:
        """A request has been taken in."""
        self._by_request[live.request] = self._by_mailbox[live.mailbox] = live
        self.trackers += live.tracker is not None

    def remove(self, live: Live) -> None:
        """A request has ended."""
        del self._by_request[live.request], self._by_mailbox[live.mailbox]
        self.trackers -= live.tracker is not None

    def __getitem__(self, request: Request) -> Live:
        return self._by_request[request]

    def get(self, request: Request) -> Live | None:
        """Find a request that may have ended."""
        return self._by_request.get(request)

    def of(self, mailbox: Mailbox) -> Live | None:
        """Find the request of a mailbox, which may have ended."""
        return self._by_mailbox.get(mailbox)

    def check(self, in_progress: int) -> None:
        """Raise AssertionError unless the accounts balance (for tests and debugging; O(everything))."""
        assert {live.mailbox for live in self._by_request.values()} == self._by_mailbox.keys()
        assert self.trackers == sum(live.tracker is not None for live in self._by_request.values())
        assert len(self._by_request) == len(self._by_mailbox) <= in_progress
