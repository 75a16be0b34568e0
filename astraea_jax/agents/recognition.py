"""Whose next request a history is: the longest beginning of it that is known, and the program that goes on with it."""

from __future__ import annotations

import itertools
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field

from astraea_jax.agents.meaning import Message, reasoning_of, restored
from astraea_jax.agents.turns import Owner, Program, Turn
from astraea_jax.engine.events import MAX_NAME


@dataclass(frozen=True)
class Match:
    """What is known of a history."""

    turn: Turn | None = None
    """The last turn of it that is known."""
    turns: Sequence[Turn] = field(default=())
    """All turns of it that are known."""
    differs: int | None = None
    """The first message that is another one than was known; None: there is none, or nothing was known."""

    def restored(self, messages: Sequence[Message]) -> list[Message]:
        """Return the history with the known turns as they were generated, thoughts included."""
        whole = [*messages]
        for turn in self.turns:
            if turn.answer is not None:
                whole[turn.end - 1] = restored(turn.answer, messages[turn.end - 1])
        return whole


def recognise(owner: Owner, session: str | None, messages: Sequence[Message], digests: Sequence[bytes]) -> Match:
    """Find the known turns of a history, which ends with something new, or with what has replaced its tail.

    Args:
        owner: has the turns.
        session: its name, if it has one; among turns of the same meaning those of its session come first.
        messages: the history.
        digests: of all its beginnings.
    """
    turn = next((found for digest in digests[::-1] if (found := best(owner.at(digest), session))), None)
    turns = turn.history() if turn else []
    for i, known in enumerate(turns):
        if known.answer is not None and not _same_thoughts(messages[known.end - 1], known.answer):
            before = turns[:i]
            return Match(before[-1] if before else None, before, known.end - 1)
    rival = turn.program if turn is not None else None if session is None else owner.programs.get(session)
    tip = None if rival is None or rival.tip is turn else rival.tip
    return Match(turn, turns, None if tip is None else _difference(tip, digests))


def best(turns: Sequence[Turn], session: str | None) -> Turn | None:
    """Of turns that mean the same, one of the session, if possible one that nobody has continued."""

    def rank(turn: Turn) -> tuple[bool, bool]:
        return turn.program.session == session, _open(turn)

    return max(reversed(turns), key=rank, default=None)


def program_of(owner: Owner, session: str | None, turn: Turn | None) -> Program:
    """Return the program of a request that follows ``turn``: that of the turn, or a new one."""
    if (program := waiting(session, turn)) is not None:
        return program
    parent = None if turn is None or turn.program.forgotten else turn.program.name
    program = Program(_free_name(owner, session), session, parent)
    owner.programs[program.name] = program
    return program


def waiting(session: str | None, turn: Turn | None) -> Program | None:
    """Return the program that waits at ``turn`` for its next request, if it may be this session's."""
    goes_on = turn is not None and _open(turn) and session in (None, turn.program.session)
    return turn.program if turn is not None and goes_on else None


def _open(turn: Turn) -> bool:
    """Return whether a program waits at this turn for its next request."""
    return turn.program.tip is turn and not turn.program.busy


def _free_name(owner: Owner, session: str | None) -> str:
    if session is None:
        return f"conversation-{secrets.token_hex(12)}"
    if session not in owner.programs:
        return session
    names = (f"{session[: MAX_NAME - 12]}/{number}" for number in itertools.count(2))
    return next(name for name in names if name not in owner.programs)


def _difference(tip: Turn, digests: Sequence[bytes]) -> int | None:
    known = (digest for turn in tip.history() for digest in turn.digests)
    return next((i for i, (one, other) in enumerate(zip(digests, known, strict=False)) if one != other), None)


def _same_thoughts(given: Message, held: Message) -> bool:
    """Return whether a client sent the thoughts of a turn back as they were, or none."""
    return reasoning_of(given) in ("", reasoning_of(held))
