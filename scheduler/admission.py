"""Admission: chooses the waiting request that starts next, the first in the order of the policy that may and fits.

A request fits if all its known tokens can have pages now without preemption: those that its program has kept, those
that others have computed for equal tokens, and pages that can be had.
"""

from __future__ import annotations

from collections.abc import Callable

from .config import SchedulerConfig
from .evictor import Need
from .fairness import Tenants
from .offer import Offer
from .pages import PagePool
from .policy import Policy, Pressure, WaitingQueue
from .program import Request
from .residency import Residency
from .running import Running

RUNNING_PER_RESERVED_PAGE = 2
"""Running requests per page that stays free, so that they can grow a while before one is preempted: a guess."""


class Admission:
    """Holds the requests that wait, and chooses among them."""

    def __init__(
        self,
        config: SchedulerConfig,
        policy: Policy,
        pool: PagePool,
        running: Running,
        residency: Residency,
        tenants: Tenants,
    ):
        self.unstarted = 0
        """Waiting requests that have not run yet; the others were preempted."""
        self.preempt: Callable[[Request, float], None] = lambda request, now: None
        """Takes a row off its slot; Planner sets it."""
        self.preemptible = 0
        """Rows that may still be preempted in this step for tenants within their part."""
        self._policy, self._pool, self._running, self._residency = policy, pool, running, residency
        self._size = config.page_size
        self._host_tier = config.host.pages > 0 and policy.strategy.uses_host
        self._tenants = tenants
        self._queue = WaitingQueue(policy.columns)
        self._outdated: dict[Request, None] = {}
        policy.outdate = self.outdate

    def __len__(self) -> int:
        return len(self._queue)

    def push(self, request: Request) -> None:
        """A request waits from now on."""
        self.unstarted += request.preemptions == 0
        self._queue.push(request, self._policy.features(request), self._tenants.waits(request))

    def remove(self, request: Request) -> None:
        """A request waits no more."""
        self.unstarted -= request.preemptions == 0
        self._queue.remove(request)
        self._tenants.waits_no_more(request)
        self._outdated.pop(request, None)

    def outdate(self, request: Request) -> None:
        """The features of a request have changed, as when its program has lost KV; ignored unless it waits."""
        if request in self._queue:
            self._outdated[request] = None

    def next(self, now: float, *, behind: bool = False) -> Offer | None:
        """The request to start next, with what it starts from.

        If the first in order does not fit, rows may be preempted for it (:mod:`~.fairness`), or else later ones that
        do fit may start before it, but only so often. With ``behind``
        only requests of tenants behind virtual time start.
        """
        self._refresh()
        policy, blocked, pressure = self._policy, None, self._pressure()
        classes = self._tenants.classes() if self._tenants.contend else None
        for request in self._queue.first(policy, now, pressure, policy.backfill + 1, classes):
            if behind and not self._tenants.precedes(request):
                return None
            if not policy.admits(request, now, pressure):
                continue
            offer = self.fitting(request, now)
            while offer is None and blocked is None and (victim := self._victim(request, now)) is not None:
                if not self.preemptible:
                    return None
                self.preemptible -= 1
                self.preempt(victim, now)
                offer = self.fitting(request, now)
            if offer is not None:
                if blocked is not None:
                    blocked.skipped += 1
                return offer
            if blocked is None:
                blocked = request
                if blocked.skipped >= policy.max_skips:
                    break
        return None

    def fitting(self, request: Request, now: float) -> Offer | None:
        """Return what a waiting request starts from if there are a slot and pages for it; enough are free then."""
        offer = self._residency.offer(request) if self._running.slots else None
        if offer is None:
            return None
        program = request.program
        left = self._pool.obtainable - offer.need - self._reserve
        own = len(program.pages) + len(offer.found)  # they are no longer to be had if it starts
        if left < 0 or (left < own and left < self._pool.unpinned({*program.pages, *offer.found})):
            return None
        self._pool.share(offer.found, program.tenant)
        spare = self._tenants.rows(program.owner) > 0
        need = Need(offer.need, offer.windows, wait=True, keep=program, tenant=program.tenant, spare=spare)
        if self._residency.evictor.evict(need, now):
            return offer
        self._pool.release(offer.found, program.tenant)
        return None

    @property
    def _reserve(self) -> int:
        return len(self._running) // RUNNING_PER_RESERVED_PAGE

    def _victim(self, request: Request, now: float) -> Request | None:
        """A row to preempt for a request that does not fit; None: it waits for its turn, staging or its last token."""
        if not self._tenants.contend or request.defers_until > now or request.num_pending:
            return None
        need = -(-request.num_tokens // self._size)
        short = need + self._reserve - self._pool.obtainable if self._running.slots else 0
        if short <= 0 and self._running.slots:
            return None
        return self._tenants.victim(request, self._running.requests, need, short)

    def _refresh(self) -> None:
        """Bring features up to date."""
        for request in self._outdated:
            self._queue.update(request, self._policy.features(request))
        self._outdated.clear()

    def _pressure(self) -> Pressure:
        pool = self._pool
        return Pressure(
            self._size, pool.size, pool.free, pool.obtainable - pool.free, len(self._running), self._host_tier
        )

    def check(self) -> None:
        """Raise AssertionError unless the counts agree with the queue (for tests; O(everything))."""
        assert self.unstarted == sum(request.preemptions == 0 for request in self._queue)
        assert all(request in self._queue for request in self._outdated)
        self._tenants.check([*self._queue], self._running.requests)
