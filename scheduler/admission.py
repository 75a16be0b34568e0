"""Who starts next: of the requests that wait, the first in the order of the policy that may start and fits.

A request fits if all its known tokens can have pages now without preemption: those that its program has kept, those
that others have computed for equal tokens, and pages that can be had.
"""

from __future__ import annotations

from itertools import islice

from .config import SchedulerConfig
from .pages import PagePool
from .policy import Policy, Pressure, WaitingQueue
from .program import Request
from .residency import Residency
from .running import Running


class Admission:
    """The requests that wait, and the choice among them."""

    def __init__(self, config: SchedulerConfig, policy: Policy, pool: PagePool, running: Running, residency: Residency):
        self._policy, self._pool, self._running, self._residency = policy, pool, running, residency
        self._size = config.page_size
        self._hosts = config.host.pages > 0 and policy.strategy.hosts
        self._queue = WaitingQueue(policy.columns)

    def __len__(self) -> int:
        return len(self._queue)

    def __contains__(self, request: Request) -> bool:
        return request in self._queue

    def push(self, request: Request) -> None:
        """A request waits from now on."""
        self._queue.push(request, self._policy.features(request))

    def remove(self, request: Request) -> None:
        """It waits no more."""
        self._queue.remove(request)

    def next(self, now: float) -> tuple[Request | None, list[int]]:
        """Who starts next, and the pages it shares: the first in order that may; if it does not fit, it is passed over
        a few times in favour of later ones that do."""
        self._refresh()
        policy, passed = self._policy, None
        for request in self._queue.first(policy, now, self._pressure(), policy.backfill + 1):
            if not policy.admits(request, now, self._pressure()):
                continue
            found = self._fitting(request, now)
            if found is not None:
                if passed is not None:
                    passed.passed += 1
                return request, found
            if passed is None:
                passed = request
                if passed.passed >= policy.passes:
                    break
        return None, []

    def _fitting(self, request: Request, now: float) -> list[int] | None:
        """If all known tokens of a waiting request can have pages now without preemption: the pages that others have
        computed for it, one more reference taken; else None."""
        program = request.program
        if request.pending or not self._restorable(request):
            return None  # its last token is still on the device, or its pages are on their way
        found = self._found(request)
        need = self._needs(request, found)
        reserve = len(self._running) // 2  # so that those who run can grow
        spare = self._pool.obtainable - need - reserve
        own = len(program.pages) + len(found)  # they are no longer to be had if it starts
        if spare < 0 or (spare < own and spare < self._pool.unpinned({*program.pages, *found})):
            return None
        self._pool.share(found)
        if self._residency.reclaim(need, now, wait=True, spare=program):
            return found
        self._pool.release(found)
        return None

    def _found(self, request: Request) -> list[int]:
        """Pages of equal content, computed by anybody, that continue those which the request's program has."""
        last = (request.known - 1) // self._size  # one token is always left to compute
        held = min(len(request.program.pages), -(-request.reusable // self._size))
        return self._pool.find(islice(request.keys, held, last)) if held * self._size <= request.reusable else []

    def _needs(self, request: Request, found: list[int]) -> int:
        """Free pages that a request needs for all its known tokens."""
        pages, reusable = request.program.pages, request.reusable
        held = min(len(pages), -(-reusable // self._size))
        split = held * self._size > reusable and self._pool.shared(pages[held - 1])  # see Residency.take
        return -(-request.known // self._size) - held - len(found) + split

    def _restorable(self, request: Request) -> bool:
        """Whether nothing that a request would reuse is still on its way."""
        program = request.program
        kept, held = -(-request.reusable // self._size), len(program.pages)
        return all(copy.ready for copy in program.copies if copy.end > held and copy.first < kept)

    def _refresh(self) -> None:
        """Bring features up to date."""
        changed, self._policy.changed = self._policy.changed, []
        for request in changed:
            if request in self._queue:
                self._queue.update(request, self._policy.features(request))

    def _pressure(self) -> Pressure:
        pool = self._pool
        return Pressure(self._size, pool.size, pool.free, pool.obtainable - pool.free, len(self._running), self._hosts)
