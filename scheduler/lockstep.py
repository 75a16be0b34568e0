"""Running segments that decode one token at every step, so that a step need not look at any of them.

What such a segment does next changes only when its pages are full or its last token is due, and both are known
beforehand: a calendar of steps says who is to be looked at when. In between a step costs one addition per segment.
"""

from __future__ import annotations

from collections import defaultdict

import numpy as np

from .program import Segment


class Lockstep:
    """At most ``size`` segments, each with all its known tokens computed, so that its last sampled one comes next."""

    def __init__(self, size: int):
        self._segments: list[Segment] = []
        self._at: dict[Segment, int] = {}
        self._slots = np.zeros(size, np.int32)
        self._starts = np.zeros(size, np.int32)  # what each has computed
        self._step = 0
        self._until: dict[Segment, int] = {}
        self._calendar: defaultdict[int, list[Segment]] = defaultdict(list)
        self._looked_up = -1  # the last page of the calendar that has been torn off

    def __len__(self) -> int:
        return len(self._segments)

    def __contains__(self, segment: Segment) -> bool:
        return segment in self._at

    def add(self, segment: Segment) -> None:
        at = self._at[segment] = len(self._segments)
        self._segments.append(segment)
        self._slots[at], self._starts[at] = segment.slot, segment.computed
        self.renew(segment)

    def renew(self, segment: Segment) -> None:
        """Enter a segment into the calendar whose pages have become more."""
        until = self._until[segment] = self._step + min(segment.room, segment.limit) - segment.computed
        self._calendar[until].append(segment)

    def discard(self, segment: Segment) -> None:
        """Take a segment out, if it is in."""
        at = self._at.pop(segment, None)
        if at is None:
            return
        del self._until[segment]
        last = self._segments.pop()
        if last is not segment:
            n = len(self._segments)
            self._segments[at], self._at[last] = last, at
            self._slots[at], self._starts[at] = self._slots[n], self._starts[n]

    def due(self) -> list[Segment]:
        """Those that cannot take the next step as they are: to be renewed or discarded."""
        found = []
        while self._looked_up < self._step:
            self._looked_up += 1
            found += [s for s in self._calendar.pop(self._looked_up, ()) if self._until.get(s) == self._looked_up]
        return found

    def advance(self, times: int = 1) -> tuple[list[Segment], np.ndarray, np.ndarray]:
        """Take ``times`` steps; returns the segments, their slots ``[n]`` and what they had computed before ``[n]``."""
        n = len(self._segments)
        before = self._starts[:n].copy()
        self._starts[:n] += times
        self._step += times
        for segment in self._segments:
            segment.computed += times
        return self._segments.copy(), self._slots[:n].copy(), before

    def check(self) -> None:
        """Raise AssertionError unless the books agree with the segments (for tests; O(everything))."""
        assert self._at == {segment: at for at, segment in enumerate(self._segments)}
        assert self._until.keys() == self._at.keys()
        for segment, at in self._at.items():
            assert segment.slot == self._slots[at]
            assert segment.computed == self._starts[at] == segment.length - 1
            assert self._until[segment] == self._step + min(segment.room, segment.limit) - segment.computed
            assert segment in self._calendar[self._until[segment]]
