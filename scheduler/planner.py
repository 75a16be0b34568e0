"""Plans of steps: which requests compute how many tokens, who starts, and who makes room."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from .admission import Admission
from .config import SchedulerConfig
from .evictor import Need
from .fairness import Tenants
from .offer import Offer
from .pages import PagePool
from .plan import Plan
from .policy import Policy
from .preparation import Preparations
from .program import Request
from .residency import Residency
from .running import Running

SLOTS_PER_PREEMPTION = 16
"""Batch slots per row that a step may preempt for tenants within their part, at least one: a guess."""


@dataclass
class Counts:
    """Counts of what plans have done."""

    preemptions: int = 0
    computed_tokens: int = 0
    reused_tokens: int = 0
    recomputed_tokens: int = 0


class Planner:
    """Gives slots, pages and tokens of the next step to requests.

    Args:
        config: sizes.
        policy: the order of who waits, and of who is preempted.
        pool: device pages.
        residency: where the KV of programs lies that do not run.
    """

    def __init__(self, config: SchedulerConfig, policy: Policy, pool: PagePool, residency: Residency):
        self.running = Running(config, pool, self._rank)
        size = config.page_size
        self.tenants = Tenants(config.max_seqs, pool.size, size, config.tenant_weights, policy.predict.steps)
        self.admission = Admission(config, policy, pool, self.running, residency, self.tenants)
        self.admission.preempt = self._preempt
        self.preparations = Preparations(self.admission, self.vacate)
        self.counts = Counts()
        self._config, self._policy, self._pool, self._residency = config, policy, pool, residency
        self._fresh: dict[Request, None] = {}  # admitted since the last plan with rows; some may have ended since
        self._chosen: dict[Request, int] = {}  # tokens of this step by request, the decode batch left out

    def plan(self, now: float) -> Plan | None:
        """Plan the next step; None: nothing can run."""
        self.preparations.settle(crowded=len(self.admission) > 0)
        self.running.grow_decodes()
        self.admission.preemptible = max(1, self._config.max_running // SLOTS_PER_PREEMPTION)
        budget = self._config.max_step_tokens - self.running.num_decodes
        chosen: dict[Request, int] = {}
        self._chosen = chosen
        rows, yielding = self._in_turn()
        budget = self._go_on(rows, budget, now)
        if yielding:
            budget = self._go_on(yielding, self._admit_waiting(budget, now, behind=True), now)
        self._admit_waiting(budget, now)
        self._residency.evictor.offload_ahead(now)
        if not chosen and not self.running.num_decodes:
            return None
        fresh, self._fresh = [request for request in self._fresh if request.slot >= 0], {}
        plan = self.running.step(chosen, fresh, now)
        self.counts.computed_tokens += plan.tokens
        self.tenants.charge(plan)
        return plan

    def extend(self, plan: Plan, times: int) -> int:
        """Repeat a plan for up to ``times`` equal steps, as far as it can; see :meth:`.running.Running.extend`.

        Returns how many steps it stands for now.
        """
        times = self.running.extend(plan, times)
        self.counts.computed_tokens += plan.tokens * (times - 1)
        self.tenants.charge(plan, times - 1)
        return times

    def _in_turn(self) -> tuple[Iterable[Request], list[Request]]:
        """Rows outside the decode batch, and after them those whose prompts yield to waiting requests.

        These are of tenants that are not behind virtual time, if requests of others are.
        """
        rows, tenants = self.running.others(), self.tenants
        if not tenants.contend:
            return rows, []
        yields = {row: row.num_to_compute > 1 and not tenants.precedes(row) for row in rows}
        return [row for row in yields if not yields[row]], [row for row in yields if yields[row]]

    def _go_on(self, rows: Iterable[Request], budget: int, now: float) -> int:
        """Choose the next tokens of running requests; returns what is left of the budget."""
        for request in rows:
            if request.slot < 0 or request.loading is not None:  # preempted meanwhile, and on its way back
                continue
            count = self._hold(request, min(request.num_to_compute, budget), now)
            if count > 0:
                self._chosen[request] = count
                budget -= count
        return budget

    def _admit_waiting(self, budget: int, now: float, *, behind: bool = False) -> int:
        """Give slots and pages to waiting requests, in the order of the policy, while both last.

        If none is left, go on with those that prepare the next prompt of their programs. What starts computes as much
        as the budget allows. With ``behind`` only those of tenants behind virtual time start. Returns the budget left.
        """
        admitted: dict[Request, None] = {}  # some may be preempted for a tenant within its part, and start again
        left = budget
        while left > 0 and (self.running.slots or self.tenants.owed):
            offer = self.admission.next(now, behind=behind) if len(self.admission) else self.preparations.next(now)
            if offer is None:
                break
            request = offer.request
            self._admit(offer, now)
            admitted[request] = None
            left -= 0 if request.loading else request.num_to_compute
        for request in admitted:
            if request.slot >= 0 and request.loading is None and budget > 0:
                count = self._chosen[request] = min(request.num_to_compute, budget)
                budget -= count
                self._open_window(request, count, now)
            self._fresh[request] = None
        return budget

    def _admit(self, offer: Offer, now: float) -> None:
        request = offer.request
        if request.prepares:
            self.preparations.started(request)
        else:
            self.admission.remove(request)
            request.deferred = request.defers_until > now
            request.program.job.waited_s += now - request.queued
        pages = self._residency.take(offer, now)
        self.running.add(request, pages)
        self.tenants.starts(request)
        if request.preemptions == 0:
            request.cached_tokens = request.reused
        self.counts.reused_tokens += request.reused
        self.counts.recomputed_tokens += max(0, request.matched - request.reused - 1)
        request.started = now
        if not request.prepares:
            self._policy.admitted(request, now)

    def enqueue(self, request: Request, now: float) -> None:
        """Let a request wait for a slot."""
        request.queued = now
        self._policy.queued(request, now)
        self.admission.push(request)

    def _hold(self, request: Request, count: int, now: float) -> int:
        """Give ``request`` pages for ``count`` more tokens; returns how many tokens it has pages for, at most that.

        Pages come from the free ones, then from programs that do not run, then from running requests after it in the
        order of the policy, those of tenants over their share before all. So the first in order always gets on, and
        nothing waits for ever.
        """
        if request.num_computed + count <= request.capacity:
            self._open_window(request, count, now)
            return count
        need = self._pages_for(request.num_computed + count) - len(request.pages)
        evict, tenant = self._residency.evictor.evict, request.program.tenant
        wanted = Need(need, 0, wait=False, tenant=tenant, spare=self._pool.shares.several)
        while not evict(wanted, now):
            victim = self.tenants.last(self.running.requests)
            if wanted.spare and (victim.program.tenant != tenant or self.tenants.rows(request.program.owner) == 1):
                wanted = wanted._replace(spare=False)  # none of its tenant's rows could make room instead
            elif victim is request:
                break
            else:
                self._preempt(victim, now)
        self.running.grow(request, min(need, self._pool.at_hand()))
        count = min(count, request.capacity - request.num_computed)
        self._open_window(request, count, now)
        return count

    def _open_window(self, request: Request, count: int, now: float) -> None:
        """Give ``request`` window pages for ``count`` more tokens; there are enough for all that run."""
        windows, computed = self._pool.windows, request.num_computed
        if windows.size and count > 0:
            end = self._pages_for(computed + count)
            need = Need(0, end - self._pages_for(computed), wait=False, tenant=request.program.tenant)
            self._residency.evictor.evict(need, now)
            windows.hold(request.program, request.pages, windows.first(computed), end)

    def _preempt(self, victim: Request, now: float) -> None:
        """Take a running request off its slot; its KV is kept like that of a waiting program, for as long as it can."""
        self._chosen.pop(victim, None)
        if victim.prepares:
            self.preparations.step_aside(victim)
            return
        victim.matched = victim.num_at_start = victim.num_with_pending
        self.vacate(victim, now)
        victim.preemptions += 1
        self.counts.preemptions += 1
        self.enqueue(victim, now)

    def vacate(self, request: Request, now: float) -> None:
        """Take a request off its slot; its program retains the KV that has been computed."""
        job, computed = request.program.job, request.num_computed - request.reused
        job.ran_s += now - request.started
        job.service += computed
        request.service += computed
        keep = self._pages_for(request.num_computed)
        if request.loading is not None:  # what it waits for stays in host memory
            keep -= len(request.loading.pages)
            self._residency.cancel(request.loading)
        else:
            request.extend_block_hashes()
            self.running.cache_pages(request, 0)
        self.tenants.stops(request)
        pages = self.running.remove(request)
        windows = self._pool.windows
        windows.hold(request.program, pages, windows.first(request.num_computed), keep)
        self._pool.release(pages[keep:], request.program.tenant)
        self._residency.retain(request.program, request, pages[:keep], request.num_computed)
        request.num_computed = 0

    def _rank(self, request: Request) -> tuple[float, ...]:
        """Place among the running requests; the highest is preempted first."""
        if request.prepares:
            return 2, request.number
        return request.deferred, *self._policy.rank(request)

    def _pages_for(self, tokens: int) -> int:
        return -(-tokens // self._config.page_size)
