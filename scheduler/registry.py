"""The table of live programs: found by key, with lifetime counters, and bounded fairly between owners."""

from __future__ import annotations

from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Hashable, Iterator
from itertools import islice

from .page_shares import PageShares
from .program import Program, QueueFull, Rejected, Request
from .view import ProgramView

UNKNOWN_SESSION = "this session has expired, or has never begun; begin it with a request"
NAME_TAKEN = "there is a session of that name already; end it first, or choose another name"
MAX_ENDED = 4096
"""Programs that have ended and are remembered by their key, the latest ones."""


class IdlePrograms:
    """Programs between two requests; the longest idle, and that of the owner with most of them, are found in O(1)."""

    def __init__(self) -> None:
        self._all: OrderedDict[Program, None] = OrderedDict()  # longest idle first
        self._of: defaultdict[Hashable, OrderedDict[Program, None]] = defaultdict(OrderedDict)
        self._owners: defaultdict[int, OrderedDict[Hashable, None]] = defaultdict(OrderedDict)  # by how many they hold
        self._most = 0

    def __len__(self) -> int:
        return len(self._all)

    def __contains__(self, program: Program) -> bool:
        return program in self._all

    def __iter__(self) -> Iterator[Program]:
        return iter(self._all)

    def add(self, program: Program) -> None:
        held = self._of[program.owner]
        self._all[program] = held[program] = None
        self._recount(program.owner, len(held) - 1, len(held))

    def discard(self, program: Program) -> None:
        if program in self._all:
            held = self._of[program.owner]
            del self._all[program], held[program]
            self._recount(program.owner, len(held) + 1, len(held))

    def longest(self) -> Program:
        """The program that has been idle longest."""
        return next(iter(self._all))

    def latest(self, owner: Hashable | None) -> Iterator[Program]:
        """List the programs of an owner, or (None) all of them; the one whose wait began last is the first."""
        return reversed(self._all if owner is None else self._of.get(owner, OrderedDict()))

    def of_largest_owner(self, keep: Program | None = None) -> Program | None:
        """The longest idle program, other than ``keep``, of the owner with the most idle ones."""
        held = (program for owner in self._owners.get(self._most, ()) for program in self._of[owner])
        return next((program for program in held if program is not keep), None)

    def _recount(self, owner: Hashable, before: int, after: int) -> None:
        """Move an owner whose number of idle programs has changed by one to its new place."""
        if before:
            del self._owners[before][owner]
            if not self._owners[before]:
                del self._owners[before]
        if after:
            self._owners[after][owner] = None
        else:
            del self._of[owner]
        if after > self._most or self._most not in self._owners:  # a count of one less has an owner: this one
            self._most = after

    def check(self) -> None:
        """Raise AssertionError unless the owners' counts add up (for tests; O(everything))."""
        assert sorted(p.number for held in self._of.values() for p in held) == sorted(p.number for p in self._all)
        counts = {owner: len(held) for owner, held in self._of.items()}
        assert counts == {owner: count for count, owners in self._owners.items() for owner in owners}
        assert self._most == max(counts.values(), default=0)


