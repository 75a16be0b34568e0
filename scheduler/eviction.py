"""The order in which programs that do not run lose their device pages."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator

from .program import Program


class EvictionOrder:
    """Programs with device pages that do not run, least recently used first; every change is O(its host copies).

    A page at the end of a program is *clean* if the host has a copy of it: it can be evicted at once.
    """

    def __init__(self) -> None:
        self.all: OrderedDict[Program, None] = OrderedDict()
        self.dirty: OrderedDict[Program, None] = OrderedDict()
        """Programs in ``all`` that may have pages which neither the host nor anybody else holds."""
        self.clean: OrderedDict[Program, int] = OrderedDict()
        """Programs in ``all`` with clean pages at the end, and how many."""
        self.shared: dict[Program, None] = {}
        """Programs left out of ``all``, because others share their last pages: evicting those frees nothing."""
        self.clean_pages = 0

    def add(self, program: Program) -> None:
        """A program's pages may be evicted from now on; it counts as used last."""
        self.discard(program)
        if program.pages:
            self.all[program] = self.dirty[program] = None
            self.recount(program)

    def discard(self, program: Program) -> None:
        for order in (self.all, self.dirty, self.shared):
            order.pop(program, None)
        self.clean_pages -= self.clean.pop(program, 0)

    def set_aside(self, program: Program) -> None:
        """A program's last pages turn out to be shared."""
        self.discard(program)
        self.shared[program] = None

    def put_first(self, program: Program) -> None:
        """Move a program to the front of the order."""
        for order in (self.all, self.dirty, self.clean):
            if program in order:
                order.move_to_end(program, last=False)

    def recount(self, program: Program) -> None:
        """A program's pages or copies have changed."""
        if program not in self.all:
            return
        held = at = len(program.pages)
        for copy in reversed(program.copies):
            if copy.end < at:
                break
            at = min(at, copy.first)
        self.clean_pages += held - at - self.clean.get(program, 0)
        if held > at:
            self.clean[program] = held - at
        else:
            self.clean.pop(program, None)

    def oldest(self, *, clean: bool, keep: Program | None) -> Iterator[Program]:
        """All programs but ``keep``, or those with clean pages, in order.

        Each must have left the order before the next is asked for.
        """
        order: OrderedDict[Program, None] | OrderedDict[Program, int] = self.clean if clean else self.all
        if keep is not None and keep in order:  # it is used next, so it belongs at the end
            order.move_to_end(keep)
        while order and (first := next(iter(order))) is not keep:
            yield first

    def check(self, programs: list[Program]) -> None:
        """Raise AssertionError unless every page that may be evicted can be found (for tests; O(everything))."""
        for program in programs:
            listed = program in self.all or program in self.shared
            assert listed == bool(program.pages), "pages that nobody could evict"
        assert self.clean_pages == sum(self.clean.values())
        assert self.clean.keys() <= self.all.keys() >= self.dirty.keys()
