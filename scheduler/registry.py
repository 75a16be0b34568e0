"""Which programs there are, by name: those with a request, those in a tool wait, and how many have come and gone."""

from __future__ import annotations

from collections.abc import Callable

from .program import Program, QueueFull, Rejected, Request


class Registry:
    """Programs conserve: created = live + finished + failed + expired.

    Args:
        limit: programs remembered at once; the longest idle makes room.
        forgotten: told of every program that ends.
    """

    def __init__(self, limit: int, forgotten: Callable[[Program], None]):
        self.live: dict[Program, Request] = {}
        """Programs with a request that waits or runs."""
        self.idle: dict[Program, None] = {}
        """Those in a tool wait, longest first."""
        self.created = self.finished = self.failed = self.expired = 0
        self.io_intensive = 0
        self._limit = limit
        self._forgotten = forgotten
        self._by_name: dict[str, Program] = {}

    def __len__(self) -> int:
        return len(self._by_name)

    def find(self, name: str) -> Program | None:
        return self._by_name.get(name)

    def programs(self) -> list[Program]:
        return list(self._by_name.values())

    def open(self, name: str | None, salt: bytes | None, now: float) -> Program:
        """The program of that name, or a new one.

        Raises:
            Rejected: it was begun with another salt.
            QueueFull: it has a request, or there are too many programs and all have one.
        """
        found = self._by_name.get(name) if name is not None else None
        if found is not None:
            if found.salt != salt:
                raise Rejected(f"session {name!r} was begun with another cache salt; end it first, or use its salt")
            if found in self.live:
                raise QueueFull(f"session {name!r} has a request in progress; try again when it has ended")
            return found
        if len(self._by_name) >= self._limit:
            if not self.idle:
                raise QueueFull(f"{len(self._by_name)} programs are live; try again later")
            self.expired += 1
            self._forget(next(iter(self.idle)))
        self.created += 1
        self.io_intensive += 1
        program = Program(name if name is not None else f"#{self.created}", now, salt)
        self._by_name[program.id] = program
        return program

    def finish(self, program: Program, *, failed: bool = False) -> None:
        """A program has ended."""
        self.failed += failed
        self.finished += not failed
        self._forget(program)

    def expire(self, before: float) -> None:
        """Forget programs whose tool wait began earlier."""
        while self.idle and (program := next(iter(self.idle))).wait_began <= before:
            self.expired += 1
            self._forget(program)

    def classify(self, program: Program, typical: float) -> None:
        """Say whether a program's requests cost at most ``typical`` tokens."""
        was, program.io_intensive = program.io_intensive, program.service / program.turns <= typical
        self.io_intensive += program.io_intensive - was

    def check(self) -> None:
        """Raise AssertionError unless programs conserve (for tests; O(everything))."""
        gone = self.finished + self.failed + self.expired
        assert self.created == len(self._by_name) + gone, "programs do not add up"
        assert len(self._by_name) == len(self.live) + len(self.idle), "a program is neither live nor in a tool wait"
        assert self.io_intensive == sum(p.io_intensive for p in self._by_name.values()), "classes do not add up"

    def _forget(self, program: Program) -> None:
        self.idle.pop(program, None)
        del self._by_name[program.id]
        self.io_intensive -= program.io_intensive
        self._forgotten(program)
