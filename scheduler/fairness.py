"""Fairness between tenants: whoever gets less than their share of the machine goes first, whatever the policy.

A tenant is the owner of programs. Each has a weight, and tenants *contend* while requests of several wait or run. With
a single one nothing is counted and nothing changes. If several do:

* **Virtual time.** While somebody waits, every step is charged to the tenants in it, in seconds of the whole machine
  divided by their weights: the counters of VTC (Fairness in Serving Large Language Models, OSDI '24, arXiv 2401.00588).
  Virtual time advances as the counter of one that waits and gets exactly its share would, and does not fall behind the
  lowest counter of those who wait (WF2Q+, Bennett and Zhang 1997). Who comes back begins at virtual time: nobody saves
  up what they did not use, and what is used while nobody else wants it is no debt.
* **The currency** is the dominant share (DRF, Ghodsi et al., NSDI '11) of a step: the larger of a tenant's part of its
  time, by the learned costs of tokens and contexts, and its part of the pool. Tokens alone do not say what a long
  context keeps from others, and pages alone not what a prompt costs.
* **Precedence.** Requests of tenants that lag behind virtual time start first, and prompts of the others yield to them;
  among equals the policy decides. A tenant whose requests fit into its part of the machine has a credit, until it
  has used that much more than its share, so that it is served at once. The width of credit and lag trades
  fairness for the policy's order: wider ones reorder less.
* **Entitlement.** A tenant is entitled to its part of slots and pages. If the first in order is within it and finds no
  room, rows of tenants beyond theirs that are ahead of it are preempted, a few per step, each only when it has got
  further than it was when it was last preempted. Whose part is less than one
  row gets a turn when the others are ahead by what preempting them costs, too.

So of two tenants who keep requests waiting, neither falls behind the other by more than a constant, and the device
never idles on account of this: requests are reordered, never held back. Whose KV makes room for them is the affair of
:mod:`~.page_shares`.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np

from .costs import StepFit
from .plan import Plan
from .program import Request

CREDIT_S = 5.0
"""Seconds of the whole machine, for a weight of 1, that a tenant of few requests may use beyond its share before others
come first. Swept over 0.2, 1, 5 and 20: less costs mean completion time where many tenants share (RESULTS.md)."""
LEAST_STEP_S = 1e-6
"""Seconds that a step takes at least, should the learned costs all be 0."""
LAST = 4
"""Class of tenants of weight 0."""


class Tenants:
    """Tenants that contend: what they have had, and what they may have.

    Args:
        slots: batch slots.
        pages: pages of the pool.
        page_size: tokens of one.
        weights: of tenants by owner; all others have 1. Who has 0 is served only while nobody else waits.
        steps: learned costs of steps.
    """

    def __init__(self, slots: int, pages: int, page_size: int, weights: Mapping[Any, float], steps: StepFit):
        self._slots, self._pages, self._pool_tokens = slots, pages, pages * page_size
        self._weights, self._steps = weights, steps
        self._at: dict[Hashable, int] = {}
        self._free: list[int] = []
        self.credit_s = CREDIT_S
        """Credit of a tenant of few requests. Half of it is how far one must be behind virtual time to come first, and
        ahead of another to be preempted for it. Studies and tests change it."""
        self._of_slot = np.zeros(slots, np.int64)
        self._virtual = 0.0
        self._weight, self._served = np.zeros(0), np.zeros(0)
        self._waiting, self._rows = np.zeros(0, np.int64), np.zeros(0, np.int64)
        self._tokens = np.zeros(0, np.int64)  # of the prompts of both

    @property
    def contend(self) -> bool:
        """Whether requests of several tenants wait or run."""
        return len(self._at) > 1

    # -- requests come and go ------------------------------------------------------------------------------------

    def waits(self, request: Request) -> int:
        """A request waits; returns its tenant's place in :meth:`classes`, which stays while one does."""
        at = self._enter(request)
        if not self._waiting[at]:
            self._served[at] = max(self._served[at], self._virtual)
        self._waiting[at] += 1
        return at

    def waits_no_more(self, request: Request) -> None:
        """A waiting request has started or ended."""
        self._waiting[self._at[request.program.owner]] -= 1
        self._leave(request)

    def starts(self, request: Request) -> None:
        """A request has got its slot."""
        at = self._of_slot[request.slot] = self._enter(request)
        self._rows[at] += 1

    def stops(self, request: Request) -> None:
        """A request is about to leave its slot."""
        self._rows[self._of_slot[request.slot]] -= 1
        self._leave(request)

    def _enter(self, request: Request) -> int:
        owner = request.program.owner
        at = self._at.get(owner)
        if at is None:
            if not self._free:
                self._grow()
            at = self._at[owner] = self._free.pop()
            self._weight[at], self._served[at] = self._weights.get(owner, 1.0), self._virtual
        self._tokens[at] += len(request.prompt)
        return at

    def _leave(self, request: Request) -> None:
        owner = request.program.owner
        at = self._at[owner]
        self._tokens[at] -= len(request.prompt)
        if not self._waiting[at] and not self._rows[at]:
            del self._at[owner]
            self._free.append(at)
            self._weight[at] = 0.0

    def _grow(self) -> None:
        size = len(self._weight)
        self._free += range(2 * size + 7, size - 1, -1)
        for name in ("_weight", "_served", "_waiting", "_rows", "_tokens"):
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

        Behind virtual time and with less than its part of the slots 0, with all of it 1; not behind 2 and 3.
        """
        full = self._rows + 1 > np.maximum(1.0, self._slots * self._part())
        return np.where(self._weight > 0, 2 * ~self._behind() + full, LAST)

    def precedes(self, request: Request) -> bool:
        """Whether the tenant of a request comes before those that are not behind virtual time."""
        return bool(self._behind()[self._at[request.program.owner]])

    @property
    def owed(self) -> bool:
        """Whether a request waits that may have the slot of another, if need be."""
        if not self.contend:
            return False
        classes = self.classes()[self._waiting > 0]
        return bool((classes == 0).any() or ((classes < LAST).any() and self._rows[self._weight == 0].any()))

    def _part(self) -> np.ndarray:
        """Part of the machine that each tenant is entitled to."""
        return self._weight / max(self._weight.sum(), 1e-12)

    def _counter(self) -> np.ndarray:
        """What each tenant has been served, less its credit."""
        part, requests = self._part(), self._waiting + self._rows
        few = (requests <= self._slots * part) & (self._tokens <= self._pool_tokens * part) | (requests <= 1)
        return np.where(self._weight > 0, self._served - self.credit_s * few, np.inf)

    def _behind(self) -> np.ndarray:
        return self._counter() <= self._virtual - self.credit_s / 2

    def rows(self, owner: Hashable) -> int:
        """Count the requests of a tenant that have a slot."""
        at = self._at.get(owner)
        return 0 if at is None else int(self._rows[at])

    # -- room ----------------------------------------------------------------------------------------------------

    def victim(self, request: Request, running: Sequence[Request], need: int, short: int) -> Request | None:
        """Find a row to preempt so that a waiting request can start; None: it has to wait.

        Args:
            request: the first in order.
            running: requests that have a slot; the last by rank is preempted first.
            need: pages of all its tokens.
            short: pages that it lacks; 0: it lacks a slot.
        """
        at, counter = self._at[request.program.owner], self._counter()
        if not self.contend or not self._weight[at]:
            return None
        part, held, ahead = self._part(), self._held(running), counter - counter[at]
        slots, pages, over = self._slots * part, self._pages * part, ahead > self.credit_s / 2
        within = self._rows[at] + 1 <= slots[at] and held[at] + need <= pages[at]
        if within:
            over &= (held > pages) if short else (self._rows > slots)
        elif self._rows[at]:
            return None
        over[at] = False
        rows = [row for row in running if over[self._of_slot[row.slot]] and _has_got_on(row)]
        if short > sum(len(row.pages) for row in rows):
            return None
        for row in reversed(rows):
            if within or ahead[self._of_slot[row.slot]] > self._steps.again_s(row.num_computed):
                return row
        return None

    def last(self, running: Sequence[Request]) -> Request:
        """The row that makes room for others: the last by rank, of the tenants over their share if there are some."""
        last = running[-1]
        if not self.contend or last.prepares:
            return last
        over = self._held(running) > self._pages * self._part()
        over &= ~self._behind()
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
            of = [request for request in (*waiting, *running) if request.program.owner == owner]
            assert self._tokens[at] == sum(len(request.prompt) for request in of)
        assert all(self._of_slot[row.slot] == self._at[row.program.owner] for row in running)


def _has_got_on(row: Request) -> bool:
    """Whether a row that has been preempted has got further since; if not, two could preempt each other for ever."""
    return not row.preemptions or row.num_computed >= row.num_at_start
