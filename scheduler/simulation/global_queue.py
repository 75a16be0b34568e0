"""ThunderAgent's global queue (arXiv 2602.13692): programs are paused at the front and go on wherever there is room.

Every five seconds each replica whose programs exceed its pool pauses some: those that wait for tools first, then the
shortest. The context of a program that waits counts ``2 ** -seconds`` times. Paused programs go on where there is most
room, those with a request first, then the shortest. New programs wait behind paused ones.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

INTERVAL_S = 5.0
"""The paper's number."""


@dataclass(slots=True, eq=False)
class _Known:
    context: int
    replica: int | None = None
    """None: paused."""
    since: float | None = None
    """Time since which it waits for a tool; None: it has a request."""

    def weight(self, now: float) -> float:
        return self.context * 2.0 ** -min(60.0, now - self.since) if self.since is not None else float(self.context)


class GlobalQueue:
    """Says on which replica a program's request may run now.

    Args:
        capacity: tokens of a replica's pool.
    """

    def __init__(self, capacity: int):
        self._capacity = capacity
        self._programs: dict[str, _Known] = {}

    def arrives(self, program: str, tokens: int, replicas: Collection[int], now: float) -> int | None:
        """A request has come; None: it waits here, until :meth:`tick` names its program."""
        known, new = self._programs.get(program), program not in self._programs
        if known is None:
            known = self._programs[program] = _Known(tokens)
        known.context, known.since = tokens, None
        if known.replica not in replicas:
            known.replica = None
        if new and not any(other.replica is None for other in self._programs.values() if other is not known):
            self._resume(known, self._room(replicas, now))
        return known.replica

    def ended(self, program: str, context: int, now: float) -> None:
        """A request has ended, and its program waits for a tool."""
        known = self._programs[program]
        known.context, known.since = context, now

    def forget(self, program: str) -> None:
        """A program has ended."""
        self._programs.pop(program, None)

    def tick(self, replicas: Collection[int], running: Collection[str], now: float) -> dict[str, int]:
        """Pause and resume programs; returns those that go on, with their replicas. ``running`` ones are not paused."""
        room = self._room(replicas, now)
        order = sorted(self._programs.items(), key=lambda item: (item[1].since is None, item[1].context, item[0]))
        for program, known in order:
            if known.replica in room and room[known.replica] < 0 and program not in running:
                room[known.replica] += known.weight(now)
                known.replica = None
        paused = [(program, known) for program, known in order if known.replica is None]
        resumed = {}
        for program, known in sorted(paused, key=lambda item: (item[1].since is not None, item[1].context)):
            if not self._resume(known, room):
                break
            room[known.replica] -= known.weight(now)
            resumed[program] = known.replica
        return resumed  # type: ignore[return-value]

    def _room(self, replicas: Collection[int], now: float) -> dict[int | None, float]:
        room: dict[int | None, float] = dict.fromkeys(replicas, float(self._capacity))
        for known in self._programs.values():
            if known.replica in room:
                room[known.replica] -= known.weight(now)
        return room

    def _resume(self, known: _Known, room: dict[int | None, float]) -> bool:
        """Give a program the replica with most room, if it fits there or that has nothing else."""
        replica = max(room, key=lambda r: room[r], default=None)
        if replica is None or (room[replica] < known.context and room[replica] < self._capacity):
            return False
        known.replica = replica
        return True