class Registry:
    """Live programs. They conserve: created = live + finished + failed + expired + moved.

    A program with a key is found by it until it ends. A program without one is in no name table, so no key that a
    caller makes up can meet it.

    Args:
        limit: programs remembered at once. Beyond it an idle one makes room: of the owner who holds most idle programs
            the one that has been idle longest, so whoever opens thousands of sessions loses only their own.
        forgotten: called with every program that ends.
        shares: counts the programs of every tenant.
    """

    def __init__(self, limit: int, forgotten: Callable[[Program], None], shares: PageShares):
        self.live: dict[Program, Request] = {}
        """Programs with a request that waits or runs."""
        self.idle = IdlePrograms()
        self.created = self.finished = self.failed = self.expired = self.moved = 0
        self.io_intensive = 0
        self.humans = 0
        """Idle programs that wait for a human. Written by Waits, too."""
        self._limit = limit
        self._forgotten, self._shares = forgotten, shares
        self._by_key: dict[Hashable, Program] = {}
        self._ended: deque[tuple[float, Hashable]] = deque(maxlen=MAX_ENDED)  # by their clients, and when

    def __len__(self) -> int:
        return len(self.live) + len(self.idle)

    @property
    def named(self) -> int:
        """Programs that have a key."""
        return len(self._by_key)

    def find(self, key: Hashable) -> Program | None:
        return self._by_key.get(key)

    def programs(self) -> list[Program]:
        return [*self.live, *self.idle]

    def look(self, limit: int, owner: Hashable | None, now: float) -> list[ProgramView]:
        """Look at up to ``limit`` programs, of one owner or (None) of all.

        Those with a request come first, then those whose wait began last.
        """
        live = (item for item in self.live.items() if owner in (None, item[0].owner))
        views = [ProgramView.of(program, request, now) for program, request in islice(live, limit)]
        idle = islice(self.idle.latest(owner), limit - len(views))
        return views + [ProgramView.of(program, None, now) for program in idle]

    def open(
        self, key: Hashable | None, owner: Hashable, salt: bytes | None, now: float, parent: Hashable | None = None
    ) -> Program:
        """The program of that key, or a new one, which must get a request before anything else happens.

        Raises:
            Rejected: it was begun with another salt.
            QueueFull: it has a request, or there are too many programs and all have one.
        """
        found = self._by_key.get(key) if key is not None else None
        if found is not None:
            self._check_free(found, salt)
            found.parent = found.parent if parent is None else parent
            return found
        return self.add(key, owner, salt, now, parent)

    def waiting(self, key: Hashable, salt: bytes | None) -> Program:
        """The program of that key, which waits.

        Raises:
            Rejected: there is none, or it was begun with another salt.
            QueueFull: it has a request.
        """
        program = self._known(key)
        self._check_free(program, salt)
        return program

    def fork(self, key: Hashable, child: Hashable, now: float) -> tuple[Program, Program]:
        """The program of that key, and a new one of the same owner and salt, which does not wait yet.

        Raises:
            Rejected: there is none, or the new one's key is taken.
            QueueFull: there are too many programs and none that could make room.
        """
        program = self._known(key)
        return program, self.add(child, program.owner, program.salt, now, key, keep=program)

    def _known(self, key: Hashable) -> Program:
        program = self._by_key.get(key)
        if program is None:
            raise Rejected(UNKNOWN_SESSION)
        return program

    def _check_free(self, program: Program, salt: bytes | None) -> None:
        if program.salt != salt:
            raise Rejected("this session was begun with another cache salt; end it first, or use its salt")
        if program in self.live:
            raise QueueFull("this session has a request in progress; try again when it has ended")

    def add(
        self,
        key: Hashable | None,
        owner: Hashable,
        salt: bytes | None,
        now: float,
        parent: Hashable | None,
        keep: Program | None = None,
    ) -> Program:
        """A new program, which must wait or get a request before anything else happens; ``keep`` stays in any case.

        Raises:
            Rejected: its key is taken.
            QueueFull: there are too many programs and none that could make room.
        """
        if key in self._by_key:
            raise Rejected(NAME_TAKEN)
        if len(self) >= self._limit:
            longest = self.idle.of_largest_owner(keep)
            if longest is None:
                raise QueueFull(f"{len(self)} programs are live; try again later")
            self.expired += 1
            self._forget(longest)
        self.created += 1
        self.io_intensive += 1
        tenant = self._shares.enter(owner, now)
        program = Program(self.created, now, key=key, owner=owner, salt=salt, parent=parent, tenant=tenant)
        if key is not None:
            self._by_key[key] = program
        return program

    def finish(self, program: Program, now: float, *, failed: bool = False) -> None:
        """A program has ended."""
        self.failed += failed
        self.finished += not failed
        self._forget(program)
        if program.key is not None:
            self._ended.append((now, program.key))

    def ended(self, since: float) -> list[Hashable]:
        """Keys of programs that have ended since that time, expired ones left out, and that nobody has opened again.

        Any thread may ask.
        """
        latest = self._ended.copy()  # in one piece, whatever the thread of the scheduler does
        keys = dict.fromkeys(key for ended, key in latest if ended >= since)
        return [key for key in keys if key not in self._by_key]

    def leave(self, program: Program) -> None:
        """An idle program has left for another replica."""
        self.moved += 1
        self._forget(program)

    def expire(self, before: float) -> None:
        """Forget programs whose wait began earlier."""
        while self.idle and (program := self.idle.longest()).wait_began <= before:
            self.expired += 1
            self._forget(program)

    def classify(self, program: Program, typical: float) -> None:
        """Say whether the requests of a program's job cost at most ``typical`` tokens."""
        job = program.job
        was, program.io_intensive = program.io_intensive, job.service / job.turns <= typical
        self.io_intensive += program.io_intensive - was

    def check(self) -> None:
        """Raise AssertionError unless programs conserve (for tests; O(everything))."""
        programs = self.programs()
        gone = self.finished + self.failed + self.expired + self.moved
        assert self.created == len(programs) + gone, "programs do not add up"
        assert len(set(programs)) == len(programs), "a program is both live and idle"
        assert self._by_key == {p.key: p for p in programs if p.key is not None}, "keys and programs differ"
        assert self.humans == sum(p.awaits_human for p in self.idle), "humans do not add up"
        assert self.io_intensive == sum(p.io_intensive for p in programs), "classes do not add up"
        self.idle.check()

    def _forget(self, program: Program) -> None:
        self.humans -= program.awaits_human
        self.idle.discard(program)
        if program.key is not None:
            del self._by_key[program.key]
        self.io_intensive -= program.io_intensive
        self._forgotten(program)
        self._shares.leave(program.tenant)
