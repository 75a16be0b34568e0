"""Tenants' shares of memory: whose KV makes room when pages are short, on the device and on the host.

A tenant *holds* the pages that its programs were given, until somebody else gets them: those of requests that run, of
programs that do not, and full pages of programs that have ended, as long as they can still be found. A page that
several use counts once, for the tenant it was computed for; one that nobody uses any more, for who used it last.

Its *share* is its part of the memory by the weights of all *active* tenants: those with a request, or whose last one
ended less than ``RECENT_S`` ago. Others have none, and neither has who has the weight 0.

Who needs pages counts as if it had them. First those give who have no share, the one longest without a request before
all; then those above their share, furthest first, each down to its share; the rest gives only to who is within its own
share, or runs nothing yet. So no tenant's idle KV goes while another above its share has some, and a flood's further
requests wait for its own. This is weighted max-min fairness of a cache, in each tenant's own order of eviction.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from typing import Any

import numpy as np

RECENT_S = 300.0
"""Seconds for which a tenant keeps its share without a request, as while its agents' tools run: a guess."""
ON_DEVICE, ON_HOST = range(2)
ALL = 2**40
"""More pages than there are."""
MOST_TENANTS = 1024
"""Tenants told apart, since every eviction looks at all of them: one client may come as thousands, each with a page."""
REST = object()
"""The one tenant that all further owners without a weight are together."""


class PageShares:
    """What tenants hold of each tier's memory, and whose KV is evicted first.

    A tenant has a number as long as it has programs or holds pages. Without :meth:`enter` everything is number 0's.

    Args:
        sizes: of the device's and the host's memory, in the units in which what is held is counted.
        weights: of tenants by owner; all others have 1.
        apart: whether owners are tenants of their own; if not, all are one.
    """

    def __init__(self, sizes: tuple[int, int], weights: Mapping[Any, float] | None = None, *, apart: bool = True):
        self._sizes, self._weights, self._apart = sizes, weights or {}, apart
        self._number: dict[Hashable, int] = {}
        self._owner: dict[int, Hashable] = {}
        self._free: list[int] = []
        self._weight, self._used = np.zeros(0), np.zeros(0)  # by number; the time when the last request ended
        self._programs, self._requests = np.zeros(0, int), np.zeros(0, int)
        self._held = np.zeros((2, 0), int)
        self._grow()

    @property
    def several(self) -> bool:
        """Whether several tenants have programs or hold pages."""
        return len(self._number) > 1

    # -- tenants come and go ---------------------------------------------------------------------------------------

    def enter(self, owner: Hashable, now: float) -> int:
        """Count a program that is opened; returns the number of its tenant."""
        key = owner if self._apart else None
        if key not in self._number and key not in self._weights and len(self._number) >= MOST_TENANTS:
            key = REST
        tenant = self._number.get(key)
        if tenant is None:
            if not self._free:
                self._grow()
            tenant = self._number[key] = self._free.pop()
            self._owner[tenant] = key
            self._weight[tenant] = self._weights.get(key, 1.0) if self._apart else 1.0
        self._programs[tenant] += 1
        self._used[tenant] = now
        return tenant

    def leave(self, tenant: int) -> None:
        """Count a program no longer, because it has ended."""
        self._programs[tenant] -= 1
        self._settle(tenant)

    def asks(self, tenant: int) -> None:
        """A tenant has a further request."""
        self._requests[tenant] += 1

    def asks_no_more(self, tenant: int, now: float) -> None:
        """A request of a tenant has ended."""
        self._requests[tenant] -= 1
        self._used[tenant] = now

    def hold(self, tier: int, tenant: int, pages: int) -> None:
        """Count pages that a tenant holds from now on; what is negative it holds no longer."""
        held = self._held[tier]
        held[tenant] += pages
        if not held[tenant]:
            self._settle(tenant)

    def _settle(self, tenant: int) -> None:
        """Forget a tenant that has nothing."""
        if not self._programs[tenant] and not self._held[:, tenant].any() and tenant in self._owner:
            del self._number[self._owner.pop(tenant)]
            self._free.append(tenant)
            self._weight[tenant] = 0.0

    def _grow(self) -> None:
        size = len(self._weight)
        self._free += range(2 * size + 7, size - 1, -1)
        for name in ("_weight", "_used", "_programs", "_requests"):
            column = getattr(self, name)
            setattr(self, name, np.concatenate([column, np.zeros(size + 8, column.dtype)]))
        self._held = np.concatenate([self._held, np.zeros((2, size + 8), int)], axis=1)

    # -- who gives -------------------------------------------------------------------------------------------------

    def givers(
        self, tier: int, tenants: Iterable[int], now: float, *, needs: int = 0, to: int = 0, spare: bool = False
    ) -> list[tuple[int, int]]:
        """Say who gives pages, in turn, each with how many it gives at most.

        Args:
            tier: ``ON_DEVICE`` or ``ON_HOST``.
            tenants: those who have something to give.
            now: seconds.
            needs: how much is needed.
            to: the tenant that needs it.
            spare: whether a tenant beyond its share gets nothing from those within theirs.
        """
        if not self.several:
            return [(tenant, ALL) for tenant in tenants]
        share = self._share(now) * self._sizes[tier]
        held = self._held[tier].astype(float)
        held[to] += needs
        numbers = np.fromiter(tenants, int)
        excess, part = (held - share)[numbers], held[numbers] / np.maximum(share[numbers], 1e-12)
        part[share[numbers] == 0] = np.inf
        most = np.ceil(excess - 1e-6)
        most[most < 1] = 0 if spare and held[to] > share[to] else ALL
        turns = np.lexsort((self._used[numbers], -part))
        turns = turns[most[turns] > 0]
        return list(zip(numbers[turns].tolist(), most[turns].astype(int).tolist(), strict=True))

    def _share(self, now: float) -> np.ndarray:
        """Part of the memory that each tenant has as its share, by number."""
        active = (self._requests > 0) | (self._used >= now - RECENT_S)
        weight = np.where(active, self._weight, 0.0)
        return weight / max(float(weight.sum()), 1e-12)

    def check(self, programs: Iterable[int], requests: Iterable[int], held: tuple[Mapping[int, int], ...]) -> None:
        """Raise AssertionError unless the counts are those of the programs, requests and pages of each tenant."""
        for column, counted in ((self._programs, programs), (self._requests, requests)):
            assert column.tolist() == np.bincount([*counted], minlength=len(column)).tolist(), "tenants do not add up"
        for tier, pages in zip(self._held, held, strict=True):
            assert {i: n for i, n in enumerate(tier.tolist()) if n} == pages, "pages of tenants do not add up"
        assert self._number == {owner: tenant for tenant, owner in self._owner.items()}
        assert sorted([*self._owner, *self._free]) == list(range(len(self._weight))), "numbers of tenants leak"
        busy = np.flatnonzero(self._programs + self._held.sum(axis=0))
        assert set(busy.tolist()) == self._owner.keys(), "a tenant is remembered that has nothing, or the reverse"
