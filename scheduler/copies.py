"""Accounting of the host tier: which programs have copies there, and which transfers are under way."""

from __future__ import annotations

from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable, Sequence
from itertools import islice

from .kv_log import KVLog
from .page_shares import ALL, ON_HOST, PageShares
from .pages import PagePool
from .program import Program, Request
from .transfer import HostCopy, HostPages, HostTier, Part, Transfer

CANDIDATES = 8
"""Programs that are compared when the host is full: a guess, to keep the choice O(1)."""


class HostCopies:
    """Copies of KV in host memory, and the transfers that make and read them.

    Args:
        host: sizes of the tier.
        idle_s: seconds from a time on that a program is expected not to run.
        shares: counts what tenants hold.
        log: is told what the host holds; None: nobody listens.
    """

    def __init__(
        self,
        host: HostTier,
        idle_s: Callable[[Program, float], float],
        shares: PageShares,
        log: KVLog | None = None,
    ):
        self.host = host
        self._idle_s, self._shares, self._log = idle_s, shares, log
        self._used = 0  # memory, in pages of one layer
        self._staged = 0  # pages on their way to the host
        self._holders: defaultdict[int, OrderedDict[Program, None]] = defaultdict(OrderedDict)
        """By tenant; least recently used first."""
        self._under_way: dict[Transfer, None] = {}
        self._begun: list[Transfer] = []  # since they were last taken
        self._dropped: list[HostPages] = []  # since they were last taken

    def room(self, windows: int) -> int:
        """Pages that an offload begun now may have, if the last ``windows`` of them have their window pages."""
        return min(self.fitting(windows), self.host.staging - self._staged)

    def fitting(self, windows: int) -> int:
        """Pages that memory which is not in use has room for, if the last ``windows`` have their window pages."""
        free, (page, window) = self.host.size - self._used, self.host.layers
        if (left := free - windows * (page + window)) < 0:
            return free // (page + window)
        return windows + left // page if page else self.host.staging

    @property
    def holders(self) -> int:
        """Programs that have copies."""
        return sum(map(len, self._holders.values()))

    @property
    def pages(self) -> int:
        """Pages of host memory in use, in which window pages are counted by their share."""
        return -(-self._used // sum(self.host.layers))

    # -- transfers ---------------------------------------------------------------------------------------------

    def offload(self, program: Program, first: int, windows: Sequence[int], count: int, now: float) -> None:
        """Begin to copy the device pages ``first … first + count - 1`` of a program to the host.

        ``windows`` are the window pages of the last of them.
        """
        copy = HostCopy(first, count, HostPages(count, len(windows), tenant=program.tenant))
        program.copies = sorted([*program.copies, copy], key=lambda c: c.first)
        self._holders[program.tenant][program] = None
        self._use(copy.memory)
        self._staged += count
        pages, parts = tuple(program.pages[first : first + count]), (Part(copy, 0, count),)
        window_parts = (Part(copy, 0, len(windows)),)
        self._begin(Transfer(program, pages, parts, True, now, tuple(windows), window_parts))
        if self._log is not None:
            self._log.copying(program, copy)

    def restore(
        self, request: Request, pages: list[int], parts: list[Part], windows: list[int], first: int, now: float
    ) -> None:
        """Begin to copy ``parts`` back to ``pages``; the request computes nothing until that has ended.

        The window pages of the last of them, from index ``first`` on, are copied to ``windows``.
        """
        window_parts = []
        for copy, offset, count in parts:
            end = copy.first + offset + count
            if (low := max(first, copy.first + offset)) < end:
                window_parts.append(Part(copy, low - copy.window_first, end - low))
        request.loading = Transfer(
            request.program, tuple(pages), tuple(parts), False, now, tuple(windows), tuple(window_parts), request
        )
        self._begin(request.loading)

    def end(self, transfer: Transfer) -> None:
        """A transfer is over, well or not."""
        del self._under_way[transfer]
        if transfer.request is not None:
            transfer.request.loading = None
            return
        self._staged -= len(transfer.pages)
        memory = transfer.parts[0].copy.memory
        memory.ready = True
        if not memory.holders:  # it was dropped on its way
            self._use(memory, -1)

    def cancel(self, transfer: Transfer) -> None:
        """Give up a transfer under way, and the copy it was to make; its end will have no effect."""
        transfer.cancelled = True
        self.end(transfer)
        if transfer.to_host and not transfer.parts[0].copy.dropped:
            self.remove(transfer.program, transfer.parts[0].copy)

    def cancel_all(self) -> None:
        for transfer in list(self._under_way):
            self.cancel(transfer)

    def take_transfers(self) -> tuple[list[Transfer], list[HostPages]]:
        """Transfers begun, and host memory given up, since the last call."""
        begun, self._begun = self._begun, []
        dropped, self._dropped = self._dropped, []
        return begun, dropped

    def _begin(self, transfer: Transfer) -> None:
        self._under_way[transfer] = None
        self._begun.append(transfer)

    # -- copies ------------------------------------------------------------------------------------------------

    def use(self, program: Program) -> None:
        """A program's copies count as used just now."""
        if program.copies:
            self._holders[program.tenant].move_to_end(program)

    def share(self, program: Program, other: Program, pages: int) -> int:
        """Let ``other`` hold the copies of a program, too, that continue its first ``pages`` pages without a gap.

        Copies that have not arrived are left out, because what becomes of them concerns one program. Returns how many
        pages ``other`` has with them.
        """
        for copy in program.copies:
            if copy.first > pages:
                break
            if copy.ready:
                copy.memory.holders += 1
                other.copies.append(HostCopy(copy.first, copy.used, copy.memory))
                if self._log is not None:
                    self._log.shared(copy, other.copies[-1])
                self._holders[other.tenant][other] = None
                pages = max(pages, copy.end)
        return pages

    def cut(self, program: Program, keep: int) -> None:
        """Drop the copies of all but a program's first ``keep`` pages."""
        while program.copies and program.copies[-1].end > keep:
            self._cut(program, program.copies[-1], keep)

    def cut_windowless(self, program: Program, first: int, held: int) -> None:
        """Cut copies where they have pages of a program from index ``first`` on, but not the window pages of these.

        The device holds the first ``held`` pages; a copy that has others stays as it is.
        """
        for copy in list(program.copies):
            keep = max(first, copy.first)
            if keep < min(copy.end, copy.window_first) and copy.end <= held:
                self._cut(program, copy, keep)

    def _cut(self, program: Program, copy: HostCopy, keep: int) -> None:
        """Drop what a copy has after the first ``keep`` pages of its program."""
        if keep <= copy.first:
            self.remove(program, copy)
            return
        copy.used = keep - copy.first
        if self._log is not None:
            self._log.cut(copy)

    def remove(self, program: Program, copy: HostCopy) -> None:
        """Drop one copy."""
        program.copies.remove(copy)
        copy.dropped = True
        if self._log is not None:
            self._log.cut(copy)
        copy.memory.holders -= 1
        if not copy.memory.holders:
            self._dropped.append(copy.memory)
            if copy.ready:
                self._use(copy.memory, -1)
        if not program.copies:
            holders = self._holders[program.tenant]
            del holders[program]
            if not holders:
                del self._holders[program.tenant]

    def least_worth(self, program: Program, count: int, now: float, keep: Program | None) -> Program | None:
        """Find the program whose copies are to make room for ``count`` pages of ``program``, if any is worth less.

        Copies of tenants beyond their share are worth nothing to others. Of a tenant it is, of the holders used least
        recently, one that needs none, or else the one expected to be idle longest; never ``keep``.
        """
        needs, tenant = self.host.taken(count, len(program.window)), program.tenant
        idle_s = self._idle_s(program, now)
        for giver, most in self._shares.givers(ON_HOST, self._holders, now, needs=needs, to=tenant, spare=True):
            least_s = idle_s if giver == tenant or most == ALL else -1.0
            victim = self._least_worth_of(giver, least_s, now, (program, keep))
            if victim is not None or giver == tenant:
                return victim
        return None

    def _least_worth_of(
        self, tenant: int, least_s: float, now: float, keep: tuple[Program, Program | None]
    ) -> Program | None:
        best, longest_s = None, least_s
        for other in islice(self._holders[tenant], CANDIDATES):
            if other in keep or other.restoring or not all(copy.ready for copy in other.copies):
                continue
            if other.running is not None or other.copies[-1].end <= len(other.pages):
                return other
            if (idle_s := self._idle_s(other, now)) > longest_s:
                best, longest_s = other, idle_s
        return best

    def _use(self, memory: HostPages, sign: int = 1) -> None:
        """Count memory as used from now on, or (-1) no longer."""
        size = sign * self._size(memory)
        self._used += size
        self._shares.hold(ON_HOST, memory.tenant, size)

    def _size(self, memory: HostPages) -> int:
        return self.host.taken(memory.count, memory.windows)

    def held(self, programs: list[Program]) -> Counter[int]:
        """Count the memory that each tenant holds (for tests; O(everything))."""
        memories = {copy.memory for program in programs for copy in program.copies}
        memories |= {transfer.parts[0].copy.memory for transfer in self._under_way if transfer.to_host}
        held: Counter[int] = Counter()
        for memory in memories:
            held[memory.tenant] += self._size(memory)
        return +held

    def check(self, programs: list[Program]) -> None:
        """Raise AssertionError unless memory and holders add up (for tests; O(everything))."""
        copies = [copy for program in programs for copy in program.copies]
        assert not any(copy.dropped for copy in copies)
        holders = {program: tenant for tenant, of in self._holders.items() for program in of}
        assert holders == {program: program.tenant for program in programs if program.copies}
        assert all(self._holders.values()), "a tenant is remembered that has no copies"
        assert self._staged == sum(len(transfer.pages) for transfer in self._under_way if transfer.to_host)
        counts = Counter(copy.memory for copy in copies)
        assert all(memory.holders == count for memory, count in counts.items())
        arriving = [t.parts[0].copy.memory for t in self._under_way if t.to_host]
        assert self._used == sum(map(self._size, {*counts, *arriving})) <= self.host.size
        assert 0 <= self._staged <= max(self.host.staging, 0)
        assert not any(transfer.cancelled for transfer in self._under_way)
        if self._log is not None:
            self._log.check(copies)


def copyable(program: Program, pool: PagePool) -> tuple[int, int]:
    """The last run of a program's device pages that nobody shares and no copy holds, as (first, end)."""
    end = len(program.pages)
    first = 0
    for copy in reversed(program.copies):
        if copy.end < end:
            first = copy.end
            break
        end = min(end, copy.first)
    at = end
    while at > first and not pool.shared(program.pages[at - 1]):
        at -= 1
    return at, end


def parts_of(program: Program, first: int, end: int) -> list[Part]:
    """The host pages that hold pages ``first … end - 1`` of a program."""
    parts = []
    for copy in program.copies:
        low, high = max(first, copy.first), min(end, copy.end)
        if low < high:
            parts.append(Part(copy, low - copy.first, high - low))
    return parts
