"""Sessions as their clients see and change them between requests: both front doors offer the same."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

from astraea_jax.agents.opened import Continuation
from astraea_jax.engine.encoding import LONG_TEXT, checked_ids
from astraea_jax.errors import Overloaded
from astraea_jax.frontends.http.tenants import Tenant
from astraea_jax.frontends.programs import Programs, scope_of
from astraea_jax.scheduler.view import Held, ProgramView

T = TypeVar("T")

ANSWER_S = 30.0
"""Seconds that an engine has to answer a question: its device may hang."""


@dataclass(frozen=True)
class Look:
    """What a request would reuse."""

    known: Continuation
    program: str | None
    """Program that it would go on with; None: a new one."""
    held: Held


class Sessions:
    """What can be asked about sessions, and done with them. All of it runs in the server's event loop.

    Args:
        programs: begin and end their turns.
    """

    def __init__(self, programs: Programs):
        self._programs = programs
        self._engine, self._conversations = programs.engine, programs.conversations

    async def look(
        self,
        tenant: Tenant,
        session: str | None,
        messages: Sequence[Any],
        tools: Sequence[Any] | None,
        template_arguments: Mapping[str, Any],
        *,
        characters: int,
    ) -> Look:
        """Say what a chat of about so many ``characters`` would reuse if it came now, without queueing it.

        Raises:
            RequestError, CheckpointError, Overloaded, EngineDead: as :meth:`open_chat`; the engine does not answer.
        """
        look = partial(self._conversations.look, scope_of(tenant), session, messages, tools, template_arguments)
        ask = partial(self._engine.held, salt=tenant.salt, owner=tenant.owner)

        def looked() -> tuple[Continuation, str | None, Future[Held]]:
            known, program = look()
            checked_ids(known.prompt, self._engine.layout.max_context)
            return known, program, ask(known.prompt, session=program or session)

        known, program, held = await self._programs.made(tenant, characters, looked)
        return Look(known, program, await self._answered(held))

    async def fork(self, tenant: Tenant, session: str, child: str) -> None:
        """Open a session that begins where another one is, and shares its KV.

        Raises:
            RequestError, Overloaded, EngineDead: see :meth:`astraea_jax.engine.engine.Engine.fork`.
        """
        scope = scope_of(tenant)
        known = session in self._conversations.programs(scope, session)  # those of clients that send tokens are not
        if known:
            self._conversations.fork(scope, session, child)
        try:
            await self._answered(self._engine.fork(session, child, owner=tenant.owner))
        except BaseException:
            if known:
                self._conversations.forget(scope, child)
            raise

    async def replace_tail(
        self, tenant: Tenant, session: str, keep: int, messages: Sequence[Any] | None, tokens: Sequence[int] | None
    ) -> tuple[int, bool]:
        """Replace the end of a session's history, and have its next prompt computed in idle time.

        Args:
            tenant: whose session it is.
            session: its name.
            keep: messages at the beginning of its history that stay.
            messages: come after these.
            tokens: the whole prompt, of a client that sends tokens; instead of ``messages``.

        Returns:
            The tokens of the prompt, and whether they were computed before the session's next request came.

        Raises:
            RequestError, Overloaded, StepFailed, EngineDead: the session is not known or runs a request; see
                :meth:`astraea_jax.engine.engine.Engine.replace_tail`.
        """
        if tokens is None:
            make = partial(self._conversations.replace, scope_of(tenant), session, keep, messages or ())
            prompt = await self._programs.made(tenant, LONG_TEXT + len(str(messages)), make)
        else:
            prompt = [*tokens]
        checked_ids(prompt, self._engine.layout.max_context)
        computed = await self._engine.replace_tail(session, prompt, owner=tenant.owner, salt=tenant.salt)
        return len(prompt), computed

    async def show(self, tenant: Tenant, session: str) -> list[ProgramView]:
        """Return pictures of the programs of a session; none: it is not known.

        Raises:
            RequestError, EngineDead, Overloaded: see :meth:`astraea_jax.engine.engine.Engine.look`.
        """
        names = {session, *self._conversations.programs(scope_of(tenant), session)}
        limit = self._engine.config.max_programs
        views = [await self._answered(replica.look(limit, tenant.owner)) for replica in self._engine.replicas]
        return [view for of_one in views for view in of_one if view.key in {(tenant.owner, name) for name in names}]

    def hint(self, tenant: Tenant, session: str | None, calls: Sequence[str], expected_s: float | None) -> int:
        """Say how long the wait will be that programs are in now; returns how many programs are told.

        Args:
            tenant: whose programs they are.
            session: its programs; None: those of ``calls``.
            calls: ids of tool calls; programs that have made one of them.
            expected_s: None: nothing is known.
        """
        found = self._programs.waits.find(tenant.owner, session, calls)
        for waiting in found:
            self._programs.tell(tenant.owner, waiting.program, replace(waiting.wait, expected_s=expected_s))
        return len(found)

    async def _answered(self, answer: Future[T]) -> T:
        try:
            return await asyncio.wait_for(asyncio.wrap_future(answer), ANSWER_S)
        except TimeoutError:
            raise Overloaded(f"the engine has not answered within {ANSWER_S:.0f} s; try again later") from None
