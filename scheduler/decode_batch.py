"""Running requests that decode one token at every step, so that a step need not look at any of them.

What such a request does next changes only when its pages are full or its last token is due. Both are known beforehand,
so a schedule says at which step to look at which request; in between all of them are columns, and a step costs one
addition.
"""

from __future__ import annotations

from collections import defaultdict

import numpy as np

from .program import Request, StepCount


class DecodeBatch:
    """At most ``size`` requests, each with all but its last sampled token computed, so that this one comes next."""

    def __init__(self, size: int):
        self._requests: list[Request] = []
        self._outputs: list[list[int]] = []  # of each
        self._at: dict[Request, int] = {}
        self._slots = np.zeros(size, np.int32)
        self._before = np.zeros(size, np.int64)  # tokens that each has computed, less the steps taken
        self._sum = 0  # of these
        self._steps = StepCount()
        self._full: defaultdict[int, list[Request]] = defaultdict(list)  # by step; outdated entries are ignored
        self._last: defaultdict[int, list[Request]] = defaultdict(list)
        self._looked = -1  # the last step of whose requests full() has told

    def __len__(self) -> int:
        return len(self._requests)

    @property
    def context(self) -> int:
        """Tokens that all of them have computed."""
        return self._sum + len(self._requests) * self._steps.taken

    def __contains__(self, request: Request) -> bool:
        return request in self._at

    def add(self, request: Request) -> None:
        at = self._at[request] = len(self._requests)
        self._requests.append(request)
        self._outputs.append(request.output)
        request.advance_with(self._steps)
        self._slots[at], self._before[at] = request.slot, request.computed_base
        self._sum += request.computed_base
        self.schedule(request)

    def schedule(self, request: Request) -> None:
        """Look at a request, which is in, when its pages are full or its last token is under way.

        To be called when its pages have become more.
        """
        if request.capacity < request.max_computed:
            self._full[request.capacity - request.computed_base].append(request)
        else:
            self._last[request.max_computed - request.computed_base].append(request)

    def discard(self, request: Request) -> None:
        """Take a request out, if it is in."""
        at = self._at.pop(request, None)
        if at is None:
            return
        self._sum -= request.computed_base
        request.advance_with(None)
        last, output = self._requests.pop(), self._outputs.pop()
        if last is not request:
            n = len(self._requests)
            self._requests[at], self._outputs[at], self._at[last] = last, output, at
            self._slots[at], self._before[at] = self._slots[n], self._before[n]

    def last(self) -> list[int]:
        """Rows of the step just taken that sample the last token of their requests, in order."""
        due = dict.fromkeys(self._last.get(self._steps.taken, ()))
        return sorted(self._at[r] for r in due if r in self._at and r.num_computed == r.max_computed)

    def full(self) -> list[Request]:
        """Requests that lack a page for the next step: each is to be given one or discarded.

        Those whose last token is under way have left before.
        """
        found: list[Request] = []
        while self._looked < self._steps.taken:
            self._looked += 1
            for request in self._last.pop(self._looked, ()):
                if request in self._at and request.num_computed == request.max_computed:
                    self.discard(request)
            due = dict.fromkeys(self._full.pop(self._looked, ()))  # who left and came back may be there twice
            found += [r for r in due if r in self._at and r.capacity - r.computed_base == self._looked]
        return found

    def advance(self, times: int = 1, room: int = 0) -> tuple[list[Request], list[list[int]], np.ndarray, np.ndarray]:
        """Take ``times`` steps.

        Returns:
            The requests, their outputs, their slots, and the tokens they had computed before. The latter two are
            ``[n + room]`` int32, for as many rows more, which the caller fills in.
        """
        n = len(self._requests)
        slots, starts = np.empty(n + room, np.int32), np.empty(n + room, np.int32)
        slots[:n] = self._slots[:n]
        np.add(self._before[:n], self._steps.taken, out=starts[:n], casting="same_kind")
        self._steps.taken += times
        return self._requests.copy(), self._outputs.copy(), slots, starts

    def check(self) -> None:
        """Raise AssertionError unless columns and schedule agree with the requests (for tests; O(everything))."""
        assert self._at == {request: at for at, request in enumerate(self._requests)}
        assert self.context == sum(request.num_computed for request in self._requests)
        for request, at in self._at.items():
            assert request.slot == self._slots[at]
            assert request.output is self._outputs[at]
            assert request.steps is self._steps
            assert request.computed_base == self._before[at] == request.num_with_pending - 1 - self._steps.taken
            step = min(request.capacity, request.max_computed) - request.computed_base
            assert request in (self._full if request.capacity < request.max_computed else self._last)[step]
