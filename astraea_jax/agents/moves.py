"""Histories of programs that move to another process, as plain data: what they mean, and the tokens that they have."""

from __future__ import annotations

import itertools
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from astraea_jax.agents.turns import Owner, Piece, Program, Turn


@dataclass(frozen=True)
class PieceRecord:
    """A :class:`~.turns.Piece`."""

    base: int | None
    """Number of the piece before it, in the history; None: it is the first."""
    text: str
    ids: tuple[int, ...]
    stop: str | None
    end: int
    job: int
    whole: bool
    rendered: str | None
    undo: int


@dataclass(frozen=True)
class TurnRecord:
    """A :class:`~.turns.Turn`."""

    digest: bytes
    messages: tuple[dict[str, Any], ...]
    digests: tuple[bytes, ...]
    end: int
    job: int
    piece: int | None
    """Number of its piece, in the history."""
    plain: bool
    size: int


@dataclass(frozen=True)
class History:
    """The turns of a program, the first one first. Jobs have numbers that mean something in here only."""

    owner: str
    """Whose conversation it is."""
    program: str
    session: str | None
    parent: str | None
    setting: str
    turns: tuple[TurnRecord, ...]
    pieces: tuple[PieceRecord, ...]


def history_of(owner: Owner, program: Program) -> History | None:
    """Return the history of a program; None if it has none."""
    if program.tip is None:
        return None
    turns = program.tip.history()
    numbers: dict[Piece, int] = {}
    for piece in itertools.chain.from_iterable(turn.piece.chain() for turn in turns if turn.piece is not None):
        numbers.setdefault(piece, len(numbers))
    pieces = [
        PieceRecord(
            None if piece.base is None else numbers[piece.base],
            *(piece.text, tuple(piece.ids), piece.stop, piece.end),
            *(piece.job, piece.whole, piece.rendered, piece.undo),
        )
        for piece in numbers
    ]
    records = [
        TurnRecord(
            *(turn.digest, turn.messages, turn.digests, turn.end, turn.job),
            None if turn.piece is None else numbers[turn.piece],
            *(turn.plain, turn.size),
        )
        for turn in turns
    ]
    names = (owner.name, program.name, program.session, program.parent, program.setting)
    return History(*names, tuple(records), tuple(pieces))


def add_history(owner: Owner, history: History, jobs: Iterator[int], now: float) -> None:
    """Give an owner a program and its history. Turns that it has already, of other programs, are shared.

    Args:
        owner: who has no program of that name.
        history: of another process.
        jobs: numbers for its jobs.
        now: seconds.
    """
    program = Program(history.program, history.session, history.parent, setting=history.setting)
    owner.programs[program.name] = program
    renumbered = {job: next(jobs) for job in dict.fromkeys(turn.job for turn in history.turns)}
    pieces: list[Piece] = []
    for one in history.pieces:
        job = renumbered.get(one.job, 0)  # of no turn that is known
        base = None if one.base is None else pieces[one.base]
        ids = array("i", one.ids)
        pieces.append(Piece(base, one.text, ids, one.stop, one.end, job, one.whole, one.rendered, one.undo))
    previous: Turn | None = None
    for record in history.turns:
        piece = None if record.piece is None else pieces[record.piece]
        known = [turn for turn in owner.at(record.digest) if turn.previous is previous and _same(turn.piece, piece)]
        if known and record is not history.turns[-1]:
            previous = known[0]
            continue
        turn = Turn(
            *(record.digest, previous, record.messages, record.digests, record.end, program),
            *(renumbered[record.job], piece, record.plain, now),
        )
        turn.size = record.size
        owner.add(turn)
        previous = turn


def _same(one: Piece | None, other: Piece | None) -> bool:
    return (None if one is None else one.ids) == (None if other is None else other.ids)
