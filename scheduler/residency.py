"""Where the KV of programs lies that are not running: on the device, in host memory, both, or nowhere any more.

A program keeps its KV on the device when its request ends, and when it is preempted. It can always be taken: pages
are taken from the end of a program's tokens, so that what is left is a prefix. With a host tier, pages are copied
there, ahead of need or when they are needed: gathered into a staging buffer, after which the device pages are free at
once, and copied while steps go on. Without one, or if it is full of what is worth more, they are lost and computed
again. A *clean* page has a host copy, so it can be had at once. Pages that several programs share stay until nothing
else is left, because taking them from one program frees nothing.

What is copied, kept or lost is the choice of a :class:`~.strategies.Strategy`; the mechanism is here.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable

from .copies import HostCopies, copyable, parts_of
from .pages import PagePool
from .program import Program, Request
from .retained import Retained
from .strategies import DISCARD, KEEP, LAST, Strategy
from .transfer import HostCopy, HostTier, Part, Transfer

log = logging.getLogger(__name__)

CHUNK = 32
"""Pages copied together at least, if a program has so many and staging has room."""


class Residency:
    """Owns every page that no running request owns.

    Args:
        pool: device pages.
        page_size: tokens per page.
        host: sizes of the host tier.
        strategy: what to keep, copy and lose.
        lost: told of every program that loses KV.
    """

    def __init__(
        self, pool: PagePool, page_size: int, host: HostTier, strategy: Strategy, lost: Callable[[Program], None]
    ):
        self.pool = pool
        self.reclaimed = 0
        """Pages lost under pressure, in all."""
        self.moved = [0, 0]
        """Pages copied to the host and back, in all."""
        self.failed = 0
        """Transfers that went wrong."""
        self.decisions: Counter[str] = Counter()
        """How often pages were kept, copied or dropped, each with its reason."""
        self.transfers: list[Transfer] = []
        """Begun since they were last taken."""
        self._under_way: dict[Transfer, None] = {}
        self.copies = HostCopies(host, self._idle_s)
        self._size = page_size
        self._strategy = strategy
        self._lost = lost
        self._retained = Retained()
        self._spilling = False

    # -- programs ----------------------------------------------------------------------------------------------

    def retain(self, program: Program, request: Request, pages: list[int], tokens: int) -> None:
        """Take over the KV of the first ``tokens`` tokens of a request that stops running, on ``pages``."""
        program.last, program.kept, program.pages = request, tokens, pages
        program.running = None
        self._strategy.stopped(request)
        self.copies.use(program)
        self._retained.add(program)

    def waits(self, program: Program, now: float) -> None:
        """A program begins to wait for a tool, or has named the tool."""
        slack = self._at_once / self.pool.size
        action, why = self._strategy.waits(program, slack, now)
        if program.tool is None or action != KEEP:
            self._note(program, action, why, len(program.pages))
        if action == DISCARD and program.kept:
            self.reclaimed += -(-program.kept // self._size)
            self.trim(program, 0)
        elif action == LAST:
            self._retained.give_first(program)

    def trim(self, program: Program, tokens: int) -> None:
        """Drop the KV of all but the first ``tokens`` tokens."""
        if tokens >= program.kept:
            return
        program.kept = tokens
        keep = -(-tokens // self._size)
        self._cut_copies(program, keep)
        self._release(program, keep)

    def take(self, request: Request, found: list[int], now: float) -> tuple[list[int], list[Part]]:
        """Hand a request that is admitted the device pages it can reuse, and the host pages that belong after them.

        Shared pages among them are full and all their tokens are known, so nothing is ever written on a page that
        somebody else reads: no copy-on-write is needed.

        Args:
            request: it.
            found: shared pages (:class:`~.admission.Admission`), one reference to each taken already.
            now: seconds.
        """
        program = request.program
        self.trim(program, request.reusable)
        pages, program.pages, program.running = program.pages + found, [], request
        self._retained.discard(program)
        kept = -(-program.kept // self._size)
        parts = parts_of(program, len(pages), kept)
        tokens = max(program.kept, len(pages) * self._size if found else 0)
        inside = tokens // self._size
        if not parts and inside < len(pages):  # its next token is written on a page that has some already
            if self.pool.shared(pages[inside]):
                self.pool.release([pages.pop()])
                tokens = inside * self._size
            else:
                self.pool.withdraw(pages[inside])
        request.computed = request.reused = tokens
        if not parts:
            self._cut_copies(program, inside)
        self._strategy.started(request, now)
        return pages, parts

    def forgotten(self, program: Program) -> None:
        """A program has ended; full pages of it can still be found as long as nobody needs the memory."""
        self.trim(program, 0)
        self._strategy.forgotten(program)

    def spoil(self, program: Program) -> None:
        """What a program has computed cannot be trusted: drop it, and let nobody find it."""
        for page in program.pages:
            self.pool.withdraw(page)
        self.trim(program, 0)

    def restore(self, request: Request, pages: list[int], parts: list[Part], now: float) -> Transfer:
        """Bring host pages of a request that has been admitted back to ``pages``."""
        return self._begin(Transfer(request.program, tuple(pages), tuple(parts), False, now, request))

    def lose_device(self, programs: Iterable[Program]) -> None:
        """Every device page is lost, while no request runs: of each program only what the host holds from its first
        token on is kept."""
        for transfer in list(self._under_way):
            self.cancel(transfer)
        for program in programs:
            keep = 0
            for copy in program.copies:
                if copy.first > keep:
                    break
                keep = copy.end
            self._release(program, 0)
            self._cut_to(program, keep)

    # -- transfers ---------------------------------------------------------------------------------------------

    def _begin(self, transfer: Transfer) -> Transfer:
        self.transfers.append(transfer)
        self._under_way[transfer] = None
        return transfer

    def cancel(self, transfer: Transfer) -> None:
        """Give up a transfer under way, and what it was to copy to the host; its end will have no effect."""
        del self._under_way[transfer]
        transfer.cancelled = True
        if transfer.to_host:
            copy = self.copies.arrived(transfer)
            if not copy.dropped:
                self.copies.remove(transfer.program, copy)

    def ended(self, transfer: Transfer, now: float) -> None:
        """A transfer has ended well; one that was cancelled on its way has no effect."""
        if transfer.cancelled:
            return
        del self._under_way[transfer]
        request, count = transfer.request, len(transfer.pages)
        self._strategy.predict.transfers.observe(count, now - transfer.began)
        self.moved[not transfer.to_host] += count
        if request is None:
            self.copies.arrived(transfer)
        else:
            request.loading = None
            self._cut_copies(transfer.program, request.reused // self._size)

    def broken(self, transfer: Transfer) -> None:
        """A transfer has failed: what it was to bring is lost, and will be computed again."""
        if transfer.cancelled:
            return
        del self._under_way[transfer]
        program, request = transfer.program, transfer.request
        self.failed += 1
        if request is None:
            copy = self.copies.arrived(transfer)
            if not copy.dropped:
                self._lose(program, copy)
        else:
            start = transfer.parts[0].copy.first + transfer.parts[0].offset
            request.loading = None
            request.computed = request.reused = start * self._size
            self._cut_copies(program, start)

    @property
    def _at_once(self) -> int:
        """Pages that can be had without waiting for anything or losing anything."""
        return self.pool.free + self._retained.clean_pages

    # -- pressure ----------------------------------------------------------------------------------------------

    def reclaim(self, need: int, now: float, *, wait: bool, spare: Program | None = None) -> bool:
        """Make ``need`` pages free if programs that do not run hold enough; whether they are free now.

        Args:
            need: pages.
            now: seconds.
            wait: rather have fewer pages now than lose KV for which the host only lacks staging.
            spare: not to be taken from.
        """
        if self.pool.free >= need:
            return True
        order = self._strategy.order(self._retained.all, now)
        if order is None:
            self._take_clean(need, spare)
        for program in self._retained.oldest(clean=False, spare=spare) if order is None else list(order):
            if self.pool.free >= need:
                return True
            if program is not spare and not self._evict(program, need, now, wait):
                return False
        if self.pool.free < min(need, self.pool.obtainable):
            self._take_shared(need, spare)
        return self.pool.free >= need

    def spill(self, now: float) -> None:
        """Copy the most idle programs' KV to the host ahead of need, if little of the pool is free or clean."""
        dirty = self._retained.dirty
        if not dirty or self.copies.host.pages == 0:
            return
        low, high = (int(share * self.pool.size) for share in self._strategy.ahead)
        self._spilling = self._at_once < (high if self._spilling else low)
        while self._spilling and dirty and (wanted := high - self._at_once) > 0:
            program = next(iter(dirty))
            first, end = copyable(program, self.pool)
            if end > first and self._strategy.moves(program):
                count = min(max(wanted, CHUNK), end - first, self.copies.room)
                if count <= 0:
                    return
                self._copy(program, end - count, count, "ahead of need", now)
            else:
                del dirty[program]
            if self._strategy.releases:
                self._release(program, len(program.pages) - self._retained.clean.get(program, 0))

    def _take_clean(self, need: int, spare: Program | None) -> None:
        """Free pages that have a host copy."""
        for program in self._retained.oldest(clean=True, spare=spare):
            count = min(need - self.pool.free, self._retained.clean[program])
            if count <= 0:
                return
            self._note(program, "free", "it has a host copy", count)
            self._release(program, len(program.pages) - count)

    def _evict(self, program: Program, need: int, now: float, wait: bool) -> bool:
        """Take pages of a program until ``need`` are free; False: the host only lacks staging, so wait for it."""
        while self.pool.free < need and program.pages:
            want, held = need - self.pool.free, len(program.pages)
            if clean := self._retained.clean.get(program, 0):
                self._release(program, held - min(want, clean))
                continue
            first, end = copyable(program, self.pool)
            if end < held or first == end:
                self._retained.bind(program)
                return True
            want = min(want, end - first)
            if self.copies.host.pages and self._strategy.moves(program):
                self._make_room(want, program, now)
                count = min(max(want, CHUNK), end - first, self.copies.room)
                if count > 0:
                    self._copy(program, end - count, count, "its pages are needed", now)
                    continue
                if wait and want <= self.copies.free:
                    return False
                self._drop(program, want, "the host has no room")
            else:
                self._drop(
                    program, want, "it is cheap to compute" if self.copies.host.pages else "there is no host tier"
                )
        return True

    def _take_shared(self, need: int, spare: Program | None) -> None:
        """Last resort: take pages from programs that share them among each other."""
        for program in [p for p in self._retained.bound if p is not spare]:
            if self.pool.unpinned(program.pages):
                self._drop(program, len(program.pages), "nothing else is left")
            if self.pool.free >= need:
                return

    # -- copies ------------------------------------------------------------------------------------------------

    def _copy(self, program: Program, first: int, count: int, why: str, now: float) -> None:
        """Copy pages ``first … first + count - 1`` of a program to the host."""
        self._note(program, "copy", why, count)
        pages, part = tuple(program.pages[first : first + count]), self.copies.add(program, first, count)
        self._begin(Transfer(program, pages, (part,), True, now))
        self._retained.recount(program)

    def _cut_copies(self, program: Program, keep: int) -> None:
        """Drop the copies of all but the first ``keep`` pages."""
        self.copies.cut(program, keep)
        self._retained.recount(program)

    def _lose(self, program: Program, copy: HostCopy) -> None:
        """A copy is gone; what only it held is lost."""
        self.copies.remove(program, copy)
        if program.running is None and copy.end > len(program.pages):
            self._cut_to(program, max(copy.first, len(program.pages)))
        elif program in self._retained.all:
            self._retained.dirty[program] = None
            self._retained.recount(program)

    def _cut_to(self, program: Program, keep: int) -> None:
        """Nothing is left of a program after its first ``keep`` pages."""
        if program.kept > keep * self._size:
            self.trim(program, keep * self._size)
            self._lost(program)

    def _make_room(self, count: int, program: Program, now: float) -> None:
        """Drop copies that are worth less than those of ``program`` would be, until ``count`` pages fit."""
        while self.copies.free < count:
            victim = self.copies.least_worth(program, now)
            if victim is None:
                return
            copy = victim.copies[-1]
            lost = 0 if victim.running is not None else max(0, copy.end - max(copy.first, len(victim.pages)))
            self._note(victim, "drop copy", "the host is full", copy.used)
            self.reclaimed += lost
            self._lose(victim, copy)

    def _idle_s(self, program: Program, now: float) -> float:
        return self._strategy.predict.tool_s(program, max(0.0, now - program.wait_began))

    # -- books -------------------------------------------------------------------------------------------------

    def _drop(self, program: Program, count: int, why: str) -> None:
        """Lose the last device pages of a program, and what the host holds after them."""
        keep = len(program.pages) - count
        self._note(program, "drop", why, count)
        self.reclaimed += -(-program.kept // self._size) - keep
        program.kept = min(program.kept, keep * self._size)
        self._cut_copies(program, keep)
        self._release(program, keep)
        self._lost(program)

    def _release(self, program: Program, keep: int) -> None:
        """Give the device pages of a program back but for the first ``keep``."""
        gone = program.pages[keep:]
        if gone:
            self.pool.release(gone)
            del program.pages[keep:]
        if not program.pages:
            self._retained.discard(program)
        self._retained.recount(program)

    def _note(self, program: Program, action: str, why: str, pages: int) -> None:
        self.decisions[f"{action}: {why}"] += 1
        if log.isEnabledFor(logging.DEBUG):
            log.debug("%s %d pages of program %d: %s", action, pages, program.number, why)

    # -- checks ------------------------------------------------------------------------------------------------

    def check(self, programs: list[Program]) -> None:
        """Raise AssertionError unless the books balance (for tests; O(everything))."""
        self.copies.check(programs)
        self._retained.check(programs)
        for program in programs:
            if program.running is not None:
                assert not program.pages
                continue
            held, kept = len(program.pages), -(-program.kept // self._size)
            inside = sum(part.pages for part in parts_of(program, held, kept))
            assert held + inside == kept, f"of {kept} pages kept, {held} are on the device and {inside} on the host"
