"""The KV that programs keep while they do not run: what can be done with its pages, in either tier."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable

from .copies import HostCopies, parts_of
from .eviction import EvictionOrder
from .pages import PagePool
from .program import Program, Request
from .transfer import HostCopy
from .wait import DISCARDED, EVICTED
from .windows import resumable

log = logging.getLogger(__name__)


class RetainedKV:
    """Pages that programs keep while they do not run. Every page that is kept is on the device, on the host, or both.

    Args:
        pool: device pages.
        page_size: tokens per page.
        copies: the host tier.
        lost: called with every program that loses KV.
    """

    def __init__(self, pool: PagePool, page_size: int, copies: HostCopies, lost: Callable[[Program], None]):
        self.order = EvictionOrder()
        self.dropped = 0
        """Pages of KV dropped under pressure so far."""
        self.decisions: Counter[str] = Counter()
        """Counts of pages kept, copied or dropped, each with its reason."""
        self._pool, self._size, self._copies, self._lost = pool, page_size, copies, lost
        self._windows = pool.windows

    @property
    def at_once(self) -> int:
        """Pages that can be had without waiting for anything or dropping anything."""
        return self._pool.free + self.order.clean_pages

    def share(self, program: Program, request: Request, other: Program) -> None:
        """Let a new program hold what another has computed of a request, its last one or the one that runs.

        These are its device pages and host copies, from the first token on and as far as nothing is missing. Of a
        request that runs only full pages are shared, because it writes on the last one; of one that does not run the
        last page, too, which whoever goes on first leaves to the other.
        """
        pages, tokens = program.pages, program.kept
        if program.running is not None:
            pages, tokens = request.pages, request.num_computed
            whole = tokens // self._size
            if request.loading is not None:  # from here on nothing has arrived
                whole = min(whole, pages.index(request.loading.pages[0]))
            pages = pages[:whole]
        self._pool.share(pages, other.tenant)
        other.last, other.pages = request, list(pages)
        self._keep(other, min(tokens, self._copies.share(program, other, len(pages)) * self._size))
        other.computed = other.kept
        self.order.add(other)

    def resumable(self, program: Program, tokens: int) -> int:
        """The most of a program's first ``tokens`` tokens after which it can go on with what is kept of it."""
        pages, copies, windows = program.pages, program.copies, self._windows
        return resumable(
            windows,
            tokens,
            self._size,
            lambda i: i < len(pages) and windows.of[pages[i]],
            lambda i: any(max(copy.first, copy.window_first) <= i < copy.end for copy in copies),
        )

    def usable(self, program: Program, tokens: int) -> int:
        """How many of a program's device pages it can go on with after ``tokens`` tokens; the host has all others."""
        end = min(len(program.pages), self._pages(tokens))
        first, windows = self._windows.first(tokens), self._windows.of
        return next((i for i in range(first, end) if not windows[program.pages[i]]), end)

    def trim(self, program: Program, tokens: int) -> None:
        """Drop the KV of all but a program's first ``tokens`` tokens, or fewer, if it could not go on after these."""
        if tokens < program.kept:
            self._keep(program, tokens)

    def _keep(self, program: Program, tokens: int) -> None:
        """Keep as many of the first ``tokens`` tokens of a program as it can go on after.

        If only the host has a window page that is needed now, device pages go from there on.
        """
        program.kept = self.resumable(program, tokens)
        held = self.usable(program, program.kept)
        self._copies.cut(program, self._pages(program.kept))
        self._copies.cut_windowless(program, self._windows.first(program.kept), held)
        self.release(program, held)
        self.order.recount(program)

    def cut_to(self, program: Program, keep: int, why: str) -> None:
        """Drop what a program has after its first ``keep`` pages; ``why`` is told when it goes on."""
        tokens = self.resumable(program, min(program.kept, keep * self._size))
        if tokens < program.kept:
            program.lost = why
            self.trim(program, tokens)
            self._lost(program)

    def drop(self, program: Program, count: int, why: str) -> None:
        """Drop the KV of a program's last ``count`` device pages, and what the host holds after them."""
        kept = self._pages(program.kept)
        self.note(program, "drop", why, count)
        self.cut_to(program, len(program.pages) - count, EVICTED)
        self.dropped += kept - self._pages(program.kept)

    def drop_all(self, program: Program) -> None:
        """Drop all the KV of a program that is about to wait."""
        self.dropped += self._pages(program.kept)
        program.lost = DISCARDED
        self.trim(program, 0)

    def release(self, program: Program, keep: int) -> None:
        """Free all but the first ``keep`` device pages of a program.

        The others have copies on the host, or are no longer kept.
        """
        gone = program.pages[keep:]
        self._windows.hold(program, program.pages, self._windows.first(program.kept), min(keep, len(program.pages)))
        if not gone:
            return
        self._pool.release(gone, program.tenant)
        del program.pages[keep:]
        if program.pages:
            self.order.recount(program)
        else:
            self.order.discard(program)

    # -- the host's copies -------------------------------------------------------------------------------------

    def offload(self, program: Program, first: int, count: int, why: str, now: float) -> None:
        """Begin to copy pages ``first … first + count - 1`` of a program to the host."""
        self.note(program, "copy", why, count)
        end = first + count
        pages = program.pages[max(first, self._windows.first(program.kept)) : end]
        self._copies.offload(program, first, [self._windows.of[page] for page in pages], count, now)
        self.order.recount(program)

    def cut_copies(self, program: Program, keep: int) -> None:
        """Drop the copies of all but the first ``keep`` pages."""
        if program.copies:
            self._copies.cut(program, keep)
            self.order.recount(program)

    def lose_copy(self, program: Program, copy: HostCopy, why: str) -> None:
        """Drop a copy, and the KV that only it held."""
        self._copies.remove(program, copy)
        self.order.recount(program)
        if program.running is None and copy.end > len(program.pages):
            self.cut_to(program, max(copy.first, len(program.pages)), why)
        elif program in self.order:
            self.order.soil(program)

    def make_room(self, count: int, program: Program, now: float, keep: Program | None) -> None:
        """Drop copies until the host has room for ``count`` pages.

        Only those go, none of ``keep``, that are worth less than those of ``program`` would be.
        """
        while self._copies.fitting(len(program.window)) < count:
            victim = self._copies.least_worth(program, count, now, keep)
            if victim is None:
                return
            copy, kept = victim.copies[-1], self._pages(victim.kept)
            self.note(victim, "drop copy", "the host is full", copy.used)
            self.lose_copy(victim, copy, EVICTED)
            self.dropped += kept - self._pages(victim.kept)

    # -- accounting --------------------------------------------------------------------------------------------

    def note(self, program: Program, action: str, why: str, pages: int) -> None:
        """Count a decision."""
        self.decisions[f"{action}: {why}"] += 1
        if log.isEnabledFor(logging.DEBUG):
            log.debug("%s %d pages of program %d: %s", action, pages, program.number, why)

    def _pages(self, tokens: int) -> int:
        return -(-tokens // self._size)

    def check(self, programs: list[Program]) -> None:
        """Raise AssertionError unless what programs keep is where they say (for tests; O(everything))."""
        self.order.check(programs)
        for program in programs:
            if program.running is not None:
                assert not program.pages
                continue
            held, kept = len(program.pages), self._pages(program.kept)
            inside = sum(part.pages for part in parts_of(program, held, kept))
            assert held + inside == kept, f"of {kept} pages kept, {held} are on the device and {inside} on the host"
            first = self._windows.first(program.kept)
            assert list(program.window) == list(range(first, held)), "a program does not hold its window"
            assert self.resumable(program, program.kept) == program.kept, "a program cannot go on from what is kept"
