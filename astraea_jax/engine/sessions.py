"""Calls about the sessions of an engine, from any thread: checked here, then posted to the serving loop."""

from __future__ import annotations

import asyncio
import queue
from collections.abc import Collection, Sequence
from concurrent.futures import Future
from typing import TypeVar

import numpy as np

from astraea_jax.engine.answers import refuse
from astraea_jax.engine.config import EngineConfig
from astraea_jax.engine.events import (
    AskHeld,
    Cancel,
    EndSession,
    Event,
    Fork,
    Key,
    LetGo,
    Look,
    Question,
    ReplaceTail,
    TakeOver,
    Waits,
    checked_hand_over,
    checked_key,
    checked_name,
    checked_prompt,
    checked_wait,
)
from astraea_jax.engine.generation import Generation, Mailbox
from astraea_jax.engine.layout import Layout
from astraea_jax.engine.lifecycle import Lifecycle, State
from astraea_jax.engine.loop import ServingLoop
from astraea_jax.errors import EngineDead, Overloaded
from astraea_jax.models.config import ModelConfig
from astraea_jax.scheduler.handover import HandOver
from astraea_jax.scheduler.prefix import hash_blocks, salted
from astraea_jax.scheduler.preparation import PREPARED
from astraea_jax.scheduler.scheduler import Scheduler
from astraea_jax.scheduler.view import Held, ProgramView
from astraea_jax.scheduler.wait import Wait

MAX_EVENTS = 65_536
"""Events that may wait for the loop; beyond that, whatever is not a request is refused."""


T = TypeVar("T")


