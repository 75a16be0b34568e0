"""Requests that have a slot and pages: the rows of a step, and what is new in the page table that they read."""

from __future__ import annotations

import bisect
from collections.abc import Callable, Iterator

import numpy as np

from .config import SchedulerConfig
from .lockstep import Lockstep
from .pages import PagePool
from .plan import Plan
from .program import Request


class Running:
    """Owns the slots, and the pages of whoever has one.

    Args:
        config: sizes.
        pool: device pages.
        rank: the policy's order among the running; of a request it stays the same while it runs.
    """

    def __init__(self, config: SchedulerConfig, pool: PagePool, rank: Callable[[Request], tuple[float, ...]]):
        self.requests: list[Request] = []
        """By rank; the last is preempted first."""
        self._free = list(range(config.max_seqs - 1, -1, -1))
        self._changed: dict[Request, int] = {}  # from which of its pages on the device does not know them
        # Those that decode step by step, and those with anything else to do, by rank. Those whose last token is under
        # way have nothing to do.
        self._lockstep = Lockstep(config.max_seqs)
        self._others: list[Request] = []
        self._pool, self._size, self._slots, self._rank = pool, config.page_size, config.max_seqs, rank

    def __len__(self) -> int:
        return len(self.requests)

    @property
    def slots(self) -> int:
        """That are free."""
        return len(self._free)

    @property
    def steady(self) -> int:
        """Requests that take the next step in any case."""
        return len(self._lockstep)

    def busy(self) -> Iterator[Request]:
        """The others that can compute, those that decode first; one may be removed on the way."""
        for request in sorted(self._others, key=lambda s: s.wanted > 1):
            if request.slot >= 0 and request.loading is None:
                yield request

    def add(self, request: Request, pages: list[int]) -> None:
        """Give a request a free slot, and ``pages``."""
        self._pool.pin(pages)
        request.pages, request.room, request.slot = pages, len(pages) * self._size, self._free.pop()
        self._changed[request] = 0
        bisect.insort(self.requests, request, key=self._rank)
        bisect.insort(self._others, request, key=self._rank)

    def remove(self, request: Request) -> list[int]:
        """Take a request off its slot; returns its pages."""
        self.requests.remove(request)
        if request in self._lockstep:
            self._lockstep.discard(request)
        elif request in self._others:
            self._others.remove(request)
        self._free.append(request.slot)
        self._changed.pop(request, None)
        request.slot = -1
        pages, request.pages = request.pages, []
        self._pool.unpin(pages)
        return pages

    def grow(self, request: Request, count: int) -> None:
        """Give a request ``count`` of the free pages."""
        held, new = len(request.pages), self._pool.allocate(count)
        self._pool.pin(new)
        self._changed.setdefault(request, held)
        request.pages += new
        request.room = len(request.pages) * self._size

    def turn_pages(self) -> None:
        """Give a page each to the steady ones whose pages are full; if there are too few, all of them have to ask."""
        due = self._lockstep.due()
        for request in due:
            if request.computed == request.limit:
                self._lockstep.discard(request)
        full = [request for request in due if request in self._lockstep]
        if len(full) > self._pool.free:
            for request in full:
                self._lockstep.discard(request)
                bisect.insort(self._others, request, key=self._rank)
        elif full:
            pages = self._pool.allocate(len(full))
            self._pool.pin(pages)
            for request, page in zip(full, pages, strict=True):
                self._changed.setdefault(request, len(request.pages))
                request.pages.append(page)
                request.room += self._size
                self._lockstep.renew(request)

    def step(self, chosen: dict[Request, int], admitted: list[Request], now: float) -> Plan:
        """The plan of a step of the steady ones and ``chosen``, so many tokens each; from now on these count as
        computed."""
        requests, slots, starts = self._lockstep.advance()
        steady, counts = len(requests), np.ones(len(requests), np.int32)
        samples = steady
        if chosen:
            ending: list[Request] = []
            rest: list[Request] = []
            for request, count in chosen.items():
                (ending if request.computed + count == request.length else rest).append(request)
            rows = ending + rest
            more = np.array([(s.slot, s.computed, chosen[s]) for s in rows], np.int32)
            for request in rows:
                self._compute(request, chosen[request], now)
            for request in ending:
                self._others.remove(request)
                if request.computed < request.limit:
                    self._lockstep.add(request)
            requests += rows
            samples += len(ending)
            slots, starts, counts = (np.concatenate(pair) for pair in zip((slots, starts, counts), more.T, strict=True))
        changes = [(s.slot, first, s.pages[first:]) for s, first in self._changed.items()]
        self._changed.clear()
        tokens = steady + sum(chosen.values())
        context = int(starts.sum()) + tokens
        return Plan(requests, slots, starts, counts, steady, samples, admitted, changes, tokens, context)

    def extend(self, plan: Plan, times: int) -> int:
        """Let a plan stand for up to ``times`` equal steps, as far as it can; returns for how many it stands now.

        It can if every running request decodes, until the first has its last token or there are no free pages.
        """
        requests = plan.requests
        if not plan.samples == plan.tokens == len(self.requests):
            return 1
        times = min(times, 1 + min(s.limit - s.computed for s in requests))
        while times > 1:
            needs = [-(-(s.computed + times - 1) // self._size) - len(s.pages) for s in requests]
            if sum(n for n in needs if n > 0) <= self._pool.free:
                break
            times //= 2
        if times <= 1:
            return 1
        self._lockstep.advance(times - 1)
        for request, need in zip(requests, needs, strict=True):
            if need > 0:
                self.grow(request, need)
                self._lockstep.renew(request)
        return times

    def publish(self, request: Request, start: int) -> None:
        """Let others find the full pages from token ``start`` on that are computed, or will be by a dispatched step."""
        for i in range(start // self._size, min(request.computed // self._size, len(request.keys))):
            self._pool.publish(request.pages[i], request.keys[i])

    def _compute(self, request: Request, count: int, now: float) -> None:
        start = request.computed
        request.computed += count
        if request.first_scheduled is None:
            request.first_scheduled = now
        if request.keys:
            self.publish(request, start)

    def check(self) -> None:
        """Raise AssertionError unless slots and pages agree with the requests (for tests; O(everything))."""
        self._lockstep.check()
        assert self._others == [s for s in self.requests if s.computed < s.limit and s not in self._lockstep]
        assert sorted([s.slot for s in self.requests] + self._free) == list(range(self._slots)), "slots leak"
        assert self._changed.keys() <= set(self.requests)
        for request in self.requests:
            assert request.computed <= request.room == len(request.pages) * self._size, "computed tokens without a page"
            assert request.program.running is request
