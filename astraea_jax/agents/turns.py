"""The turns that are known, as trees: histories with a common beginning share it.

Nothing here renders or tokenises, and nothing locks: whoever uses it does.
"""

from __future__ import annotations

import itertools
import json
from array import array
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

T = TypeVar("T")

OVERHEAD = 1024
"""Bytes that a turn takes beside its texts and tokens."""
SWEPT = 64
"""Owners that are looked at when one of them is to forget something, so that it takes as long with any number."""
MAX_ALIKE = 256
"""Turns of the same meaning that are told apart; of more, the oldest is not recognised any more."""


@dataclass(eq=False)
class Program:
    """One line of turns: what the scheduler calls a program."""

    name: str
    session: str | None
    """The name under which its client knows it, alone or together with others."""
    parent: str | None = None
    """The program from whose history it branches."""
    tip: Turn | None = None
    """Its newest turn."""
    busy: bool = False
    """A request of it runs."""
    forgotten: bool = False
    """Its turns go as soon as nothing builds on them."""
    setting: str = "[null, {}]"
    """JSON of the tools and template arguments of its latest request, which takes less than their objects."""

    @property
    def tools(self) -> Any:
        """The tools of its latest request."""
        return json.loads(self.setting)[0]

    @property
    def template_arguments(self) -> Any:
        """The template arguments of its latest request."""
        return json.loads(self.setting)[1]


@dataclass(eq=False)
class Piece:
    """The tokens of one turn and of the text before it, up to the turn before."""

    base: Piece | None
    """Its tokens come before these; None: these are the first."""
    text: str
    """The text before the turn as the template rendered it, without a generation prompt; not kept of a plain text."""
    ids: array[int]
    """Tokens of that text, of the generation prompt, and all that were generated."""
    stop: str | None
    """Text of the stop token that these end with; None if they do not."""
    end: int
    """Messages (of a plain text: characters) up to the end of the turn."""
    job: int
    """The job of the turn."""
    whole: bool = True
    """The client was given all that was generated; if not, the turn is rendered again."""
    rendered: str | None = None
    """The turn as the template rendered it when its job went on, up to its stop text; None: not known yet."""
    undo: int = 0
    """Tokens at the end of the base that do not come before these: a stop token that a client has left out."""

    @property
    def size(self) -> int:
        """Bytes it takes, about."""
        return OVERHEAD + len(self.text) + len(self.rendered or "") + self.ids.itemsize * len(self.ids)

    def chain(self) -> list[Piece]:
        """Return all pieces whose tokens, laid end to end, are those of the history; this one is the last."""
        return _chain(self, lambda piece: piece.base)


@dataclass(eq=False)
class Turn:
    """What a history has grown by: messages, of which the model has generated the last one."""

    digest: bytes
    """Of the whole history."""
    previous: Turn | None
    messages: tuple[dict[str, Any], ...]
    """Since the previous turn; none in a plain text, nor where a program only branches."""
    digests: tuple[bytes, ...]
    """Of the history up to each of the messages."""
    end: int
    """Messages of the whole history; of a plain text, characters."""
    program: Program
    job: int
    piece: Piece | None
    """None if nothing was generated: then its text is tokenised anew."""
    plain: bool = False
    """The history is a plain text."""
    used: float = 0.0
    followers: int = 0
    """Turns and running requests that build on it."""
    size: int = OVERHEAD
    """Bytes it takes, about, with its piece."""

    def __post_init__(self) -> None:
        self.size += self.piece.size if self.piece is not None else 0

    @property
    def answer(self) -> dict[str, Any] | None:
        """The message that the model has generated, if there is one."""
        return self.messages[-1] if self.messages and self.messages[-1]["role"] == "assistant" else None

    def history(self) -> list[Turn]:
        """Return all turns of the history, this one the last."""
        return _chain(self, lambda turn: turn.previous)

    def pieces(self) -> list[Piece]:
        """Return the tokens of the history, as far as they are known."""
        last: Turn | None = self
        while last is not None and last.piece is None:
            last = last.previous
        return last.piece.chain() if last is not None and last.piece is not None else []


def ids_of(pieces: Sequence[Piece]) -> list[int]:
    """Return the tokens of pieces that follow on each other."""
    ids: list[int] = []
    for piece in pieces:
        del ids[len(ids) - piece.undo :]
        ids += piece.ids
    return ids


def _chain(last: T, before: Callable[[T], T | None]) -> list[T]:
    found: list[T] = []
    one: T | None = last
    while one is not None:
        found.append(one)
        one = before(one)
    return found[::-1]


