"""The order in which programs that do not run lose their device pages."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from itertools import chain

from .program import Program

FIRST, USUAL, LEASED = range(3)
"""Tiers: programs that wait for a human are evicted first, those whose clients have asked to keep their KV last."""


class Tiers:
    """A set of programs by tier, and in each the least recently used first; every change is O(1)."""

    def __init__(self) -> None:
        self.sets: tuple[OrderedDict[Program, None], ...] = (OrderedDict(), OrderedDict(), OrderedDict())

    def __len__(self) -> int:
        return sum(map(len, self.sets))

    def __contains__(self, program: Program) -> bool:
        return program in self.sets[program.tier]

    def __iter__(self) -> Iterator[Program]:
        return chain.from_iterable(self.sets)

    def add(self, program: Program) -> None:
        """Add a program as the last of its tier; one that is there keeps its place."""
        self.sets[program.tier][program] = None

    def discard(self, program: Program) -> None:
        self.sets[program.tier].pop(program, None)

    def put_first(self, program: Program) -> None:
        """Move a program that is there to the front of its tier."""
        self.sets[program.tier].move_to_end(program, last=False)


class EvictionOrder:
    """Programs with device pages that do not run, in the order of eviction; every change is O(its host copies).

    A page at the end of a program is *clean* if the host has a copy of it: it can be evicted at once.
    """

    def __init__(self) -> None:
        self.all = Tiers()
        self.dirty = Tiers()
        """Programs in ``all`` that may have pages which neither the host nor anybody else holds."""
        self.clean: dict[Program, int] = {}
        """Programs in ``all`` with clean pages at the end, and how many."""
        self.shared: dict[Program, None] = {}
        """Programs left out of ``all``, because others share their last pages: evicting those frees nothing."""
        self.clean_pages = 0
        self._clean = Tiers()

    def add(self, program: Program) -> None:
        """A program's pages may be evicted from now on; it counts as used last."""
        self.discard(program)
        if program.pages:
            self.all.add(program)
            self.dirty.add(program)
            self.recount(program)

    def discard(self, program: Program) -> None:
        self.shared.pop(program, None)
        if program in self.all:
            for order in (self.all, self.dirty, self._clean):
                order.discard(program)
            self.clean_pages -= self.clean.pop(program, 0)

    def set_aside(self, program: Program) -> None:
        """A program's last pages turn out to be shared."""
        self.discard(program)
        self.shared[program] = None

    def put_first(self, program: Program) -> None:
        """Move a program to the front of its tier."""
        for order in (self.all, self.dirty, self._clean):
            if program in order:
                order.put_first(program)

    def move(self, program: Program, tier: int) -> None:
        """Move a program to the end of another tier."""
        if program.tier == tier:
            return
        holding = [order for order in (self.all, self.dirty, self._clean) if program in order]
        for order in holding:
            order.discard(program)
        program.tier = tier
        for order in holding:
            order.add(program)

    def recount(self, program: Program) -> None:
        """A program's pages or copies have changed."""
        if program not in self.all:
            return
        clean = _clean_pages(program)
        self.clean_pages += clean - self.clean.pop(program, 0)
        if clean:
            self.clean[program] = clean
            self._clean.add(program)
        else:
            self._clean.discard(program)

    def oldest(self, *, clean: bool, keep: Program | None) -> Iterator[Program]:
        """All programs but ``keep``, or those with clean pages that nobody has asked to keep, in order.

        Each must have left the order before the next is asked for.
        """
        for programs in self._clean.sets[:LEASED] if clean else self.all.sets:
            if keep is not None and keep in programs:  # it is used next, so it belongs at the end
                programs.move_to_end(keep)
            while programs and (first := next(iter(programs))) is not keep:
                yield first

    def check(self, programs: list[Program]) -> None:
        """Raise AssertionError unless every page that may be evicted can be found (for tests; O(everything))."""
        for program in programs:
            listed = program in self.all or program in self.shared
            assert listed == bool(program.pages), "pages that nobody could evict"
            if program in self.all:
                assert self.clean.get(program, 0) == _clean_pages(program), "pages are taken for clean that are not"
        assert self.clean_pages == sum(self.clean.values())
        assert set(self.clean) == set(self._clean) <= set(self.all) >= set(self.dirty)
        for order in (self.all, self.dirty, self._clean):
            assert all(program in order for program in order), "a program is in a tier that is not its own"


def _clean_pages(program: Program) -> int:
    """Count the pages at the end of a program that the host has copies of, with the window pages that it needs."""
    held = at = len(program.pages)
    for copy in reversed(program.copies):
        if copy.end < at:
            break
        if (lacking := min(copy.end, copy.window_first)) > max(copy.first, program.window.start):
            at = min(at, lacking)
            break
        at = min(at, copy.first)
    return held - at
