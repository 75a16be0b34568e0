"""Eviction: when device memory is short, programs that do not run lose their pages, to the host or for good."""

from __future__ import annotations

from typing import NamedTuple

from .copies import HostCopies, copyable
from .pages import PagePool
from .program import Program
from .retained import RetainedKV
from .strategy import Strategy

CHUNK = 32
"""Least pages offloaded together, if a program has as many and staging has room: a guess."""


class Need(NamedTuple):
    """What somebody needs, and how urgently."""

    pages: int
    """Pages that are to be free."""
    windows: int
    """Window pages that are to be available."""
    wait: bool
    """Rather have fewer now than drop KV for which the host only lacks staging."""
    keep: Program | None = None
    """A program not to be evicted."""


class Evictor:
    """Evicts programs that do not run, when memory is needed and ahead of need.

    Args:
        pool: device pages.
        kv: what programs keep there.
        copies: the host tier.
        strategy: whom to evict, and whether to offload what is evicted.
    """

    def __init__(self, pool: PagePool, kv: RetainedKV, copies: HostCopies, strategy: Strategy):
        self._pool, self._windows, self._kv, self._copies, self._strategy = pool, pool.windows, kv, copies, strategy
        self._order = kv.order
        self._offloading = False

    @property
    def slack(self) -> float:
        """Share of the device's memory that can be had at once."""
        pages = self._kv.at_once / self._pool.size
        return min(pages, self._windows.available / self._windows.size) if self._windows.size else pages

    def evict(self, need: Need, now: float) -> bool:
        """Evict programs that do not run until there is what is needed; returns whether there is."""
        if not self._short(need):
            return True
        keep, order = need.keep, self._strategy.order(self._order.all, now)
        if order is None:
            self._evict_clean(need)
        for program in self._order.oldest(clean=False, keep=keep) if order is None else list(order):
            if not self._short(need):
                return True
            if program is not keep and not self._evict_from(program, need, now):
                return False
        if self._short(need._replace(pages=min(need.pages, self._pool.obtainable))):
            self._evict_shared(need, now)
        return not self._short(need)

    def offload_ahead(self, now: float) -> None:
        """Offload the KV of programs idle longest ahead of need, if little of the pool is free or clean."""
        dirty = self._order.dirty
        if not dirty or self._copies.host.pages == 0:
            return
        low, high = (int(share * self._pool.size) for share in self._strategy.ahead)
        self._offloading = self._kv.at_once < (high if self._offloading else low)
        while self._offloading and dirty and (wanted := high - self._kv.at_once) > 0:
            program = next(iter(dirty))
            first, end = copyable(program, self._pool)
            if end > first and self._strategy.offloads(program):
                count = min(max(wanted, CHUNK), end - first, self._copies.room(len(program.window)))
                if count <= 0:
                    return
                self._kv.offload(program, end - count, count, "ahead of need", now)
            else:
                dirty.discard(program)
            if self._strategy.evicts_clean:
                self._kv.release(program, len(program.pages) - self._order.clean.get(program, 0))

    def _short(self, need: Need) -> bool:
        return need.pages > self._pool.free or need.windows > self._windows.available

    def _wanted(self, need: Need, program: Program) -> int:
        """How many of the last pages of a program are to be evicted.

        Without its window what is left of a program is of no use on the device, so if windows are short it goes, too.
        """
        pages, windows = need.pages - self._pool.free, need.windows - self._windows.available
        if windows <= 0:
            return pages
        return max(pages, windows if program.window else len(program.pages))

    def _evict_clean(self, need: Need) -> None:
        """Evict pages that have a host copy."""
        for program in self._order.oldest(clean=True, keep=need.keep):
            count = min(self._wanted(need, program), self._order.clean[program])
            if count <= 0:
                return
            self._kv.note(program, "free", "it has a host copy", count)
            self._kv.release(program, len(program.pages) - count)

    def _evict_from(self, program: Program, need: Need, now: float) -> bool:
        """Evict pages of a program as long as some are needed; False: the host only lacks staging, so wait for it."""
        while self._short(need) and program.pages:
            want, held = self._wanted(need, program), len(program.pages)
            if clean := self._order.clean.get(program, 0):
                self._kv.release(program, held - min(want, clean))
                continue
            first, end = copyable(program, self._pool)
            if end < held or first == end:
                self._order.set_aside(program)
                return True
            want = min(want, end - first)
            if self._copies.host.pages and self._strategy.offloads(program):
                windows = len(program.window)
                self._kv.make_room(want, program, now, need.keep)
                count = min(max(want, CHUNK), end - first, self._copies.room(windows))
                if count > 0:
                    self._kv.offload(program, end - count, count, "its pages are needed", now)
                    continue
                if need.wait and want <= self._copies.fitting(windows):
                    return False
                why = "the host has no room"
            else:
                why = "it is cheap to compute" if self._copies.host.pages else "there is no host tier"
            self._kv.drop(program, want, why)
        return True

    def _evict_shared(self, need: Need, now: float) -> None:
        """Evict, as a last resort, programs that share pages with each other: all but one of them lose the KV."""
        for program in [p for p in self._order.shared if p is not need.keep]:
            if not self._pool.shared(program.pages[-1]):  # the others have gone
                self._order.add(program)
                if not self._evict_from(program, need, now):
                    return
            if program in self._order.shared and (
                self._pool.unpinned(program.pages) or need.windows > self._windows.available
            ):
                self._kv.drop(program, len(program.pages), "nothing else is left")
            if not self._short(need):
                return
