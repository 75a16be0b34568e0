"""Where the KV of programs lies that are not running: on the device, in host memory, or nowhere any more.

A program keeps its KV on the device when its segment ends, and when it is preempted. It can always be taken: pages
are taken from the end of a program's tokens, so that what is left is a prefix. With a host tier they are moved there:
gathered into a staging buffer, after which the device pages are free at once, and copied while steps go on. Without
one, or if it is full, they are dropped and computed again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from .pages import PagePool
from .program import Program, Segment

Victims = Callable[[Iterable[Program], float], Iterable[Program] | None]
"""Given programs that retain device pages, least recently used first, and the time: whose to take, in order; None: in
the order they come."""


@dataclass(frozen=True)
class HostTier:
    """Sizes of the host's part, in pages. The default is: there is none."""

    pages: int = 0
    staging: int = 0
    """Pages on their way to the host at most: the device memory given to staging."""
    spill_above: float = 0.7
    """Share of the pool in use above which the most idle programs' KV moves to the host ahead of need."""


@dataclass(frozen=True, eq=False)
class Transfer:
    """A copy between device and host, for whoever runs the plan; report its end to ``Scheduler.transferred``."""

    program: Program
    pages: tuple[int, ...]
    """Device pages, read by an offload before anything later is dispatched, written by a restore."""
    segment: Segment | None = None
    """The segment that waits for a restore; None: an offload."""


class Residency:
    """Owns every page that no running segment owns."""

    def __init__(
        self, pool: PagePool, page_size: int, host: HostTier, victims: Victims, lost: Callable[[Program], None]
    ):
        self.pool = pool
        self.retained = 0
        """Device pages of programs without a running segment."""
        self.reclaimed = 0
        """Pages dropped under pressure, in all."""
        self.moved = [0, 0]
        """Pages moved to the host and back, in all."""
        self.transfers: list[Transfer] = []
        """Begun since the last plan."""
        self._size = page_size
        self._host = host
        self._hosted = 0  # pages in host memory, those on their way included
        self._staged = 0
        self._victims = victims
        self._lost = lost  # told of every program that loses KV
        self._lru: dict[Program, None] = {}  # with device pages but no running segment, least recently used first

    # -- programs ----------------------------------------------------------------------------------------------

    def retain(self, program: Program, segment: Segment, pages: list[int], tokens: int) -> None:
        """Take over the KV of the first ``tokens`` tokens of a segment that stops running, on ``pages``."""
        program.last, program.kept, program.pages = segment, tokens, pages
        self.retained += len(pages)
        if pages:
            self._lru[program] = None

    def trim(self, program: Program, tokens: int) -> None:
        """Drop the KV of all but the first ``tokens`` tokens."""
        if tokens >= program.kept:
            return
        program.kept = tokens
        keep = -(-tokens // self._size)
        self._unhost(program, max(0, len(program.pages) + program.hosted - max(keep, len(program.pages))))
        self._release(program, keep)

    def take(self, segment: Segment) -> tuple[list[int], int]:
        """Hand a segment that is admitted the device pages it can reuse, and how many are to be restored after them."""
        program = segment.program
        self.trim(program, segment.reusable)
        pages, program.pages = program.pages, []
        self.retained -= len(pages)
        self._lru.pop(program, None)
        return pages, program.hosted

    def restore(self, segment: Segment, pages: list[int]) -> Transfer:
        """Bring the hosted part of a segment's KV back to ``pages``."""
        transfer = Transfer(segment.program, tuple(pages), segment)
        self.transfers.append(transfer)
        return transfer

    def ended(self, transfer: Transfer) -> None:
        """A transfer has ended."""
        program, segment = transfer.program, transfer.segment
        if segment is None:
            self._staged -= len(transfer.pages)
            program.moving -= 1
        elif segment.loading is transfer:
            segment.loading = None
            self._unhost(program, program.hosted)
            self.moved[1] += len(transfer.pages)

    # -- pressure ----------------------------------------------------------------------------------------------

    @property
    def obtainable(self) -> int:
        """Pages that can be had without taking them from a running segment, sooner or later."""
        return self.pool.free + self.retained

    def reclaim(self, need: int, now: float, *, wait: bool, spare: Program | None = None) -> bool:
        """Make ``need`` pages free if programs that do not run hold enough; whether they are free now.

        Args:
            need: pages.
            now: seconds.
            wait: rather have fewer pages now than drop KV for which the host only lacks staging.
            spare: not to be taken from.
        """
        if self.pool.free < need:
            for program in self._in_order(now, spare):
                if not self._evict(program, need - self.pool.free, wait):
                    break
                if self.pool.free >= need:
                    break
        return self.pool.free >= need

    def spill(self, now: float) -> None:
        """Above the mark, move the KV of the most idle programs to the host ahead of need."""
        spare = int((1 - self._host.spill_above) * self.pool.size)
        if self._room() > 0 and self.pool.free < spare:
            for program in self._in_order(now):
                self._offload(program, min(spare - self.pool.free, self._room(), len(program.pages)))
                if self.pool.free >= spare or self._room() <= 0:
                    break

    def _in_order(self, now: float, spare: Program | None = None) -> Iterator[Program]:
        """Programs with device pages, but ``spare``; the caller empties one before it asks for the next."""
        order = self._victims(self._lru, now)
        if order is not None:
            yield from [program for program in order if program is not spare]
            return
        if spare in self._lru:  # it is used next, so it belongs at the end
            del self._lru[spare]
            self._lru[spare] = None
        while self._lru and (first := next(iter(self._lru))) is not spare:
            yield first

    def check(self) -> None:
        """Raise AssertionError unless the books balance (for tests; O(everything))."""
        assert self.retained == sum(len(p.pages) for p in self._lru)
        assert all(p.pages for p in self._lru)
        assert 0 <= self._staged <= max(self._host.staging, 0)
        assert 0 <= self._hosted <= self._host.pages

    # -- inside ------------------------------------------------------------------------------------------------

    def _room(self) -> int:
        return min(self._host.pages - self._hosted, self._host.staging - self._staged)

    def _evict(self, program: Program, need: int, wait: bool) -> bool:
        """Take up to ``need`` pages of a program; False: the host only lacks staging, so wait for it."""
        want = min(need, len(program.pages))
        moved = min(want, self._room())
        if moved > 0:
            self._offload(program, moved)
            want -= moved
        if want > 0:
            if wait and self._hosted + want <= self._host.pages:
                return False
            self._drop(program, want)
        return True

    def _offload(self, program: Program, count: int) -> None:
        keep = len(program.pages) - count
        self.transfers.append(Transfer(program, tuple(program.pages[keep:])))
        program.hosted += count
        program.moving += 1
        self._hosted += count
        self._staged += count
        self.moved[0] += count
        self._release(program, keep)

    def _drop(self, program: Program, count: int) -> None:
        """Lose the last device pages of a program, and what the host holds after them."""
        keep = len(program.pages) - count
        self.reclaimed += count + program.hosted
        self._unhost(program, program.hosted)
        program.kept = min(program.kept, keep * self._size)
        self._release(program, keep)
        self._lost(program)

    def _release(self, program: Program, keep: int) -> None:
        gone = program.pages[keep:]
        if gone:
            self.pool.release(gone)
            del program.pages[keep:]
            self.retained -= len(gone)
            if not program.pages:
                del self._lru[program]

    def _unhost(self, program: Program, count: int) -> None:
        program.hosted -= count
        self._hosted -= count
