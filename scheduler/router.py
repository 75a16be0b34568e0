"""The router: what placement has to remember of programs and replicas, bounded, and without I/O.

A program's home is the replica that its requests go to. The router counts what it has sent where, so that between two
reports of a replica not everybody is sent there. Callers lock; time is passed in, in seconds.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from zlib import crc32

from .placement import Fleet, Report, Rule, Segment, place


class NoReplica(RuntimeError):
    """No replica takes the request: all are gone, draining or avoided. Later it may work."""


@dataclass(frozen=True, slots=True)
class Route:
    """Where a request goes; hand it to :meth:`Router.ended` when the request has ended, however it ends."""

    replica: Hashable
    number: int
    """Order of routing."""
    moved: bool
    """Whether its program had another home before, so that its KV is computed again."""


@dataclass(slots=True, eq=False)
class _Home:
    """A program on its present replica."""

    index: int
    """Replica; -1: it is gone."""
    context: int = 0
    """Tokens that its last request ended with."""
    requests: int = 0
    """Requests in flight there."""
    first: Hashable | None = None
    """Name of the longest beginning of its first prompt, if that is known."""
    at: float = 0.0
    """Time at which it was last heard of: a request of it was sent or has ended, or it has moved."""

    def begins(self, prefixes: Sequence[tuple[Hashable, int]]) -> bool:
        """Whether a child goes on from this program, as far as is known, so that it has all its tokens.

        A fork has all of the first prompt; a sub-agent with a task of its own has the tools in common at most.
        """
        return self.first is None or any(name == self.first for name, _ in prefixes)


def _worth_remembering(prefixes: Sequence[tuple[Hashable, int]]) -> Iterator[Hashable]:
    """Names of some beginnings, fewer of long ones, and of the longest.

    Lengths have at most four significant bits, so of what two prompts have in common eight ninths are found at least,
    with some forty names for each.
    """
    for name, tokens in prefixes[:-1]:
        if tokens // (tokens & -tokens) < 16:
            yield name
    if prefixes:
        yield prefixes[-1][0]


@dataclass(slots=True, eq=False)
class _Sent:
    """A request in flight."""

    index: int
    program: Hashable | None
    home: _Home | None
    tokens: int
    fresh: int
    """Tokens of it that are still to be prefilled."""


class Router:
    """Chooses a replica for every request, by a rule.

    Args:
        rule: of placement.
        max_programs: programs remembered at most. Beyond that the one that has been idle longest is forgotten, and
            placed like a new one if it comes back.
        max_prefixes: beginnings of prompts remembered at most, the longest unused forgotten first.
    """

    def __init__(self, rule: Rule = place, *, max_programs: int, max_prefixes: int = 65_536):
        self.fleet = Fleet()
        """What is known of every replica."""
        self._rule, self._max_programs, self._max_prefixes = rule, max_programs, max_prefixes
        self._index: dict[Hashable, int] = {}
        self._replicas: list[Hashable | None] = []
        self._homes: OrderedDict[Hashable, _Home] = OrderedDict()  # the longest idle first
        self._sent: dict[int, _Sent] = {}
        self._prefixes: OrderedDict[Hashable, set[int]] = OrderedDict()  # replicas that have had each
        self._numbers = itertools.count(1)

    # -- replicas ----------------------------------------------------------------------------------------------

    @property
    def replicas(self) -> list[Hashable]:
        """Replicas that are there, draining ones included."""
        return list(self._index)

    def join(self, replica: Hashable, now: float) -> None:
        """A replica is there; nothing happens if it is known."""
        if replica in self._index:
            return
        free = [i for i, other in enumerate(self._replicas) if other is None]
        if not free:
            free = [len(self._replicas)]
            self._replicas.append(None)
            if len(self._replicas) > len(self.fleet):
                self.fleet.grow(len(self._replicas))
        self._replicas[free[0]], self._index[replica] = replica, free[0]
        self.fleet.takes[free[0]] = True

    def leave(self, replica: Hashable, now: float) -> None:
        """A replica is gone, and with it all that it held: its programs are placed like new ones."""
        index = self._index.pop(replica, None)
        if index is None:
            return
        self._replicas[index] = None
        for home in self._homes.values():
            if home.index == index:
                home.index, home.context, home.requests = -1, 0, 0
        self._sent = {number: sent for number, sent in self._sent.items() if sent.index != index}
        for found in self._prefixes.values():
            found.discard(index)
        self.fleet.clear(index)

    def drain(self, replica: Hashable) -> None:
        """A replica takes no more programs; those that it has go on there until they are settled elsewhere."""
        index = self._index.get(replica)
        if index is not None:
            self.fleet.takes[index] = False

    def report(self, replica: Hashable, report: Report, now: float) -> None:
        """Take in what a replica says of itself; ignored if it is gone."""
        index = self._index.get(replica)
        if index is not None:
            self.fleet.learn(index, report, now)
            self.fleet.takes[index] &= not report.draining

    # -- programs ----------------------------------------------------------------------------------------------

    def route(
        self,
        program: Hashable | None,
        tokens: int,
        now: float,
        *,
        parent: Hashable | None = None,
        prefixes: Sequence[tuple[Hashable, int]] = (),
        avoid: frozenset[Hashable] = frozenset(),
    ) -> Route:
        """Choose the replica of a request, which counts as sent there.

        Args:
            program: whose request it is; None: a program of this request alone.
            tokens: of its prompt.
            now: seconds.
            parent: program that has begun a new one, which may have all of its tokens in common with it.
            prefixes: beginnings of the prompt that other programs may have, too, each as its name (a hash of it) and
                its tokens, ascending (:func:`~.prefix.beginnings`); of a program's first request they are enough.
            avoid: replicas that have refused it.

        Raises:
            NoReplica: nobody takes it.
        """
        known = self._homes.get(program) if program is not None else None
        index, held = self._choose(known, program, tokens, now, parent, prefixes, avoid)
        moved = known is not None and known.index not in (index, -1)
        home = self._move(program, index, now) if program is not None else None
        if home is not None:
            home.requests += 1
            home.first = prefixes[-1][0] if prefixes else home.first
        sent = _Sent(index, program, home, tokens, max(1, tokens - held))
        number = next(self._numbers)
        self._sent[number] = sent
        self.fleet.requests[index] += 1
        self.fleet.context[index] += tokens
        self.fleet.fresh[index] += sent.fresh
        for name in _worth_remembering(prefixes):
            self._found(name, index)
        replica = self._replicas[index]
        assert replica is not None
        return Route(replica, number, moved)

    def settle(self, program: Hashable, replica: Hashable, now: float, *, context: int | None = None) -> None:
        """A program has turned out to be at a replica, as after a hand-over; ignored if that is gone.

        Args:
            program: that has moved.
            replica: where it is.
            now: seconds.
            context: tokens that it has there; None: that is not known.
        """
        index = self._index.get(replica)
        if index is not None:
            home = self._move(program, index, now)
            if context is not None:
                self.fleet.homes[index] += context - home.context
                home.context = context

    def busy(self, program: Hashable) -> bool:
        """Whether a request of a program is in flight."""
        home = self._homes.get(program)
        return home is not None and home.requests > 0

    def idle(self, replica: Hashable) -> list[Hashable]:
        """Programs of a replica that have no request in flight, the longest idle first."""
        index = self._index.get(replica)
        return [program for program, home in self._homes.items() if home.index == index and not home.requests]

    def prefilled(self, route: Route) -> None:
        """The first token of a request has come. Callers that see it say so, for better estimates."""
        sent = self._sent.get(route.number)
        if sent is not None:
            self.fleet.fresh[sent.index] -= sent.fresh
            sent.fresh = 0

    def ended(self, route: Route, now: float, *, context: int, last: bool = False) -> None:
        """A request has ended, and its program waits with a context of so many tokens; a second call does nothing.

        Args:
            route: of the request.
            now: seconds.
            context: tokens of its prompt and output; 0: it never ran, so nothing has changed for its program.
            last: its program has ended with it, unless another request of that is in flight.
        """
        self.prefilled(route)
        sent = self._sent.pop(route.number, None)
        if sent is None:
            return
        self.fleet.requests[sent.index] -= 1
        self.fleet.context[sent.index] -= sent.tokens
        home = sent.home
        if home is None or self._homes.get(sent.program) is not home:  # it has gone elsewhere since, or is forgotten
            return
        home.requests -= 1
        home.at = now
        self._homes.move_to_end(sent.program)
        if last and not home.requests:
            self.forget(sent.program)
        elif context:
            self.fleet.homes[home.index] += context - home.context
            home.context = context

    def forget(self, program: Hashable) -> None:
        """A program has ended; ignored if it is not known."""
        home = self._homes.pop(program, None)
        if home is not None and home.index >= 0:
            self.fleet.homes[home.index] -= home.context

    def gone(self, program: Hashable, replica: Hashable, since: float) -> None:
        """A replica says that a program has ended there, and that it knew of no new one at a time that was not before.

        What has been heard of the program after that time is newer, and so is a request in flight: then it stays.
        """
        home = self._homes.get(program)
        if home is not None and not home.requests and home.at <= since and home.index == self._index.get(replica):
            self.forget(program)

    def expire(self, before: float) -> None:
        """Forget programs that were last heard of earlier, as replicas do, and that have no request in flight."""
        for _ in range(len(self._homes)):
            program, home = next(iter(self._homes.items()))
            if home.requests:
                self._homes.move_to_end(program)  # it is not idle, so it need not be looked at again and again
            elif home.at < before:
                self.forget(program)
            else:
                break

    def index(self, replica: Hashable) -> int:
        """Index of a replica in the columns of ``fleet``."""
        return self._index[replica]

    def home(self, program: Hashable) -> Hashable | None:
        """The replica that has a program; None: nobody is known to."""
        home = self._homes.get(program)
        return None if home is None or home.index < 0 else self._replicas[home.index]

    def __len__(self) -> int:
        """Programs that are remembered."""
        return len(self._homes)

    # -- inside ------------------------------------------------------------------------------------------------

    def _choose(
        self,
        known: _Home | None,
        program: Hashable | None,
        tokens: int,
        now: float,
        parent: Hashable | None,
        prefixes: Sequence[tuple[Hashable, int]],
        avoid: frozenset[Hashable],
    ) -> tuple[int, int]:
        """A replica, and the tokens of the request that it has, as far as is known."""
        fleet, home = self.fleet, known.index if known is not None else -1
        allowed = fleet.takes
        avoided = [self._index[replica] for replica in avoid if replica in self._index]
        if avoided:
            allowed = allowed.copy()
            allowed[avoided] = False
        at_home = home >= 0 and home not in avoided
        if known is not None and at_home and (known.requests or not fleet.takes[home]):
            return home, known.context  # never two at once; and who drains keeps what it has
        if not allowed.any():
            raise NoReplica(
                f"none of {len(self._index)} replicas takes the request: "
                f"{len(avoided)} have refused it, the others drain; try again later"
            )
        fleet.now = now
        shared = {index: found for name, found in prefixes for index in self._prefixes.get(name, ())}
        of_parent = self._homes.get(parent) if parent is not None and known is None else None
        if of_parent is not None and of_parent.index >= 0 and of_parent.begins(prefixes):
            shared[of_parent.index] = max(shared.get(of_parent.index, 0), of_parent.context)
        held = min(known.context, tokens) if known is not None and at_home else 0
        segment = Segment(
            tokens=tokens,
            home=home if at_home else None,
            held=held,
            on_host=self._cold(home, held) if at_home else 0,
            shared={index: min(found, tokens) for index, found in shared.items()},
            key=crc32(repr(program).encode()),
        )
        index = self._rule(segment, fleet, allowed)
        return index, max(segment.shared.get(index, 0), held if index == home else 0)

    def _cold(self, index: int, held: int) -> int:
        """Tokens of an idle program that are likely no longer on the device: as many as of the average one."""
        pool, live = self.fleet.report["pool"][index], self.fleet.report["live"][index]
        return int(held * (1 - pool / live)) if live > pool > 0 else 0

    def _move(self, program: Hashable, index: int, now: float) -> _Home:
        """Make a replica the home of a program."""
        home = self._homes.get(program)
        if home is None:
            if len(self._homes) >= self._max_programs:
                self._forget_longest_idle()
            home = self._homes[program] = _Home(index)
        elif home.index != index:
            if home.index >= 0:
                self.fleet.homes[home.index] -= home.context
            home = self._homes[program] = _Home(index, first=home.first)
        home.at = now
        self._homes.move_to_end(program)
        return home

    def _forget_longest_idle(self) -> None:
        for _ in range(len(self._homes)):
            program, home = next(iter(self._homes.items()))
            if not home.requests:
                break
            self._homes.move_to_end(program)  # it is not idle, so it need not be looked at again and again
        self.forget(next(iter(self._homes)))

    def _found(self, prefix: Hashable, index: int) -> None:
        """A replica will have a beginning."""
        self._prefixes.setdefault(prefix, set()).add(index)
        self._prefixes.move_to_end(prefix)
        if len(self._prefixes) > self._max_prefixes:
            self._prefixes.popitem(last=False)
