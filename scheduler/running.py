"""Segments that have a slot and pages: the rows of a step, and what is new in the page table that they read."""

from __future__ import annotations

import bisect
from collections.abc import Callable, Iterator

import numpy as np

from .config import SchedulerConfig
from .lockstep import Lockstep
from .pages import PagePool
from .plan import Plan
from .program import Segment


class Running:
    """Owns the slots, and the pages of whoever has one.

    Args:
        config: sizes.
        pool: device pages.
        rank: the policy's order among the running; of a segment it stays the same while it runs.
    """

    def __init__(self, config: SchedulerConfig, pool: PagePool, rank: Callable[[Segment], tuple[float, ...]]):
        self.segments: list[Segment] = []
        """By rank; the last is preempted first."""
        self._free = list(range(config.max_seqs - 1, -1, -1))
        self._changed: dict[Segment, int] = {}  # from which of its pages on the device does not know them
        # Those that decode step by step, and those with anything else to do, by rank. Those whose last token is under
        # way have nothing to do.
        self._lockstep = Lockstep(config.max_seqs)
        self._others: list[Segment] = []
        self._pool, self._size, self._slots, self._rank = pool, config.page_size, config.max_seqs, rank

    def __len__(self) -> int:
        return len(self.segments)

    @property
    def slots(self) -> int:
        """That are free."""
        return len(self._free)

    @property
    def steady(self) -> int:
        """Segments that take the next step in any case."""
        return len(self._lockstep)

    def busy(self) -> Iterator[Segment]:
        """The others that can compute, those that decode first; one may be removed on the way."""
        for segment in sorted(self._others, key=lambda s: s.wanted > 1):
            if segment.slot >= 0 and segment.loading is None:
                yield segment

    def add(self, segment: Segment, pages: list[int]) -> None:
        """Give a segment a free slot, and ``pages``."""
        self._pool.pin(pages)
        segment.pages, segment.room, segment.slot = pages, len(pages) * self._size, self._free.pop()
        self._changed[segment] = 0
        bisect.insort(self.segments, segment, key=self._rank)
        bisect.insort(self._others, segment, key=self._rank)

    def remove(self, segment: Segment) -> list[int]:
        """Take a segment off its slot; returns its pages."""
        self.segments.remove(segment)
        if segment in self._lockstep:
            self._lockstep.discard(segment)
        elif segment in self._others:
            self._others.remove(segment)
        self._free.append(segment.slot)
        self._changed.pop(segment, None)
        segment.slot = -1
        pages, segment.pages = segment.pages, []
        self._pool.unpin(pages)
        return pages

    def grow(self, segment: Segment, count: int) -> None:
        """Give a segment ``count`` of the free pages."""
        held, new = len(segment.pages), self._pool.allocate(count)
        self._pool.pin(new)
        self._changed.setdefault(segment, held)
        segment.pages += new
        segment.room = len(segment.pages) * self._size

    def turn_pages(self) -> None:
        """Give a page each to the steady ones whose pages are full; if there are too few, all of them have to ask."""
        due = self._lockstep.due()
        for segment in due:
            if segment.computed == segment.limit:
                self._lockstep.discard(segment)
        full = [segment for segment in due if segment in self._lockstep]
        if len(full) > self._pool.free:
            for segment in full:
                self._lockstep.discard(segment)
                bisect.insort(self._others, segment, key=self._rank)
        elif full:
            pages = self._pool.allocate(len(full))
            self._pool.pin(pages)
            for segment, page in zip(full, pages, strict=True):
                self._changed.setdefault(segment, len(segment.pages))
                segment.pages.append(page)
                segment.room += self._size
                self._lockstep.renew(segment)

    def step(self, chosen: dict[Segment, int], admitted: list[Segment], now: float) -> Plan:
        """The plan of a step of the steady ones and ``chosen``, so many tokens each; from now on these count as
        computed."""
        segments, slots, starts = self._lockstep.advance()
        steady, counts = len(segments), np.ones(len(segments), np.int32)
        samples = steady
        if chosen:
            ending: list[Segment] = []
            rest: list[Segment] = []
            for segment, count in chosen.items():
                (ending if segment.computed + count == segment.length else rest).append(segment)
            rows = ending + rest
            more = np.array([(s.slot, s.computed, chosen[s]) for s in rows], np.int32)
            for segment in rows:
                self._compute(segment, chosen[segment], now)
            for segment in ending:
                self._others.remove(segment)
                if segment.computed < segment.limit:
                    self._lockstep.add(segment)
            segments += rows
            samples += len(ending)
            slots, starts, counts = (np.concatenate(pair) for pair in zip((slots, starts, counts), more.T, strict=True))
        changes = [(s.slot, first, s.pages[first:]) for s, first in self._changed.items()]
        self._changed.clear()
        tokens = steady + sum(chosen.values())
        context = int(starts.sum()) + tokens
        return Plan(segments, slots, starts, counts, steady, samples, admitted, changes, tokens, context)

    def extend(self, plan: Plan, times: int) -> int:
        """Let a plan stand for up to ``times`` equal steps, as far as it can; returns for how many it stands now.

        It can if every running segment decodes, until the first has its last token or there are no free pages.
        """
        segments = plan.segments
        if not plan.samples == plan.tokens == len(self.segments):
            return 1
        times = min(times, 1 + min(s.limit - s.computed for s in segments))
        while times > 1:
            needs = [-(-(s.computed + times - 1) // self._size) - len(s.pages) for s in segments]
            if sum(n for n in needs if n > 0) <= self._pool.free:
                break
            times //= 2
        if times <= 1:
            return 1
        self._lockstep.advance(times - 1)
        for segment, need in zip(segments, needs, strict=True):
            if need > 0:
                self.grow(segment, need)
                self._lockstep.renew(segment)
        return times

    def publish(self, segment: Segment, start: int) -> None:
        """Let others find the full pages from token ``start`` on that are computed, or will be by a dispatched step."""
        for i in range(start // self._size, min(segment.computed // self._size, len(segment.keys))):
            self._pool.publish(segment.pages[i], segment.keys[i])

    def _compute(self, segment: Segment, count: int, now: float) -> None:
        start = segment.computed
        segment.computed += count
        if segment.first_scheduled is None:
            segment.first_scheduled = now
        if segment.keys:
            self.publish(segment, start)

    def check(self) -> None:
        """Raise AssertionError unless slots and pages agree with the segments (for tests; O(everything))."""
        self._lockstep.check()
        assert self._others == [s for s in self.segments if s.computed < s.limit and s not in self._lockstep]
        assert sorted([s.slot for s in self.segments] + self._free) == list(range(self._slots)), "slots leak"
        assert self._changed.keys() <= set(self.segments)
        for segment in self.segments:
            assert segment.computed <= segment.room == len(segment.pages) * self._size, "computed tokens without a page"
            assert segment.program.running
