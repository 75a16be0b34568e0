"""Who has copies of KV in host memory, and how much of it is in use."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from itertools import islice

from .pages import PagePool
from .program import Program
from .transfer import HostCopy, HostTier, Part, Transfer

CANDIDATES = 8
"""Programs that are compared when the host is full."""


class HostCopies:
    """The books of the host tier: which programs have copies, and what memory and staging they take.

    Args:
        host: sizes of the tier.
        idle_s: seconds that a program is expected not to run, from a time on.
    """

    def __init__(self, host: HostTier, idle_s: Callable[[Program, float], float]):
        self.host = host
        self.dropped: list[HostCopy] = []
        """Copies that nobody wants any more, since they were last taken."""
        self._idle_s = idle_s
        self._used = 0  # pages of host memory
        self._staged = 0
        self._holders: OrderedDict[Program, None] = OrderedDict()  # least recently used first

    @property
    def room(self) -> int:
        """Pages that a copy begun now may have."""
        return min(self.free, self.host.staging - self._staged)

    @property
    def free(self) -> int:
        """Pages of host memory that are not in use."""
        return self.host.pages - self._used

    def add(self, program: Program, first: int, count: int) -> Part:
        """A copy of the pages ``first … first + count - 1`` of a program, which is about to be made."""
        copy = HostCopy(first, count, count)
        program.copies = sorted([*program.copies, copy], key=lambda c: c.first)
        self._holders[program] = None
        self._used += count
        self._staged += count
        return Part(copy, 0, count)

    def arrived(self, transfer: Transfer) -> HostCopy:
        """A transfer to the host is over, well or not."""
        self._staged -= len(transfer.pages)
        copy = transfer.parts[0].copy
        copy.ready = True
        if copy.dropped:  # while it was on its way
            self._used -= copy.pages
        return copy

    def use(self, program: Program) -> None:
        """A program's copies have been of use."""
        if program in self._holders:
            self._holders.move_to_end(program)

    def cut(self, program: Program, keep: int) -> None:
        """Drop the copies of all but the first ``keep`` pages."""
        while program.copies and program.copies[-1].end > keep:
            copy = program.copies[-1]
            if copy.first < keep:
                copy.used = keep - copy.first
            else:
                self.remove(program, copy)

    def remove(self, program: Program, copy: HostCopy) -> None:
        """Drop one copy."""
        program.copies.remove(copy)
        copy.dropped = True
        self.dropped.append(copy)
        if copy.ready:
            self._used -= copy.pages
        if not program.copies:
            del self._holders[program]

    def least_worth(self, program: Program, now: float) -> Program | None:
        """Whose copies are worth less than those of ``program`` would be: of the holders used least recently, one that
        needs none, or else the one that is idle longest to come."""
        best, longest_s = None, self._idle_s(program, now)
        for other in islice(self._holders, CANDIDATES):
            if other is program or other.restoring or not all(copy.ready for copy in other.copies):
                continue
            if other.running is not None or other.copies[-1].end <= len(other.pages):
                return other
            if (idle_s := self._idle_s(other, now)) > longest_s:
                best, longest_s = other, idle_s
        return best

    def check(self, programs: list[Program]) -> None:
        """Raise AssertionError unless the books balance (for tests; O(everything))."""
        copies = [copy for program in programs for copy in program.copies]
        assert not any(copy.dropped for copy in copies)
        assert self._holders.keys() == {program for program in programs if program.copies}
        assert sum(copy.pages for copy in copies) <= self._used <= self.host.pages
        assert 0 <= self._staged <= max(self.host.staging, 0)


def copyable(program: Program, pool: PagePool) -> tuple[int, int]:
    """The last run of a program's device pages without copies, as (first, end), that nobody shares."""
    end = len(program.pages)
    first = 0
    for copy in reversed(program.copies):
        if copy.end < end:
            first = copy.end
            break
        end = min(end, copy.first)
    at = end
    while at > first and not pool.shared(program.pages[at - 1]):
        at -= 1
    return at, end


def parts_of(program: Program, first: int, end: int) -> list[Part]:
    """Host pages for the pages ``first … end - 1`` of a program."""
    parts = []
    for copy in program.copies:
        low, high = max(first, copy.first), min(end, copy.end)
        if low < high:
            parts.append(Part(copy, low - copy.first, high - low))
    return parts
