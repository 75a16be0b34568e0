"""Requests that have a slot and pages: the rows of a step, and the updates of the page table that they read."""

from __future__ import annotations

import bisect
from collections.abc import Callable, Iterator

import numpy as np

from .config import SchedulerConfig
from .decode_batch import DecodeBatch
from .pages import PagePool
from .plan import Plan
from .program import Request


class Running:
    """Owns the slots, and the pages of every request that has one.

    A request is in the decode batch while it computes one token at every step. It is among the *others* while it
    prefills, is being restored, or lacks a page. It is in neither while its last token is under way.

    Args:
        config: sizes.
        pool: device pages.
        rank: the policy's order among running requests; that of a request stays the same while it runs.
    """

    def __init__(self, config: SchedulerConfig, pool: PagePool, rank: Callable[[Request], tuple[float, ...]]):
        self.requests: list[Request] = []
        """All of them by rank; the last is preempted first."""
        self._free = list(range(config.max_running - 1, -1, -1))
        self._changed: dict[Request, int] = {}  # index of the first page that the device does not know yet
        self._decodes = DecodeBatch(config.max_seqs)
        self._others: list[Request] = []  # by rank
        self._ranks: dict[Request, tuple[float, ...]] = {}
        self._pool, self._size, self._slots, self._rank = pool, config.page_size, config.max_running, rank
        self._windows, self._width = pool.windows, config.pages_per_seq

    def __len__(self) -> int:
        return len(self.requests)

    @property
    def slots(self) -> int:
        """Number of free slots."""
        return len(self._free)

    @property
    def num_decodes(self) -> int:
        """Size of the decode batch: its requests take the next step in any case."""
        return len(self._decodes)

    def others(self) -> Iterator[Request]:
        """Requests outside the decode batch that can compute, those with one token to compute first.

        Some may be removed while the caller goes through them.
        """
        for request in sorted(self._others, key=lambda r: r.num_to_compute > 1):
            if request.slot >= 0 and request.loading is None:
                yield request

    def add(self, request: Request, pages: list[int]) -> None:
        """Give a request a free slot, and ``pages``."""
        self._pool.pin(pages)
        request.pages, request.capacity, request.slot = pages, len(pages) * self._size, self._free.pop()
        self._changed[request] = 0
        self._windows.announce(request.program)
        self._ranks[request] = self._rank(request)
        bisect.insort(self.requests, request, key=self._ranks.__getitem__)
        bisect.insort(self._others, request, key=self._ranks.__getitem__)

    def remove(self, request: Request) -> list[int]:
        """Take a request off its slot; returns its pages."""
        at = bisect.bisect_left(self.requests, self._ranks[request], key=self._ranks.__getitem__)
        del self.requests[self.requests.index(request, at)]
        if request in self._decodes:
            self._decodes.discard(request)
        elif request in self._others:
            self._others.remove(request)
        self._free.append(request.slot)
        self._changed.pop(request, None)
        del self._ranks[request]
        request.slot = -1
        pages, request.pages = request.pages, []
        self._pool.unpin(pages)
        return pages

    def grow(self, request: Request, count: int) -> None:
        """Give a request ``count`` of the free pages."""
        held, new = len(request.pages), self._pool.allocate(count, request.program.tenant)
        self._pool.pin(new)
        self._changed.setdefault(request, held)
        request.pages += new
        request.capacity = len(request.pages) * self._size

    def grow_decodes(self) -> None:
        """Allocate a page for every request of the decode batch whose pages are full.

        If too few pages are free, move those requests to the others, where each has to ask for one.
        """
        full, windows = self._decodes.full(), self._windows
        if len(full) > self._pool.at_hand() or not windows.has(len(full)):
            for request in full:
                self._decodes.discard(request)
                bisect.insort(self._others, request, key=self._ranks.__getitem__)
        elif full:
            pages, changed, schedule = self._allocate(full), self._changed, self._decodes.schedule
            self._pool.pin(pages)
            for request, page in zip(full, pages, strict=True):
                changed.setdefault(request, len(request.pages))
                request.pages.append(page)
                request.capacity += self._size
                schedule(request)
                if windows.size:
                    self._slide(request, len(request.pages))

    def _allocate(self, requests: list[Request]) -> list[int]:
        """Allocate a page for each of some requests."""
        pages = self._pool.allocate(len(requests), requests[0].program.tenant)
        if self._pool.shares.several:
            self._pool.hand(pages, [request.program.tenant for request in requests])
        return pages

    def step(self, chosen: dict[Request, int], admitted: list[Request], now: float) -> Plan:
        """Plan a step of the decode batch, and of ``chosen``: how many tokens of which other requests.

        All these tokens count as computed from now on.
        """
        changes = self._take_changes()  # before anybody's window moves on
        num_decodes = samples = len(self._decodes)
        context = self._decodes.context + sum(request.num_computed for request in chosen)
        requests, outputs, slots, starts = self._decodes.advance(room=len(chosen))
        counts, last = np.ones(len(slots), np.int32), self._decodes.last()
        if chosen:
            ending: list[Request] = []  # requests whose last known token is computed, so that they sample
            rest: list[Request] = []
            for request, count in chosen.items():
                (ending if request.num_computed + count == request.num_with_pending else rest).append(request)
            rows = ending + rest
            slots[num_decodes:] = [request.slot for request in rows]
            starts[num_decodes:] = [request.num_computed for request in rows]
            counts[num_decodes:] = [chosen[request] for request in rows]
            for request in rows:
                self._compute(request, chosen[request], now)
                if request.num_computed == request.max_computed and request.prepares:
                    self._others.remove(request)
            for request in ending:
                self._others.remove(request)
                if request.num_computed < request.max_computed:
                    self._decodes.add(request)
            last += [num_decodes + i for i, r in enumerate(ending) if r.num_computed == r.max_computed]
            requests += rows
            outputs += [request.output for request in ending]
            samples += len(ending)
        tokens = num_decodes + sum(chosen.values())
        columns = (requests, slots, starts, counts)
        return Plan(*columns, num_decodes, samples, admitted, changes, tokens, context + tokens, outputs, last, [])

    def extend(self, plan: Plan, times: int) -> int:
        """Repeat a plan for up to ``times`` equal steps; returns how many steps it stands for now.

        It can stand for several if every running request decodes, until the first has its last token or no pages are
        free.
        """
        requests = plan.requests
        if not plan.samples == plan.tokens == len(self.requests):
            return 1
        times = min(times, 1 + min(r.max_computed - r.num_computed for r in requests))
        while times > 1:
            needs = [-(-(r.num_computed + times - 1) // self._size) - len(r.pages) for r in requests]
            if (new := sum(n for n in needs if n > 0)) <= self._pool.at_hand() and self._windows.has(new):
                break
            times //= 2
        if times <= 1:
            return 1
        self._decodes.advance(times - 1)
        for request, need in zip(requests, needs, strict=True):
            if need > 0:
                self.grow(request, need)
                self._decodes.schedule(request)
                self._slide(request, len(request.pages))
        plan.last.extend(self._decodes.last())
        return times

    def cache_pages(self, request: Request, start: int) -> None:
        """Add to the prefix cache the full pages from token ``start`` on that are computed by all dispatched steps."""
        full = min(request.num_computed // self._size, len(request.block_hashes))
        cache, pages, hashes = self._pool.cache, request.pages, request.block_hashes
        new = [i for i in range(start // self._size, full) if cache(pages[i], hashes[i])]
        if self._pool.log is not None:
            self._pool.log.cached(request, new)

    def _take_changes(self) -> list[tuple[int, int, list[int]]]:
        """Updates of the page table since the last call; window pages have columns after those of pages."""
        changes = [(r.slot, first, r.pages[first:]) for r, first in self._changed.items()]
        self._changed.clear()
        for program, first in self._windows.take_changed():
            if (request := program.running) is not None and request.slot >= 0:
                pages = request.pages[first : program.window.stop]
                changes.append((request.slot, self._width + first, [self._windows.of[page] for page in pages]))
        return changes

    def _slide(self, request: Request, end: int) -> None:
        """Let a request hold those window pages of its first ``end`` pages that its next token looks at."""
        windows = self._windows
        windows.hold(request.program, request.pages, windows.first(request.num_computed), end)

    def _compute(self, request: Request, count: int, now: float) -> None:
        start = request.num_computed
        request.num_computed += count
        if self._windows.size:
            self._slide(request, -(-request.num_computed // self._size))
        if request.first_scheduled is None:
            request.first_scheduled = now
        if request.block_hashes:
            self.cache_pages(request, start)

    def check(self) -> None:
        """Raise AssertionError unless slots and pages agree with the requests (for tests; O(everything))."""
        self._decodes.check()
        assert self._others == [r for r in self.requests if r.num_computed < r.max_computed and r not in self._decodes]
        assert sorted([r.slot for r in self.requests] + self._free) == list(range(self._slots)), "slots leak"
        assert self._changed.keys() <= set(self.requests)
        for request in self.requests:
            assert request.num_computed <= request.capacity == len(request.pages) * self._size, "a token has no page"
            assert request.program.running is request
