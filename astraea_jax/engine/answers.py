"""Answers of the serving loop to what callers ask about sessions."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from typing import Any

from astraea_jax.engine.events import AskHeld, Fork, LetGo, Look, Question, TakeOver
from astraea_jax.errors import EngineDead, Overloaded, RequestError
from astraea_jax.scheduler.handover import HandOver
from astraea_jax.scheduler.prefix import salted
from astraea_jax.scheduler.program import QueueFull, Rejected
from astraea_jax.scheduler.scheduler import Scheduler

MAX_HANDED = 64
"""Sessions that are let go at once, since the loop copies all their tokens."""


def answer(question: Question[Any], scheduler: Scheduler, now: float) -> None:
    """Answer a question, unless whoever asked has given up."""
    find: Callable[[], Any]
    match question:
        case Fork(_, session, child):
            find = partial(scheduler.branches.fork, session, child, now)
        case AskHeld(_, prompt, hashes, session, salt):
            find = partial(scheduler.branches.held, prompt, hashes, program=session, salt=salted(salt))
        case LetGo(_, sessions):
            find = partial(scheduler.branches.hand_over, MAX_HANDED, sessions)
        case TakeOver(_, handed):
            find = partial(_take_over, scheduler, handed, now)
        case Look(_, limit, owner):
            find = partial(scheduler.look, limit, owner, now)
        case _:
            raise TypeError(f"nobody answers a {type(question).__name__}")
    asked: Future[Any] = question.answer
    if asked.set_running_or_notify_cancel():
        try:
            asked.set_result(find())
        except (Rejected, QueueFull) as error:
            asked.set_exception(refusal(error))


def _take_over(scheduler: Scheduler, handed: HandOver, now: float) -> None:
    scheduler.branches.take_over(handed, now)


def refuse(question: Question[Any], reason: str) -> None:
    """Answer a question that the engine has not come to before it died."""
    if question.answer.set_running_or_notify_cancel():
        question.answer.set_exception(EngineDead(reason))


def refusal(error: Rejected | QueueFull) -> RequestError | Overloaded:
    """Return what a caller is told whom the scheduler refuses."""
    return (RequestError if isinstance(error, Rejected) else Overloaded)(str(error))
