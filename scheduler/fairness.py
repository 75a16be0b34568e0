"""Fairness between tenants: whoever gets less than their share of the machine goes first, whatever the policy.

A tenant is the owner of programs. Each has a weight, and *contends* while requests of it wait or run. Three rules hold
while several do; with a single tenant nothing is counted and nothing changes:

* **Virtual time** (weighted fair queueing). Every step is charged to the tenants in it, in seconds of the whole machine
  divided by their weights, the counters of VTC (arXiv 2401.00588, OSDI '24). Virtual time advances as the counter of a
  tenant that gets exactly its share would, and never falls behind the lowest counter of those who wait (WF2Q+, Bennett
  and Zhang 1997). A tenant whose counter is ahead of virtual time is *over its share*, and its requests start after
  those of the others (eligibility of WF2Q and EEVDF, Stoica and Abdel-Wahab 1995); among equals the policy decides.
  Who comes back begins at virtual time: nobody saves up what they did not use, and use in idle hours is no debt.
* **The currency** is the dominant share (DRF, Ghodsi et al., NSDI '11) of a step: the larger of a tenant's part of the
  step's time, by the learned costs of its tokens and contexts, and its part of the pool. Tokens alone do not say what
  a long context keeps from others, pages alone not what a prompt costs.
* **Entitlement.** A tenant is entitled to its weighted part of the batch slots and of the pages. If the first in order
  is within its part and finds no room, rows of tenants over their share and their part are preempted, a few per step.
  A tenant whose part is less than one row gets its turn when the others are ahead by what preempting them costs.

So of two tenants who keep requests waiting, neither falls behind the other by more than a constant, and the device
never idles on account of this: requests are reordered, never held back.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence

import numpy as np

from .costs import StepFit
from .plan import Plan
from .program import Request

QUANTUM_STEPS = 8
"""Mean steps that a tenant may be ahead before one without any row takes its slot: a guess."""
LEAST_STEP_S = 1e-6
"""Seconds that a step takes at least, should the learned costs all be 0."""
OVER, LAST = 2, 4
"""Classes of tenants: below ``OVER`` are those within their share; ``LAST`` are those of weight 0."""


class Tenants:
    """Tenants that contend: what they have had, and what they may have.

    Args:
        slots: batch slots.
        pages: pages of the pool.
        page_size: tokens of one.
        weights: of tenants by owner; all others have 1. Who has 0 is served only while nobody else waits.
        steps: learned costs of steps.
    """

    def __init__(self, slots: int, pages: int, page_size: int, weights: Mapping[Hashable, float], steps: StepFit):
        self._slots, self._pages, self._pool_tokens = slots, pages, pages * page_size
        self._weights, self._steps = weights, steps
        self._at: dict[Hashable, int] = {}
        self._free: list[int] = []
        self._of_slot = np.zeros(slots, np.int64)
        self._virtual = 0.0
        self._weight, self._served = np.zeros(0), np.zeros(0)
        self._waiting, self._rows = np.zeros(0, np.int64), np.zeros(0, np.int64)

    @property
    def contend(self) -> bool:
        """Whether requests of several tenants wait or run."""
        return len(self._at) > 1

    # -- requests come and go ------------------------------------------------------------------------------------

    def waits(self, owner: Hashable) -> int:
        """A request of a tenant waits; returns the tenant's place in :meth:`classes`, which stays while one does."""
        at = self._enter(owner)
        if not self._waiting[at]:
            self._served[at] = max(self._served[at], self._virtual)
        self._waiting[at] += 1
        return at

    def waits_no_more(self, owner: Hashable) -> None:
        """A waiting request of a tenant has started or ended."""
        self._waiting[self._at[owner]] -= 1
        self._leave(owner)

    def starts(self, request: Request) -> None:
        """A request has got its slot."""
        at = self._of_slot[request.slot] = self._enter(request.program.owner)
        self._rows[at] += 1

    def stops(self, request: Request) -> None:
        """A request is about to leave its slot."""
        self._rows[self._of_slot[request.slot]] -= 1
        self._leave(request.program.owner)

    def _enter(self, owner: Hashable) -> int:
        at = self._at.get(owner)
        if at is None:
            if not self._free:
                self._grow()
            at = self._at[owner] = self._free.pop()
            self._weight[at], self._served[at] = self._weights.get(owner, 1.0), self._virtual
        return at

    def _leave(self, owner: Hashable) -> None:
        at = self._at[owner]
        if not self._waiting[at] and not self._rows[at]:
            del self._at[owner]
            self._free.append(at)
            self._weight[at] = 0.0

    def _grow(self) -> None:
        size = len(self._weight)
        self._free += range(2 * size + 7, size - 1, -1)
        for name in ("_weight", "_served", "_waiting", "_rows"):
            column = getattr(self, name)
            setattr(self, name, np.concatenate([column, np.zeros(size + 8, column.dtype)]))

    # -- what they have had --------------------------------------------------------------------------------------

    def charge(self, plan: Plan, times: int = 1) -> None:
        """Charge a step, or several equal ones, to those who compute in it. While nobody waits it is free."""
        if not self.contend or not self._waiting.any():
            return
        costs, held, seconds = self._steps.costs, plan.starts + plan.counts, 0.0
        work = costs.base_s / len(held) + costs.per_token_s * plan.counts + costs.per_context_s * held
        if plan.tokens > len(held):
            counts, starts = plan.counts[plan.num_decodes :].astype(np.float64), plan.starts[plan.num_decodes :]
            work[plan.num_decodes :] += costs.per_pair_s * counts * (starts + counts / 2)
            seconds = costs.per_prefill_s
        total = max(float(work.sum()), LEAST_STEP_S)
        owners, size = self._of_slot[plan.slots], len(self._weight)
        compute, memory = np.bincount(owners, work, size) / total, np.bincount(owners, held, size) / self._pool_tokens
        self._serve(times * (seconds + total) * np.maximum(compute, memory))

    def _serve(self, seconds: np.ndarray) -> None:
        """Count what each tenant has been served, and let virtual time advance."""
        weighs = self._weight > 0
        self._served[weighs] += seconds[weighs] / self._weight[weighs]
        backlogged = weighs & (self._waiting > 0)
        if backlogged.any():
            self._virtual += float(seconds[backlogged].sum() / self._weight[backlogged].sum())
            self._virtual = max(self._virtual, float(self._served[backlogged].min()))

    # -- what they may have --------------------------------------------------------------------------------------

    def classes(self) -> np.ndarray:
        """Class of each tenant, by place: the lowest starts first.

        Within its share of service and of slots 0, of service only 1, of slots only 2, of neither 3.
        """
        full = self._rows + 1 > np.maximum(1.0, self._slots * self._part())
        classes = OVER * (self._served > self._virtual) + full
        return np.where(self._weight > 0, classes, LAST)

    def is_over(self, request: Request) -> bool:
        """Whether the tenant of a request has had more than its share."""
        at = self._at[request.program.owner]
        return bool(self._weight[at] == 0 or self._served[at] > self._virtual)

    @property
    def owed(self) -> bool:
        """Whether a request waits that may have a slot from those over their share, if need be."""
        return self.contend and bool((self.classes()[self._waiting > 0] == 0).any())

    def _part(self) -> np.ndarray:
        """Part of the machine that each tenant is entitled to."""
        return self._weight / max(self._weight.sum(), 1e-12)

    # -- room ----------------------------------------------------------------------------------------------------

    def victim(self, request: Request, running: Sequence[Request], need: int, short: int) -> Request | None:
        """Find a row to preempt so that a waiting request can start; None: it has to wait.

        Args:
            request: the first in order.
            running: requests that have a slot; the last by rank is preempted first.
            need: pages of all its tokens.
            short: pages that it lacks; 0: it lacks a slot.
        """
        at = self._at[request.program.owner]
        if not self.contend or self.classes()[at]:
            return None
        part, held = self._part(), self._held(running)
        slots, pages = self._slots * part, self._pages * part
        if self._rows[at] + 1 <= slots[at] and held[at] + need <= pages[at]:
            over = (held > pages) if short else (self._rows > slots)
            over &= (self._served > self._virtual) | (self._weight == 0)
            ahead = np.full(len(part), np.inf)
        elif not self._rows[at]:
            ahead = np.where(self._weight > 0, self._served - self._served[at], np.inf)
            over = ahead > QUANTUM_STEPS * self._steps.mean_step_s
        else:
            return None
        over[at] = False
        if short > held[over].sum():
            return None
        for row in reversed(running):
            owner = self._of_slot[row.slot]
            if over[owner] and ahead[owner] > self._steps.again_s(row.num_computed):
                return row
        return None

    def last(self, running: Sequence[Request]) -> Request:
        """The row that makes room for others: the last by rank, of the tenants over their share if there are some."""
        last = running[-1]
        if not self.contend or last.prepares:
            return last
        over = self._held(running) > self._pages * self._part()
        over &= (self._served > self._virtual) | (self._weight == 0)
        return next((row for row in reversed(running) if over[self._of_slot[row.slot]]), last)

    def _held(self, running: Sequence[Request]) -> np.ndarray:
        """Pages of the rows of each tenant; those that rows share count for each."""
        owners = self._of_slot[[row.slot for row in running]]
        return np.bincount(owners, [len(row.pages) for row in running], len(self._weight))

    def check(self, waiting: Sequence[Request], running: Sequence[Request]) -> None:
        """Raise AssertionError unless the counts are those of the requests (for tests; O(everything))."""
        owners = {request.program.owner for request in (*waiting, *running)}
        assert self._at.keys() == owners, "a tenant is counted that has nothing, or the reverse"
        for owner, at in self._at.items():
            assert self._waiting[at] == sum(request.program.owner == owner for request in waiting)
            assert self._rows[at] == sum(request.program.owner == owner for request in running)
        assert all(self._of_slot[row.slot] == self._at[row.program.owner] for row in running)
