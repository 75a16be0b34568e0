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

from collections.abc import Callable, Iterable
from itertools import islice

from .copies import HostCopies, copyable, parts_of
from .eviction import FIRST, LEASED, USUAL
from .leases import Leases
from .offer import Offer
from .pages import PagePool
from .program import Program, Request
from .retained import RetainedKV
from .strategy import DISCARD, EVICT_FIRST, Strategy
from .transfer import HostPages, HostTier, Transfer
from .wait import FAILED, RECOMPUTED, Resumed

CHUNK = 32
"""Least pages offloaded together, if a program has as many and staging has room: a guess."""


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
        self.failed = 0
        """Transfers that failed so far."""
        self._copies = HostCopies(host, self._idle_s)
        self.kv = RetainedKV(pool, page_size, self._copies, lost)
        self._order = self.kv.order
        self._leases = Leases(pool.size)
        self._pool, self._size, self._strategy = pool, page_size, strategy
        strategy.host_tier = host.pages > 0
        self._offloading = False

    @property
    def programs_on_host(self) -> int:
        """Programs of whose KV the host holds a copy."""
        return self._copies.holders

    @property
    def host_pages(self) -> int:
        """Pages of host memory in use."""
        return self._copies.host.pages - self._copies.free

    # -- programs ----------------------------------------------------------------------------------------------

    def retain(self, program: Program, request: Request, pages: list[int], tokens: int) -> None:
        """Take over the KV of the first ``tokens`` tokens of a request that stops running, on ``pages``."""
        program.last, program.kept, program.pages = request, tokens, pages
        program.running, program.computed, program.lost = None, tokens, ""
        self._strategy.stopped(request)
        self._copies.use(program)
        self._order.add(program)

    def wait_begins(self, program: Program, now: float) -> None:
        """A program begins to wait: decide what becomes of its KV."""
        action, why = self._strategy.waits(program, self._slack, now)
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
        action = self._strategy.waits(program, self._slack, now).action
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
        kept = -(-tokens // size)
        own = min(len(program.pages), kept)
        found: list[int] = []
        if own * size <= tokens:
            found = self._pool.find(islice(request.block_hashes, own, request.most_reusable // size))
            tokens = max(tokens, (own + len(found)) * size)
        elif self._pool.shared(program.pages[own - 1]):
            own -= 1
            kept, tokens = own, own * size
        parts = parts_of(program, own + len(found), kept)
        return Offer(request, own, found, parts, tokens, -(-request.num_tokens // size) - own - len(found))

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
        new = self._pool.allocate(offer.need)
        if offer.parts:
            self._copies.restore(request, new[: sum(part.pages for part in offer.parts)], offer.parts, now)
        return pages + new

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
        self._strategy.predict.transfers.observe(len(transfer.pages), now - transfer.began)
        self.moved[not transfer.to_host] += len(transfer.pages)
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
            start = copy.first + offset
            if request.preemptions == 0:
                device = min(start * self._size, request.resumed.device_tokens)
                host = start * self._size - device
                again = request.resumed.recomputed_tokens + request.reused - start * self._size
                request.resumed = Resumed(RECOMPUTED, FAILED, device, host, again)
            request.num_computed = request.reused = start * self._size
            self.kv.cut_copies(program, start)
        elif not copy.dropped:
            self.kv.lose_copy(program, copy, FAILED)

    # -- pressure ----------------------------------------------------------------------------------------------

    @property
    def _slack(self) -> float:
        """Share of the pool that can be had at once."""
        return self.kv.at_once / self._pool.size

    def evict(self, need: int, now: float, *, wait: bool, keep: Program | None = None) -> bool:
        """Evict programs that do not run until ``need`` pages are free; returns whether they are.

        Args:
            need: pages.
            now: seconds.
            wait: rather have fewer pages now than drop KV for which the host only lacks staging.
            keep: a program not to be evicted.
        """
        if self._pool.free >= need:
            return True
        order = self._strategy.order(self._order.all, now)
        if order is None:
            self._evict_clean(need, keep)
        for program in self._order.oldest(clean=False, keep=keep) if order is None else list(order):
            if self._pool.free >= need:
                return True
            if program is not keep and not self._evict_from(program, need, now, wait, keep):
                return False
        if self._pool.free < min(need, self._pool.obtainable):
            self._evict_shared(need, now, wait, keep)
        return self._pool.free >= need

    def offload_ahead(self, now: float) -> None:
        """Offload the KV of programs idle longest ahead of need, if little of the pool is free or clean."""
        dirty = self._order.dirty
        if not dirty or self._copies.host.pages == 0:
            return
        low, high = (int(share * self._pool.size) for share in self._strategy.ahead)
        self._offloading = self.kv.at_once < (high if self._offloading else low)
        while self._offloading and dirty and (wanted := high - self.kv.at_once) > 0:
            program = next(iter(dirty))
            first, end = copyable(program, self._pool)
            if end > first and self._strategy.offloads(program):
                count = min(max(wanted, CHUNK), end - first, self._copies.room)
                if count <= 0:
                    return
                self.kv.offload(program, end - count, count, "ahead of need", now)
            else:
                dirty.discard(program)
            if self._strategy.evicts_clean:
                self.kv.release(program, len(program.pages) - self._order.clean.get(program, 0))

    def _evict_clean(self, need: int, keep: Program | None) -> None:
        """Evict pages that have a host copy."""
        for program in self._order.oldest(clean=True, keep=keep):
            count = min(need - self._pool.free, self._order.clean[program])
            if count <= 0:
                return
            self.kv.note(program, "free", "it has a host copy", count)
            self.kv.release(program, len(program.pages) - count)

    def _evict_from(self, program: Program, need: int, now: float, wait: bool, keep: Program | None) -> bool:
        """Evict pages of a program until ``need`` are free; False: the host only lacks staging, so wait for it."""
        while self._pool.free < need and program.pages:
            want, held = need - self._pool.free, len(program.pages)
            if clean := self._order.clean.get(program, 0):
                self.kv.release(program, held - min(want, clean))
                continue
            first, end = copyable(program, self._pool)
            if end < held or first == end:
                self._order.set_aside(program)
                return True
            want = min(want, end - first)
            if self._copies.host.pages and self._strategy.offloads(program):
                self.kv.make_room(want, program, now, keep)
                count = min(max(want, CHUNK), end - first, self._copies.room)
                if count > 0:
                    self.kv.offload(program, end - count, count, "its pages are needed", now)
                    continue
                if wait and want <= self._copies.free:
                    return False
                why = "the host has no room"
            else:
                why = "it is cheap to compute" if self._copies.host.pages else "there is no host tier"
            self.kv.drop(program, want, why)
        return True

    def _evict_shared(self, need: int, now: float, wait: bool, keep: Program | None) -> None:
        """Evict, as a last resort, programs that share pages with each other: all but one of them lose the KV."""
        for program in [p for p in self._order.shared if p is not keep]:
            if not self._pool.shared(program.pages[-1]):  # the others have gone
                self._order.add(program)
                if not self._evict_from(program, need, now, wait, keep):
                    return
            if program in self._order.shared and self._pool.unpinned(program.pages):
                self.kv.drop(program, len(program.pages), "nothing else is left")
            if self._pool.free >= need:
                return

    def _idle_s(self, program: Program, now: float) -> float:
        return self._strategy.predict.wait_s(program, max(0.0, now - program.wait_began))

    def check(self, programs: list[Program]) -> None:
        """Raise AssertionError unless both tiers agree with the programs (for tests; O(everything))."""
        self._copies.check(programs)
        self.kv.check(programs)
        self._leases.check()
        tiers = {program: program.tier for program in programs if program.tier == LEASED}
        assert all(program in self._leases for program in tiers), "kept without a lease"
