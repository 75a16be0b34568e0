"""The residency manager: where the KV of programs that do not run lies, on the device, the host, both or nowhere.

A program keeps its KV on the device when its request ends, and when it is preempted, but any of its pages can be
*evicted*, last ones first, so that what is left is a prefix. With a host tier, pages are *offloaded* there, ahead of
need or when they are needed: they are gathered into a staging buffer, after which the device pages are free at once,
and copied while steps go on. Without one, or if it is full of what is worth more, KV is *dropped* and computed again.
What only the host holds is *restored* when the program's next request is admitted. A *clean* page has a host copy, so
it can be evicted at once. Pages that programs share are evicted last, because taking them from one frees nothing.

What is kept, offloaded or dropped is the choice of a :class:`~.strategy.Strategy`; the mechanism is here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from itertools import islice

from .copies import HostCopies, parts_of
from .eviction import FIRST, LEASED, USUAL
from .evictor import Evictor
from .leases import Leases
from .offer import Offer
from .pages import PagePool
from .program import Program, Request
from .retained import RetainedKV
from .strategy import DISCARD, EVICT_FIRST, Strategy
from .transfer import HostPages, HostTier, Transfer
from .wait import FAILED, RECOMPUTED, Resumed
from .windows import resumable


class Residency:
    """Owns every page that no running request owns.

    Args:
        pool: device pages.
        page_size: tokens per page.
        host: sizes of the host tier.
        strategy: what to keep, offload and drop.
        lost: called with every program that loses KV.
    """

    def __init__(
        self, pool: PagePool, page_size: int, host: HostTier, strategy: Strategy, lost: Callable[[Program], None]
    ):
        self.moved = [0, 0]
        """Pages offloaded and restored so far."""
        self.moved_windows = [0, 0]
        """Window pages offloaded and restored so far."""
        self.failed = 0
        """Transfers that failed so far."""
        self._copies = HostCopies(host, self._idle_s, pool.shares, pool.log)
        self.kv = RetainedKV(pool, page_size, self._copies, lost)
        self._order = self.kv.order
        self._leases = Leases(pool.size)
        self._pool, self._windows, self._size, self._strategy = pool, pool.windows, page_size, strategy
        strategy.host_tier = host.pages > 0
        self.evictor = Evictor(pool, self.kv, self._copies, strategy)

    @property
    def programs_on_host(self) -> int:
        """Programs of whose KV the host holds a copy."""
        return self._copies.holders

    @property
    def host_pages(self) -> int:
        """Pages of host memory in use."""
        return self._copies.pages

    # -- programs ----------------------------------------------------------------------------------------------

    def retain(self, program: Program, request: Request, pages: list[int], tokens: int) -> None:
        """Take over the KV of the first ``tokens`` tokens of a request that stops running, on ``pages``."""
        program.last, program.kept, program.pages = request, tokens, pages
        program.running, program.computed, program.lost = None, tokens, ""
        self._strategy.stopped(request)
        self._copies.use(program)
        self._copies.cut_windowless(program, program.window.start, len(pages))
        self._order.add(program)

    def wait_begins(self, program: Program, now: float) -> None:
        """A program begins to wait: decide what becomes of its KV."""
        action, why = self._strategy.waits(program, self.evictor.slack, now)
        self.kv.note(program, action, why, len(program.pages))
        if action == DISCARD and program.kept:
            self.kv.drop_all(program)
        elif action == EVICT_FIRST:
            self._order.put_first(program)

    def wait_told(self, program: Program, keep_s: float | None, now: float) -> bool:
        """A program waits for what has just been said, which may change when it is evicted, but nothing else.

        Returns whether it has a lease for ``keep_s`` seconds.
        """
        leased = bool(keep_s) and self._leases.grant(program, now + (keep_s or 0.0))
        if not leased:
            self._leases.end(program)
        self._place(program)
        action = self._strategy.waits(program, self.evictor.slack, now).action
        if action == EVICT_FIRST and program.tier == USUAL:
            self._order.put_first(program)
        return leased

    def wait_ended(self, program: Program, now: float) -> None:
        """A program has got its next request."""
        self._strategy.returned(program, now)
        self._leases.end(program)
        self._order.move(program, USUAL)

    def end_leases(self, now: float) -> None:
        """Let the KV of programs whose lease is over be evicted like that of others."""
        for program in self._leases.due(now):
            self._place(program)

    def _place(self, program: Program) -> None:
        """Move a program that waits to its tier in the order of eviction."""
        tier = LEASED if program in self._leases else FIRST if program.awaits_human else USUAL
        self._order.move(program, tier)

    def forgotten(self, program: Program) -> None:
        """A program has ended. Its full pages can still be found as long as nobody needs the memory."""
        self.kv.trim(program, 0)
        self._leases.end(program)
        self._strategy.forgotten(program)

    def invalidate(self, program: Program) -> None:
        """Drop what a program has computed, from the prefix cache too, because it cannot be trusted."""
        for page in program.pages:
            self._pool.uncache(page)
        program.lost = FAILED
        self.kv.trim(program, 0)

    def lose_device(self, programs: Iterable[Program]) -> None:
        """Give up every device page, while no request runs.

        Only what the host holds of each program, from its first token on, is kept.
        """
        self._copies.cancel_all()
        for program in programs:
            keep = 0
            for copy in program.copies:
                if copy.first > keep:
                    break
                keep = copy.end
            self.kv.release(program, 0)
            self.kv.cut_to(program, keep, FAILED)

    # -- admission ---------------------------------------------------------------------------------------------

    def offer(self, request: Request) -> Offer | None:
        """Find what a waiting request can start from; the offer holds as long as its program's KV stays as it is.

        None: part of that KV is still on its way, or the last token sampled for the request has not been read yet.

        Of what it reuses, only a last page that is not full is ever written again. If others read that page, too, it
        is left to them, so no copy-on-write is needed.
        """
        if request.num_pending:
            return None
        offer = self._offer(request)
        return None if offer.parts and not all(part.copy.ready for part in offer.parts) else offer

    def held(self, request: Request) -> tuple[int, int]:
        """Count the tokens of a request that could start now whose KV is on the device, and on the host."""
        offer = self._offer(request)
        device = offer.device_tokens(self._size)
        return device, offer.tokens - device

    def _offer(self, request: Request) -> Offer:
        program, tokens, size = request.program, request.reusable, self._size
        if tokens < program.kept:
            tokens = self.kv.resumable(program, tokens)
        kept = -(-tokens // size)
        own = self.kv.usable(program, tokens)
        found: list[int] = []
        if own * size <= tokens:
            found = self._pool.find(islice(request.block_hashes, own, request.most_reusable // size))
            found = self._usable(program.pages[:own], found, tokens)
            tokens = max(tokens, (own + len(found)) * size)
        elif self._pool.shared(program.pages[own - 1]):
            own -= 1
            kept, tokens = own, own * size
        there, first = own + len(found), self._windows.first(tokens)
        parts = parts_of(program, there, kept)
        window = [program.pages[i] if i < own else found[i - own] for i in range(first, there)]
        windows = self._windows.wanted(window, max(0, kept - max(there, first)))
        return Offer(request, own, found, parts, tokens, -(-request.num_tokens // size) - there, windows)

    def _usable(self, own: list[int], found: list[int], tokens: int) -> list[int]:
        """Those of the pages ``found`` after ``own`` ones that a request can start from, which has ``tokens`` itself.

        It goes on after the last of them that it can go on after; or after its own tokens, as before, if that is more,
        and then they stand in for pages that only the host has, as long as these need no window pages.
        """
        windows = self._windows
        if not (found and windows.size):
            return found
        pages = [*own, *found]
        end = resumable(windows, len(pages) * self._size, self._size, lambda i: windows.of[pages[i]])
        if end > tokens:
            return found[: end // self._size - len(own)]
        first = max(windows.first(tokens), len(own))
        lacking = (i for i in range(first, len(pages)) if not windows.of[pages[i]])
        return found[: min(next(lacking, len(pages)), tokens // self._size) - len(own)]

    def take(self, offer: Offer, now: float) -> list[int]:
        """Hand an admitted request its pages, and begin to restore what the host holds of it.

        Enough pages must be free, and one more reference to those found must have been taken.
        """
        request, program, whole = offer.request, offer.request.program, offer.tokens // self._size
        self.kv.trim(program, request.reusable)
        self.kv.release(program, offer.own)
        pages, program.pages, program.running = program.pages + offer.found, [], request
        self._order.discard(program)
        if not offer.parts:
            if whole < len(pages):  # its next token is written there
                self._pool.uncache(pages[whole])
            self.kv.cut_copies(
                program, min(whole, request.reusable // self._size)
            )  # one of a part of a page is outdated
        request.num_computed = request.reused = offer.tokens
        if request.preemptions == 0 and not request.prepares:
            request.resumed = offer.resumed(self._size)
            if program.computed:
                why = f", {request.resumed.why}" if request.resumed.why else ""
                self.kv.note(program, "resume", request.resumed.source + why, len(pages))
        self._strategy.started(request, now)
        here, pages = len(pages), pages + self._pool.allocate(offer.need, program.tenant)
        first, end = self._windows.first(offer.tokens), -(-offer.tokens // self._size)
        self._windows.hold(program, pages, first, end)
        if offer.parts:
            windows = [self._windows.of[page] for page in pages[max(first, here) : end]]
            self._copies.restore(request, pages[here:end], offer.parts, windows, first, now)
        return pages

    # -- transfers ---------------------------------------------------------------------------------------------

    def take_transfers(self) -> tuple[list[Transfer], list[HostPages]]:
        """Transfers begun, and host memory given up, since the last call."""
        return self._copies.take_transfers()

    def cancel(self, transfer: Transfer) -> None:
        """Give up a transfer under way, whose end will have no effect."""
        self._copies.cancel(transfer)

    def transfer_ended(self, transfer: Transfer, now: float) -> None:
        """A transfer has ended well; nothing happens if it was cancelled."""
        if transfer.cancelled:
            return
        self._copies.end(transfer)
        if transfer.to_host and self._pool.log is not None:
            self._pool.log.arrived(transfer.parts[0].copy)
        self._strategy.predict.transfers.observe(len(transfer.pages), now - transfer.began)
        self.moved[not transfer.to_host] += len(transfer.pages)
        self.moved_windows[not transfer.to_host] += len(transfer.windows)
        if transfer.request is not None:
            if transfer.request.first_scheduled is None:
                transfer.request.restore_s += now - transfer.began
            self.kv.cut_copies(transfer.program, transfer.request.reused // self._size)

    def transfer_failed(self, transfer: Transfer) -> None:
        """A transfer has failed, so what it was to bring is dropped; nothing happens if it was cancelled."""
        if transfer.cancelled:
            return
        self._copies.end(transfer)
        self.failed += 1
        program, request, (copy, offset, _) = transfer.program, transfer.request, transfer.parts[0]
        if request is not None:
            pages, windows, size = request.pages[: copy.first + offset], self._windows, self._size
            start = resumable(windows, len(pages) * size, size, lambda i: windows.of[pages[i]])
            windows.hold(program, request.pages, windows.first(start), start // size)
            if request.preemptions == 0:
                device = min(start, request.resumed.device_tokens)
                host = start - device
                again = request.resumed.recomputed_tokens + request.reused - start
                request.resumed = Resumed(RECOMPUTED, FAILED, device, host, again)
            request.num_computed = request.reused = start
            self._copies.cut_windowless(program, windows.first(start), len(pages))
            self.kv.cut_copies(program, start // size)
        elif not copy.dropped:
            self.kv.lose_copy(program, copy, FAILED)

    def _idle_s(self, program: Program, now: float) -> float:
        return self._strategy.predict.wait_s(program, max(0.0, now - program.wait_began))

    def held_on_host(self, programs: list[Program]) -> Counter[int]:
        """Count the host memory that each tenant holds (for tests; O(everything))."""
        return self._copies.held(programs)

    def check(self, programs: list[Program]) -> None:
        """Raise AssertionError unless both tiers agree with the programs (for tests; O(everything))."""
        self._copies.check(programs)
        self.kv.check(programs)
        self._leases.check()
        tiers = {program: program.tier for program in programs if program.tier == LEASED}
        assert all(program in self._leases for program in tiers), "kept without a lease"
