"""In which order segments run. A policy gives every segment a key; the lowest goes first."""

from __future__ import annotations

import heapq
from collections.abc import Callable

from .program import Segment

Key = tuple[float, int]


class Policy:
    """First come, first served, by the segment's own arrival: what engines do that know no programs."""

    def key(self, segment: Segment) -> Key:
        """Its place; it holds from one queueing to the next. Ties go by order of submission."""
        return segment.submitted, segment.number


class ProgramFCFS(Policy):
    """First come, first served, by the program's arrival: a program that returns from a tool keeps its place.

    InferCept (arXiv 2402.01869) and Continuum (arXiv 2511.02230) order so.
    """

    def key(self, segment: Segment) -> Key:
        return segment.program.arrival, segment.number


POLICIES: dict[str, Callable[[], Policy]] = {"fcfs": Policy, "program-fcfs": ProgramFCFS}


def make_policy(name: str) -> Policy:
    """The policy of that name.

    Raises:
        ValueError: there is none; the message lists them.
    """
    if name not in POLICIES:
        raise ValueError(f"no policy is called {name!r}; there are {', '.join(POLICIES)}")
    return POLICIES[name]()


class WaitingQueue:
    """Segments in the order of a policy; removal is lazy, so every operation is O(log n)."""

    def __init__(self, policy: Policy):
        self._policy = policy
        self._heap: list[tuple[Key, Segment]] = []
        self._present: set[Segment] = set()

    def __len__(self) -> int:
        return len(self._present)

    def push(self, segment: Segment) -> None:
        self._present.add(segment)
        heapq.heappush(self._heap, (self._policy.key(segment), segment))

    def peek(self) -> Segment | None:
        while self._heap and self._heap[0][1] not in self._present:
            heapq.heappop(self._heap)
        return self._heap[0][1] if self._heap else None

    def pop(self) -> Segment:
        segment = self.peek()
        if segment is None:
            raise IndexError("no segment waits")
        heapq.heappop(self._heap)
        self._present.remove(segment)
        return segment

    def remove(self, segment: Segment) -> None:
        self._present.discard(segment)
        if len(self._heap) > 2 * len(self._present) + 64:  # removed ones must not pile up behind a stuck head
            self._heap = [entry for entry in self._heap if entry[1] in self._present]
            heapq.heapify(self._heap)