class Sessions:
    """The part of an engine that speaks of sessions; see :class:`~.engine.Engine`."""

    config: EngineConfig
    model_config: ModelConfig
    layout: Layout
    _life: Lifecycle
    _loop: ServingLoop
    _scheduler: Scheduler

    def end_session(self, session: str, *, owner: str = "") -> None:
        """End a program: its KV is dropped, its request cancelled. Unknown sessions are ignored.

        Raises:
            RequestError, Overloaded: the name cannot be one; too many events wait.
        """
        self._post_bounded(EndSession(checked_key(session, owner)))

    def waits(self, session: str, wait: Wait, *, owner: str = "") -> None:
        """Say what a program waits for whose request has ended: tools, or a human, and for how long if that is known.

        The scheduler learns its times, and lets the KV of those go first that wait longest. What is said last counts.
        Unknown sessions, and those with a request in progress, are ignored.

        Raises:
            RequestError, Overloaded: a name cannot be one, or a time is no number; too many events wait.
        """
        self._post_bounded(Waits(checked_key(session, owner), checked_wait(wait)))

    def tool_called(self, session: str, tool: str, *more: str, owner: str = "") -> None:
        """Say which tools a program waits for, called together: :meth:`waits` without hints, with the same errors."""
        self.waits(session, Wait((tool, *more)), owner=owner)

    def fork(self, session: str, child: str, *, owner: str = "") -> Future[None]:
        """Ask for a session that shares what another has computed, as a sub-agent or a second attempt does.

        The child waits for its first request, takes part in its parent's job, and has its owner and salt. From then on
        each goes on, and ends, by itself. Of a parent whose request runs it has what is computed by now.

        Returns:
            A future that raises RequestError if the parent is not known (any more) or the child's name is taken, and
            Overloaded if there are too many sessions. Whoever waits for it needs a limit of its own.

        Raises:
            RequestError, EngineDead, Overloaded: a name cannot be one; no loop runs; too many events wait.
        """
        answer: Future[None] = Future()
        return self._ask(Fork(answer, checked_key(session, owner), checked_key(child, owner)))

    async def replace_tail(self, session: str, prompt: Sequence[int], *, owner: str = "", salt: str = "") -> bool:
        """Have the next prompt of a waiting session computed ahead, such as that of a history that was compacted.

        Only what differs is computed, while no request waits for the device. The session's wait goes on, and its next
        request that begins with this prompt finds it. That may come at any time, and takes over what is computed by
        then. From the first step on, what the session had beyond the common beginning is given up.

        Returns:
            True once all is computed, False if the session's next request, or another tail, came first.

        Raises:
            RequestError: an argument is not what it should be, or the session is not known (any more).
            Overloaded: the session has a request in progress; or as for :meth:`~.engine.Engine.generate`.
            StepFailed, EngineDead: a step has failed, so try again; not serving.
        """
        key, salt = checked_key(session, owner), checked_name("cache salt", salt, empty=True)
        ids = checked_prompt(prompt, 1, self.layout.max_context, self.model_config.vocab_size)
        mailbox = Mailbox(asyncio.get_running_loop())
        self._life.accept(mailbox, key[0])
        self._post(ReplaceTail(mailbox, ids, key, salt))
        reasons = [delta.finish_reason async for delta in Generation(mailbox, self._cancel)]
        return reasons[-1] == PREPARED

    def held(
        self, prompt: Sequence[int], *, salt: str = "", session: str | None = None, owner: str = ""
    ) -> Future[Held]:
        """Ask how much of a prompt a request would find computed if it came now, and where.

        Hashing a long prompt takes milliseconds, in the caller's thread.

        Args:
            prompt: token ids.
            salt: as for :meth:`~.engine.Engine.generate`.
            session: the session that would ask; None, or one that is not known: a new one.
            owner: whose session it is.

        Raises:
            RequestError, EngineDead, Overloaded: not a prompt or a name; no loop runs; too many events wait.
        """
        key = None if session is None else checked_key(session, owner)
        salt = checked_name("cache salt", salt, empty=True)
        ids = checked_prompt(prompt, 1, self.layout.max_context, self.model_config.vocab_size)
        hashes = hash_blocks(np.array(ids, np.int32), self.config.page_size, salted(salt))
        answer: Future[Held] = Future()
        return self._ask(AskHeld(answer, ids, tuple(hashes), key, salt))

    def look(self, limit: int, owner: str | None = None) -> Future[list[ProgramView]]:
        """Ask for a picture of up to ``limit`` live programs, those with a request first; None: of all owners.

        Whoever waits for the answer needs a limit of its own: an engine whose device hangs gives none for a while.

        Raises:
            RequestError, EngineDead, Overloaded: not an owner's name; no loop runs; too many events wait.
        """
        answer: Future[list[ProgramView]] = Future()
        return self._ask(Look(answer, limit, None if owner is None else checked_name("owner", owner, empty=True)))

    def knows(self, session: str, *, owner: str = "") -> bool:
        """Whether there is a session of that name, as of the last event that the loop has taken in."""
        return self._scheduler.knows(checked_key(session, owner))

    def ended(self, since: float) -> list[Key]:
        """Return the sessions that have ended since that time of the monotonic clock, and that are not known again.

        Those that have expired, or moved, are left out, and of very many the oldest ones.
        """
        return [key for key in self._scheduler.ended(since) if isinstance(key, tuple)]

    def hand_over(self, sessions: Collection[Key] | None = None) -> Future[list[HandOver]]:
        """Let waiting sessions go, up to :data:`~.answers.MAX_HANDED` at once, so that other replicas go on with them.

        They are known here no longer, and nothing is learned from their jobs. Sessions with a request in progress stay.

        Args:
            sessions: those that go; None: whoever waits, and first whose wait began last.

        Raises:
            EngineDead, Overloaded: no loop runs; too many events wait.
        """
        answer: Future[list[HandOver]] = Future()
        return self._ask(LetGo(answer, None if sessions is None else tuple(sessions)))

    def take_over(self, handed: HandOver) -> Future[None]:
        """Take over a session that another replica has let go: it waits, and its tokens are computed in idle time.

        Returns:
            A future that raises RequestError if the session is known here already, Overloaded if there are too many.

        Raises:
            RequestError, EngineDead, Overloaded: it cannot be one of this model; no loop runs; too many events wait.
        """
        handed = checked_hand_over(handed, self.layout.max_context, self.model_config.vocab_size)
        answer: Future[None] = Future()
        return self._ask(TakeOver(answer, handed))

    # -- posting ---------------------------------------------------------------------------------------------

    def _cancel(self, mailbox: Mailbox) -> None:
        self._post(Cancel(mailbox))

    def _post(self, event: Event) -> None:
        self._loop.events.put(event)

    def _post_bounded(self, event: Event) -> None:
        if self._loop.events.qsize() >= MAX_EVENTS:
            raise Overloaded("too many events wait for the serving loop; try again later")
        if not self._is_dead():
            self._post(event)

    def _ask(self, question: Question[T]) -> Future[T]:
        if self._life.state not in (State.SERVING, State.DRAINING):
            raise EngineDead(f"an engine that is {self._life.state.value} knows no session")
        self._post_bounded(question)
        if self._is_dead():  # perhaps since before it was posted
            self._refuse_questions("the engine has ended")
        return question.answer

    def _is_dead(self) -> bool:
        return self._life.state is State.DEAD

    def _refuse_questions(self, reason: str) -> None:
        """Answer what has been asked, and what the loop will never come to."""
        while True:
            try:
                event = self._loop.events.get_nowait()
            except queue.Empty:
                return
            if isinstance(event, Question):
                refuse(event, reason)
