"""When to bring back the KV of programs that are about to return."""

from __future__ import annotations

import heapq
from collections.abc import Iterator

from .program import Program


class Returns:
    """Programs by the time at which their KV is due, each for one wait."""

    def __init__(self) -> None:
        self._due: list[tuple[float, int, Program, float]] = []
        self._count = 0  # equal times stay in order

    def expect(self, program: Program, due: float) -> None:
        """The KV of a program that waits is due at ``due``, in seconds."""
        self._count += 1
        heapq.heappush(self._due, (due, self._count, program, program.wait_began))

    def due(self, now: float) -> Iterator[Program]:
        """Whose KV is due, once; programs that have returned meanwhile are passed over."""
        while self._due and self._due[0][0] <= now:
            _, _, program, began = heapq.heappop(self._due)
            if not program.running and program.wait_began == began:
                yield program
