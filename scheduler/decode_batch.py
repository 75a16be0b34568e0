"""Running requests that decode one token at every step, so that a step need not look at any of them.

What such a request does next changes only when its pages are full or its last token is due. Both are known beforehand,
so a wake-up schedule says at which step to look at which request; in between a step costs one addition per request.
"""

from __future__ import annotations

from collections import defaultdict

import numpy as np

from .program import Request


class DecodeBatch:
    """At most ``size`` requests, each with all but its last sampled token computed, so that this one comes next."""

    def __init__(self, size: int):
        self._requests: list[Request] = []
        self._at: dict[Request, int] = {}
        self._slots = np.zeros(size, np.int32)
        self._starts = np.zeros(size, np.int32)  # tokens that each has computed
        self._step = 0
        self._wake_at: dict[Request, int] = {}
        self._wake_ups: defaultdict[int, list[Request]] = defaultdict(list)  # by step; outdated entries are ignored
        self._last_woken = -1  # the last step whose wake-ups have been handed out

    def __len__(self) -> int:
        return len(self._requests)

    def __contains__(self, request: Request) -> bool:
        return request in self._at

    def add(self, request: Request) -> None:
        at = self._at[request] = len(self._requests)
        self._requests.append(request)
        self._slots[at], self._starts[at] = request.slot, request.num_computed
        self.schedule(request)

    def schedule(self, request: Request) -> None:
        """Schedule a request's wake-up anew, because its pages have become more."""
        step = self._wake_at[request] = self._step + min(request.capacity, request.max_computed) - request.num_computed
        self._wake_ups[step].append(request)

    def discard(self, request: Request) -> None:
        """Take a request out, if it is in."""
        at = self._at.pop(request, None)
        if at is None:
            return
        del self._wake_at[request]
        last = self._requests.pop()
        if last is not request:
            n = len(self._requests)
            self._requests[at], self._at[last] = last, at
            self._slots[at], self._starts[at] = self._slots[n], self._starts[n]

    def due(self) -> list[Request]:
        """Requests that cannot take the next step as they are: each is to be scheduled anew or discarded."""
        found = []
        while self._last_woken < self._step:
            self._last_woken += 1
            woken = self._wake_ups.pop(self._last_woken, ())
            found += [request for request in woken if self._wake_at.get(request) == self._last_woken]
        return found

    def advance(self, times: int = 1) -> tuple[list[Request], np.ndarray, np.ndarray]:
        """Take ``times`` steps.

        Returns:
            The requests, their slots ``[n]``, and the tokens they had computed before ``[n]``.
        """
        n = len(self._requests)
        before = self._starts[:n].copy()
        self._starts[:n] += times
        self._step += times
        for request in self._requests:
            request.num_computed += times
        return self._requests.copy(), self._slots[:n].copy(), before

    def check(self) -> None:
        """Raise AssertionError unless columns and schedule agree with the requests (for tests; O(everything))."""
        assert self._at == {request: at for at, request in enumerate(self._requests)}
        assert self._wake_at.keys() == self._at.keys()
        for request, at in self._at.items():
            assert request.slot == self._slots[at]
            assert request.num_computed == self._starts[at] == request.num_with_pending - 1
            step = self._step + min(request.capacity, request.max_computed) - request.num_computed
            assert self._wake_at[request] == step
            assert request in self._wake_ups[step]
