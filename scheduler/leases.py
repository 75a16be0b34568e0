"""Leases: programs whose clients have asked that their KV be kept for a while.

A lease puts a program last in the order of eviction of its tenant and guarantees nothing. It ends with its time, or
with the wait for which it was asked. All of an owner's leases, and all leases, cover a bounded share of the pages.
"""

from __future__ import annotations

import bisect
from collections import Counter
from collections.abc import Hashable, Iterator

from .program import Program

OWNER_SHARE, SHARE = 0.25, 0.5
"""Shares of the device's pages that leases of one owner and of all may cover: guesses."""


class Leases:
    """Programs with a lease, and when each ends.

    Args:
        pages: of the device.
    """

    def __init__(self, pages: int):
        self._most_of_owner, self._most = int(OWNER_SHARE * pages), int(SHARE * pages)
        self._held: dict[Program, tuple[float, int]] = {}  # its end, and the pages that it covers
        self._ends: list[tuple[float, int, Program]] = []  # rising
        self._pages: Counter[Hashable] = Counter()  # by owner
        self._total = 0

    def __contains__(self, program: Program) -> bool:
        return program in self._held

    def grant(self, program: Program, until: float) -> bool:
        """Give a program a lease, in the place of one that it has; False: its owner, or everybody, has too many."""
        self.end(program)
        pages = len(program.pages)
        if self._pages[program.owner] + pages > self._most_of_owner or self._total + pages > self._most:
            return False
        self._held[program] = until, pages
        self._pages[program.owner] += pages
        self._total += pages
        bisect.insort(self._ends, (until, program.number, program))
        return True

    def end(self, program: Program) -> None:
        """End a program's lease, if it has one."""
        until, pages = self._held.pop(program, (0.0, -1))
        if pages < 0:
            return
        del self._ends[bisect.bisect_left(self._ends, (until, program.number))]
        self._total -= pages
        self._pages[program.owner] -= pages
        if not self._pages[program.owner]:
            del self._pages[program.owner]

    def due(self, now: float) -> Iterator[Program]:
        """Yield programs whose lease is over, each without it."""
        while self._ends and self._ends[0][0] <= now:
            program = self._ends[0][2]
            self.end(program)
            yield program

    def check(self) -> None:
        """Raise AssertionError unless the counts agree with the leases (for tests; O(everything))."""
        assert sorted(end[:2] for end in self._ends) == sorted((e, p.number) for p, (e, _) in self._held.items())
        assert self._total == self._pages.total() == sum(pages for _, pages in self._held.values()) <= self._most
        assert all(0 <= pages <= self._most_of_owner for pages in self._pages.values())
