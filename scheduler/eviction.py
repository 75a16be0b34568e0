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


class TenantOrder:
    """Programs of one tenant in the order of eviction."""

    def __init__(self) -> None:
        self.all, self.clean = Tiers(), Tiers()
        self.dirty = Tiers()
        """Programs in ``all`` that may have pages which neither the host nor anybody else holds."""
        self.shared: dict[Program, None] = {}
        """Programs left out of ``all``, because others share their last pages: evicting those frees nothing."""
        self.orders = self.all, self.clean, self.dirty

    def oldest(self, *, clean: bool, keep: Program | None) -> Iterator[Program]:
        """All programs but ``keep``, or those with clean pages that nobody has asked to keep, in order.

        Each must have left the order before the next is asked for.
        """
        for programs in self.clean.sets[:LEASED] if clean else self.all.sets:
            if keep is not None and keep in programs:  # it is used next, so it belongs at the end
                programs.move_to_end(keep)
            while programs and (first := next(iter(programs))) is not keep:
                yield first


class EvictionOrder:
    """Programs with device pages that do not run, in the order of eviction of each tenant.

    Every change is O(its host copies). A page at the end of a program is *clean* if the host has a copy of it: it can
    be evicted at once.
    """

    def __init__(self) -> None:
        self.of: dict[int, TenantOrder] = {}
        """By tenant; those who have none here are left out."""
        self._unused: list[TenantOrder] = []
        self.clean: dict[Program, int] = {}
        """Programs with clean pages at the end, and how many; none of them shares its last pages."""
        self.clean_pages = 0
        self.dirty = 0
        """Programs that may have pages which neither the host nor anybody else holds."""

    def __contains__(self, program: Program) -> bool:
        """Whether a program is here and evicting its last pages frees them, as far as is known."""
        tenant = self.of.get(program.tenant)
        return tenant is not None and program in tenant.all

    def add(self, program: Program) -> None:
        """A program's pages may be evicted from now on; it counts as used last."""
        if not program.pages:
            self.discard(program)
            return
        self._take_out(program).all.add(program)
        self.soil(program)
        self.recount(program)

    def discard(self, program: Program) -> None:
        if program.tenant not in self.of:
            return
        tenant = self._take_out(program)
        if not tenant.all and not tenant.shared:
            self._unused.append(self.of.pop(program.tenant))

    def set_aside(self, program: Program) -> None:
        """A program's last pages turn out to be shared."""
        self._take_out(program).shared[program] = None

    def _take_out(self, program: Program) -> TenantOrder:
        tenant = self.of.get(program.tenant)
        if tenant is None:
            tenant = self.of[program.tenant] = self._unused.pop() if self._unused else TenantOrder()
            return tenant
        tenant.shared.pop(program, None)
        if program in tenant.all:
            self.clear(program)
            for order in tenant.orders:
                order.discard(program)
            self.clean_pages -= self.clean.pop(program, 0)
        return tenant

    def soil(self, program: Program) -> None:
        """A program that is here may have dirty pages."""
        dirty = self.of[program.tenant].dirty
        self.dirty += program not in dirty
        dirty.add(program)

    def clear(self, program: Program) -> None:
        """A program that is here has no dirty page."""
        dirty = self.of[program.tenant].dirty
        self.dirty -= program in dirty
        dirty.discard(program)

    def put_first(self, program: Program) -> None:
        """Move a program to the front of its tier."""
        for order in self._holding(program):
            order.put_first(program)

    def move(self, program: Program, tier: int) -> None:
        """Move a program to the end of another tier."""
        if program.tier == tier:
            return
        holding = self._holding(program)
        for order in holding:
            order.discard(program)
        program.tier = tier
        for order in holding:
            order.add(program)

    def _holding(self, program: Program) -> list[Tiers]:
        tenant = self.of.get(program.tenant)
        return [] if tenant is None else [order for order in tenant.orders if program in order]

    def recount(self, program: Program) -> None:
        """A program's pages or copies have changed."""
        if program not in self:
            return
        clean, order = _clean_pages(program), self.of[program.tenant].clean
        self.clean_pages += clean - self.clean.pop(program, 0)
        if clean:
            self.clean[program] = clean
            order.add(program)
        else:
            order.discard(program)

    def check(self, programs: list[Program]) -> None:
        """Raise AssertionError unless every page that may be evicted can be found (for tests; O(everything))."""
        for program in programs:
            listed = program in self or program in self.of.get(program.tenant, TenantOrder()).shared
            assert listed == bool(program.pages), "pages that nobody could evict"
            if program in self:
                assert self.clean.get(program, 0) == _clean_pages(program), "pages are taken for clean that are not"
        assert self.clean_pages == sum(self.clean.values())
        assert self.clean.keys() == {program for of in self.of.values() for program in of.clean}
        assert self.dirty == sum(len(of.dirty) for of in self.of.values())
        for tenant, of in self.of.items():
            assert of.all or of.shared, "a tenant is remembered that has nothing here"
            assert set(of.clean) <= set(of.all) >= set(of.dirty)
            assert all(program.tenant == tenant for program in (*of.all, *of.shared))
            for order in of.orders:
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
