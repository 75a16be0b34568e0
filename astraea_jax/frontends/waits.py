"""Remembers what programs wait for, so that a hint that comes during a wait can say how long it will be."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

from astraea_jax.scheduler.wait import Wait

MAX_OWNERS = 4096
MAX_WAITS = 256
"""Waits of one owner; the longest ago are forgotten first."""


@dataclass(frozen=True)
class Waiting:
    """A program that waits."""

    program: str
    session: str | None
    """The client's name for it, which may have several programs."""
    wait: Wait
    calls: frozenset[str]
    """Ids of the calls."""


class Waits:
    """The programs of each owner that wait. Used in one thread."""

    def __init__(self) -> None:
        self._owners: OrderedDict[str, OrderedDict[str, Waiting]] = OrderedDict()

    def begin(self, owner: str, waiting: Waiting) -> None:
        """Note that a program waits from now on."""
        of_owner = self._owners.setdefault(owner, OrderedDict())
        self._owners.move_to_end(owner)
        of_owner[waiting.program] = waiting
        of_owner.move_to_end(waiting.program)
        if len(of_owner) > MAX_WAITS:
            of_owner.popitem(last=False)
        if len(self._owners) > MAX_OWNERS:
            self._owners.popitem(last=False)

    def end(self, owner: str, program: str) -> Waiting | None:
        """Forget a program, which waits no longer; returns what it has waited for."""
        of_owner = self._owners.get(owner)
        return of_owner.pop(program, None) if of_owner is not None else None

    def find(self, owner: str, session: str | None, calls: Collection[str] = ()) -> Sequence[Waiting]:
        """Return the programs of a session that wait, or those that have made one of the calls."""
        return list(self._matching(owner, session, frozenset(calls)))

    def _matching(self, owner: str, session: str | None, calls: frozenset[str]) -> Iterator[Waiting]:
        for waiting in self._owners.get(owner, {}).values():
            named = session is None or session in (waiting.session, waiting.program)
            if named and (not calls or calls & waiting.calls) and (session is not None or calls):
                yield waiting
