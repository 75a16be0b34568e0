"""Eviction: when device memory is short, programs that do not run lose their pages, to the host or for good."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from .copies import HostCopies, copyable
from .eviction import TenantOrder
from .page_shares import ON_DEVICE
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
    tenant: int = 0
    """Number of the tenant who needs it."""
    spare: bool = False
    """Rather have fewer, if the tenant is beyond its share, than evict KV of tenants within theirs."""


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
        self._order, self._shares = kv.order, pool.shares
        self._offloading = False
        self._together = min(CHUNK, pool.size // 256)
        """Cached pages that a tenant gives up together, so that not each is asked for by itself; by as many it may fall
        below its share."""

    @property
    def slack(self) -> float:
        """Share of the device's memory that can be had at once."""
        pages = self._kv.at_once / self._pool.size
        return min(pages, self._windows.available / self._windows.size) if self._windows.size else pages

    def evict(self, need: Need, now: float) -> bool:
        """Evict programs that do not run until there is what is needed; returns whether there is."""
        if not self._short(need):
            return True
        for tenant, most in self._givers(need, now):
            part = need._replace(pages=min(need.pages, self._pool.at_hand() + most))
            if not self._evict_of(tenant, part, now):
                break
            if (lacking := part.pages - self._pool.at_hand()) > 0:
                self._pool.give_up(tenant, max(lacking, self._together))
            if not self._short(need):
                break
        return not self._short(need)

    def _givers(self, need: Need, now: float) -> list[tuple[int, int]]:
        """Tenants whose KV may be evicted, in turn, and how many pages of each at most."""
        idle, needs = {**dict.fromkeys(self._pool.caching), **self._order.of}, need.pages
        return self._shares.givers(ON_DEVICE, idle, now, needs=needs, to=need.tenant, spare=need.spare)

    def _evict_of(self, tenant: int, need: Need, now: float) -> bool:
        """Evict programs of a tenant until there is what is needed; False: the host only lacks staging, so wait."""
        held = self._order.of.get(tenant)
        if held is None or not self._short(need, tenant):
            return True
        keep, order = need.keep, self._strategy.order(held.all, now)
        if order is None:
            self._evict_clean(held, need)
        for program in held.oldest(clean=False, keep=keep) if order is None else list(order):
            if not self._short(need, tenant):
                return True
            if program is not keep and not self._evict_from(program, need, now):
                return False
        if self._short(need._replace(pages=min(need.pages, self._pool.obtainable)), tenant):
            self._evict_shared(held, need, now)
        return True

    def offload_ahead(self, now: float) -> None:
        """Offload the KV of programs idle longest ahead of need, if little of the pool is free or clean."""
        if not self._order.dirty or self._copies.host.pages == 0:
            return
        low, high = (int(share * self._pool.size) for share in self._strategy.ahead)
        self._offloading = self._kv.at_once < (high if self._offloading else low)
        for program in self._dirty(now) if self._offloading else ():
            if (wanted := high - self._kv.at_once) <= 0:
                return
            first, end = copyable(program, self._pool)
            if end > first and self._strategy.offloads(program):
                count = min(max(wanted, CHUNK), end - first, self._copies.room(len(program.window)))
                if count <= 0:
                    return
                self._kv.offload(program, end - count, count, "ahead of need", now)
            else:
                self._order.clear(program)
            if self._strategy.evicts_clean:
                self._kv.release(program, len(program.pages) - self._order.clean.get(program, 0))

    def _dirty(self, now: float) -> Iterator[Program]:
        """Programs with dirty pages in the order of eviction, each until it has none."""
        of = self._order.of
        for tenant, _ in self._shares.givers(ON_DEVICE, of, now):
            dirty = of[tenant].dirty
            while dirty:
                yield next(iter(dirty))

    def _short(self, need: Need, giver: int | None = None) -> bool:
        """Whether there is less than is needed, with the free pages that a tenant can give up."""
        return need.pages > self._pool.at_hand(giver) or need.windows > self._windows.available

    def _wanted(self, need: Need, program: Program) -> int:
        """How many of the last pages of a program are to be evicted.

        Without its window what is left of a program is of no use on the device, so if windows are short it goes, too.
        """
        pages, windows = need.pages - self._pool.at_hand(program.tenant), need.windows - self._windows.available
        if windows <= 0:
            return pages
        return max(pages, windows if program.window else len(program.pages))

    def _evict_clean(self, held: TenantOrder, need: Need) -> None:
        """Evict pages that have a host copy."""
        for program in held.oldest(clean=True, keep=need.keep):
            count = min(self._wanted(need, program), self._order.clean[program])
            if count <= 0:
                return
            self._kv.note(program, "free", "it has a host copy", count)
            self._kv.release(program, len(program.pages) - count)

    def _evict_from(self, program: Program, need: Need, now: float) -> bool:
        """Evict pages of a program as long as some are needed; False: the host only lacks staging, so wait for it."""
        while self._short(need, program.tenant) and program.pages:
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

    def _evict_shared(self, held: TenantOrder, need: Need, now: float) -> None:
        """Evict, as a last resort, programs that share pages with each other: all but one of them lose the KV."""
        for program in [p for p in held.shared if p is not need.keep]:
            if not self._pool.shared(program.pages[-1]):  # the others have gone
                self._order.add(program)
                if not self._evict_from(program, need, now):
                    return
            if program in held.shared and (
                self._pool.unpinned(program.pages) or need.windows > self._windows.available
            ):
                self._kv.drop(program, len(program.pages), "nothing else is left")
            if not self._short(need, program.tenant):
                return