class Owner:
    """The turns and programs of one owner. A program is here while a request of it runs, or it has a turn.

    Args:
        name: of the owner.
        resized: called with the bytes that come in, or, below zero, go.
    """

    def __init__(self, name: str, resized: Callable[[int], None]) -> None:
        self.name = name
        self._resized = resized
        self.programs: dict[str, Program] = {}
        self.size = 0
        self.count = 0
        self.text_ends: dict[int, int] = {}
        """Characters of a known plain text -> how many texts have as many; the newest is the last."""
        self.leaves: OrderedDict[Turn, None] = OrderedDict()
        """Turns on which nothing builds, as they were used, the longest unused first."""
        self._by_digest: dict[bytes, list[Turn]] = {}

    def at(self, digest: bytes) -> Sequence[Turn]:
        """Return the turns that end a history of this digest, in the order in which they ended."""
        return self._by_digest.get(digest, ())

    def add(self, turn: Turn) -> None:
        """Take in a new turn, the newest of its program."""
        if turn.previous is not None:
            self.hold(turn.previous)
        alike = self._by_digest.setdefault(turn.digest, [])
        alike.append(turn)
        if len(alike) > MAX_ALIKE:
            del alike[0]
        self.leaves[turn] = None
        self._count(turn, 1)
        turn.program.tip = turn

    def hold(self, turn: Turn) -> None:
        """Something builds on the turn: it stays."""
        turn.followers += 1
        self.leaves.pop(turn, None)

    def release(self, turn: Turn, now: float) -> None:
        """Something that was built on the turn does so no longer; it has been used until now."""
        turn.followers -= 1
        turn.used = now
        if not turn.followers:
            self.leaves[turn] = None
            if turn.program.forgotten:
                self.evict(turn)

    def evict(self, turn: Turn) -> None:
        """Forget a turn on which nothing builds. The one before it is the next to go unless something builds on it."""
        last: Turn | None = turn
        while last is not None:
            before = last.previous
            self._remove(last)
            if before is not None:
                before.followers -= 1
                if not before.followers:
                    self.leaves[before] = None
                    self.leaves.move_to_end(before, last=False)
            last = before if before is not None and before.program.forgotten and not before.followers else None

    def _remove(self, turn: Turn) -> None:
        del self.leaves[turn]
        alike = self._by_digest.get(turn.digest, [])
        if turn in alike:
            alike.remove(turn)
            if not alike:
                del self._by_digest[turn.digest]
        self._count(turn, -1)
        if turn.program.tip is turn:
            before = turn.previous
            turn.program.tip = before if before is not None and before.program is turn.program else None
            self.settle(turn.program)

    def of_session(self, session: str) -> list[Program]:
        """Return the programs of a session, or the one of that name."""
        return [program for program in self.programs.values() if session in (program.session, program.name)]

    def forget(self, programs: Sequence[Program]) -> None:
        """Forget programs, and their turns as soon as no others build on them."""
        for program in programs:
            self.programs.pop(program.name, None)
            program.forgotten, program.tip = True, None
        for turn in [turn for turn in self.leaves if turn.program.forgotten]:
            self.evict(turn)

    def _count(self, turn: Turn, sign: int) -> None:
        self.size += sign * turn.size
        self.count += sign
        self._resized(sign * turn.size)
        if turn.plain and (texts := self.text_ends.pop(turn.end, 0) + sign):
            self.text_ends[turn.end] = texts

    def settle(self, program: Program) -> None:
        """Forget a program that neither runs nor has a turn."""
        if not program.busy and program.tip is None and self.programs.get(program.name) is program:
            del self.programs[program.name]


class Owners:
    """The turns of all owners, bounded in bytes, in number for each owner, and in the time they go unused.

    Args:
        max_bytes: of all turns; above it, the owner who takes most loses the longest unused ones.
        max_turns: of one owner.
        ttl_s: seconds after which an unused turn is forgotten.
    """

    def __init__(self, max_bytes: int, max_turns: int, ttl_s: float):
        self._max_bytes, self._max_turns, self._ttl_s = max_bytes, max_turns, ttl_s
        self._owners: OrderedDict[str, Owner] = OrderedDict()
        """By name, the longest unused first."""
        self.size = 0
        """Bytes that all turns take, about."""

    def get(self, name: str, now: float) -> Owner:
        """Drop turns whose time is over, and find the turns of an owner; who has none is not remembered for it."""
        owner = self._owners.get(name)
        if owner is not None:
            self._owners.move_to_end(name)
            self._expire(owner, now)
        for other in [*itertools.islice(self._owners.values(), SWEPT)]:  # the next ones have been unused for less long
            if other is owner or (other.leaves and next(iter(other.leaves)).used + self._ttl_s >= now):
                break
            self._expire(other, now)
            if other.name in self._owners and not other.leaves:  # all of it is in use
                self._owners.move_to_end(other.name)
        return self._owners.get(name) or Owner(name, self._resized)

    def all(self, scope: str) -> list[Owner]:
        """Owners whose names begin so."""
        return [owner for name, owner in self._owners.items() if name.startswith(scope)]

    def keep(self, owner: Owner) -> None:
        """Remember an owner, who begins a request."""
        self._owners[owner.name] = owner

    def bound(self, owner: Owner) -> None:
        """Forget turns until all bounds hold or everything left is in use: of ``owner``, if it takes its share.

        Otherwise the owner pays who takes most of those that have been unused for longest.
        """
        while owner.count > self._max_turns and owner.leaves:
            owner.evict(next(iter(owner.leaves)))
        payer = owner
        while self.size > self._max_bytes:
            if not payer.leaves or payer.size * len(self._owners) < self.size:
                others = itertools.islice((one for one in self._owners.values() if one.leaves), SWEPT)
                if (largest := max(others, key=lambda one: one.size, default=None)) is None:
                    break
                payer = largest
            payer.evict(next(iter(payer.leaves)))
            self.settle(payer)
        self.settle(owner)

    def settle(self, owner: Owner) -> None:
        """Forget an owner who has nothing."""
        if not owner.count and not owner.programs and self._owners.get(owner.name) is owner:
            del self._owners[owner.name]

    def _resized(self, size: int) -> None:
        self.size += size

    def _expire(self, owner: Owner, now: float) -> None:
        while owner.leaves and (oldest := next(iter(owner.leaves))).used + self._ttl_s < now:
            owner.evict(oldest)
        self.settle(owner)
