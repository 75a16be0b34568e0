"""Running requests that decode one token at every step, so that a step need not look at any of them.

What such a request does next changes only when its pages are full or its last token is due, and both are known
beforehand: a calendar of steps says who is to be looked at when. In between a step costs one addition per request.
"""

from __future__ import annotations

from collections import defaultdict

import numpy as np

from .program import Request


class Lockstep:
    """At most ``size`` requests, each with all its known tokens computed, so that its last sampled one comes next."""

    def __init__(self, size: int):
        self._requests: list[Request] = []
        self._at: dict[Request, int] = {}
        self._slots = np.zeros(size, np.int32)
        self._starts = np.zeros(size, np.int32)  # what each has computed
        self._step = 0
        self._until: dict[Request, int] = {}
        self._calendar: defaultdict[int, list[Request]] = defaultdict(list)
        self._looked_up = -1  # the last page of the calendar that has been torn off

    def __len__(self) -> int:
        return len(self._requests)

    def __contains__(self, request: Request) -> bool:
        return request in self._at

    def add(self, request: Request) -> None:
        at = self._at[request] = len(self._requests)
        self._requests.append(request)
        self._slots[at], self._starts[at] = request.slot, request.computed
        self.renew(request)

    def renew(self, request: Request) -> None:
        """Enter a request into the calendar whose pages have become more."""
        until = self._until[request] = self._step + min(request.room, request.limit) - request.computed
        self._calendar[until].append(request)

    def discard(self, request: Request) -> None:
        """Take a request out, if it is in."""
        at = self._at.pop(request, None)
        if at is None:
            return
        del self._until[request]
        last = self._requests.pop()
        if last is not request:
            n = len(self._requests)
            self._requests[at], self._at[last] = last, at
            self._slots[at], self._starts[at] = self._slots[n], self._starts[n]

    def due(self) -> list[Request]:
        """Those that cannot take the next step as they are: to be renewed or discarded."""
        found = []
        while self._looked_up < self._step:
            self._looked_up += 1
            found += [s for s in self._calendar.pop(self._looked_up, ()) if self._until.get(s) == self._looked_up]
        return found

    def advance(self, times: int = 1) -> tuple[list[Request], np.ndarray, np.ndarray]:
        """Take ``times`` steps; returns the requests, their slots ``[n]`` and what they had computed before ``[n]``."""
        n = len(self._requests)
        before = self._starts[:n].copy()
        self._starts[:n] += times
        self._step += times
        for request in self._requests:
            request.computed += times
        return self._requests.copy(), self._slots[:n].copy(), before

    def check(self) -> None:
        """Raise AssertionError unless the books agree with the requests (for tests; O(everything))."""
        assert self._at == {request: at for at, request in enumerate(self._requests)}
        assert self._until.keys() == self._at.keys()
        for request, at in self._at.items():
            assert request.slot == self._slots[at]
            assert request.computed == self._starts[at] == request.length - 1
            assert self._until[request] == self._step + min(request.room, request.limit) - request.computed
            assert request in self._calendar[self._until[request]]
