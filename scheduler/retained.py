"""In which order programs that do not run give their device pages up."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator

from .program import Program


class Retained:
    """Programs with device pages that do not run, least recently used first; every change is O(its host copies).

    A page at the end of a program is *clean* if the host has a copy of it: it can be had at once.
    """

    def __init__(self) -> None:
        self.all: OrderedDict[Program, None] = OrderedDict()
        self.dirty: OrderedDict[Program, None] = OrderedDict()
        """Those that may have pages without a copy which nobody shares."""
        self.clean: OrderedDict[Program, int] = OrderedDict()
        """Those with clean pages at the end, and how many."""
        self.bound: dict[Program, None] = {}
        """Left out of the others: what is at their end is shared, so that taking it frees nothing."""
        self.clean_pages = 0

    def add(self, program: Program) -> None:
        """A program's pages may be taken; now it counts as used last."""
        self.discard(program)
        if program.pages:
            self.all[program] = self.dirty[program] = None
            self.recount(program)

    def discard(self, program: Program) -> None:
        for order in (self.all, self.dirty, self.bound):
            order.pop(program, None)
        self.clean_pages -= self.clean.pop(program, 0)

    def bind(self, program: Program) -> None:
        """What is at the end of a program turns out to be shared."""
        self.discard(program)
        self.bound[program] = None

    def give_first(self, program: Program) -> None:
        """It will not return for long."""
        for order in (self.all, self.dirty, self.clean):
            if program in order:
                order.move_to_end(program, last=False)

    def recount(self, program: Program) -> None:
        """Its pages or copies have changed."""
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

    def oldest(self, *, clean: bool, spare: Program | None) -> Iterator[Program]:
        """Programs, or those with clean pages, as they come, but ``spare``; each leaves the order before the next is
        asked for, or the caller stops."""
        order: OrderedDict[Program, None] | OrderedDict[Program, int] = self.clean if clean else self.all
        if spare is not None and spare in order:  # it is used next, so it belongs at the end
            order.move_to_end(spare)
        while order and (first := next(iter(order))) is not spare:
            yield first

    def check(self, programs: list[Program]) -> None:
        """Raise AssertionError unless every page that may be taken can be found (for tests; O(everything))."""
        for program in programs:
            listed = program in self.all or program in self.bound
            assert listed == bool(program.pages), "pages that nobody could take"
        assert self.clean_pages == sum(self.clean.values())
        assert self.clean.keys() <= self.all.keys() >= self.dirty.keys()
