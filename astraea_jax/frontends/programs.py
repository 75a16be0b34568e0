"""Programs as both front doors begin and end their turns: whose next turn it is, its tokens, and the wait after it."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from astraea_jax.agents.continuity import Mode
from astraea_jax.agents.conversations import Conversations
from astraea_jax.agents.loop import called_tools
from astraea_jax.agents.moves import History
from astraea_jax.agents.opened import Continuation, Opened
from astraea_jax.agents.tool_calls import ToolCall
from astraea_jax.engine.encoding import DOORS, check_length, checked_ids
from astraea_jax.engine.generation import Generation
from astraea_jax.engine.interface import Serving
from astraea_jax.engine.sampling import SamplingParams
from astraea_jax.errors import EngineDead, Overloaded, RequestError
from astraea_jax.frontends.hints import NO_HINTS, Hints
from astraea_jax.frontends.http.tenants import Tenant
from astraea_jax.frontends.waits import Waiting, Waits
from astraea_jax.models.config import CheckpointError
from astraea_jax.scheduler.handover import HandOver
from astraea_jax.scheduler.wait import Wait

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Opening:
    """A request whose prompt is made, and whose program is known. Whoever holds it hands it to :meth:`Programs.end`."""

    tenant: Tenant
    prompt: Sequence[int]
    session: str | None
    """The client's name for the session."""
    program: str | None
    """Name of the program; None: it is one of a single request."""
    parent: str | None = None
    """Program that it branches from, or is a child of."""
    begins_job: bool = False
    opened: Opened | None = None
    """The conversation; None: the client has sent tokens."""

    @property
    def report(self) -> Continuation | None:
        """How much of the prompt was known."""
        return None if self.opened is None else self.opened.report


@dataclass(frozen=True)
class End:
    """How a turn has ended."""

    reason: str
    """A finish reason, or ``"cancelled"``."""
    output_ids: Sequence[int] = ()
    message: Mapping[str, Any] | str | None = None
    """What the client was given: a message, or a text."""
    whole: bool = True
    """Whether it was given all that was generated."""
    calls: Sequence[ToolCall] | None = ()
    """Calls that somebody runs now; none: the job has ended; None: nobody knows what the text means."""
    final: bool = False
    """Whether the program has ended with this turn."""


@dataclass(frozen=True)
class Moving:
    """A program that moves to another process: its tokens, and what they mean, so that its turns continue there."""

    program: HandOver
    history: History | None
    """None: its client has sent tokens, or nobody knows what they mean any more."""


class Programs:
    """Begins and ends turns. All of it runs in the server's event loop; prompts are made in the pool of the doors.

    Args:
        engine: runs the programs.
        conversations: recognises and continues them.
    """

    def __init__(self, engine: Serving, conversations: Conversations | None = None):
        self.engine = engine
        self.conversations = conversations or conversations_of(engine)
        self.continued: Counter[str] = Counter()
        """Requests by why the known part of their prompt ended."""
        self.waits = Waits()
        self._busy: set[tuple[str, str]] = set()
        """Owner and name of programs with a request in progress."""

    async def open_chat(
        self,
        tenant: Tenant,
        session: str | None,
        messages: Sequence[Any],
        tools: Sequence[Any] | None,
        template_arguments: Mapping[str, Any],
        *,
        characters: int,
        parent: str | None = None,
    ) -> Opening:
        """Open the next turn of a conversation, which has about so many ``characters``.

        A chat without a name and without tools is a program only once it goes on: most never do.

        Raises:
            RequestError, CheckpointError: it cannot be rendered or tokenised, or exceeds the context.
            Overloaded: too much text waits to be tokenised.
        """
        begin = partial(self.conversations.begin, scope_of(tenant), session, messages, tools, template_arguments)
        opened = await self._opened(tenant, characters, begin)
        return self._opening(tenant, session, parent, opened, comes_back=bool(tools))

    async def open_text(
        self, tenant: Tenant, session: str | None, text: str, *, add_bos: bool, parent: str | None = None
    ) -> Opening:
        """Open what follows a text.

        Raises:
            RequestError: it cannot be tokenised, or exceeds the context.
            Overloaded: too much text waits to be tokenised.
        """
        check_length(self.engine.tokenizer, len(text), self.engine.layout.max_context)
        begin = partial(self.conversations.begin_text, scope_of(tenant), session, text, add_bos)
        opened = await self._opened(tenant, len(text), begin)
        return self._opening(tenant, session, parent, opened, comes_back=False)

    def open_tokens(
        self, tenant: Tenant, session: str | None, prompt: Sequence[int], *, parent: str | None = None
    ) -> Opening:
        """Open what follows tokens, which nobody looks at."""
        return Opening(tenant, prompt, session, session, parent)

    def generate(
        self, opening: Opening, params: SamplingParams, *, final: bool = False, priority: int = 0, first: bool = True
    ) -> tuple[Generation, str | None]:
        """Queue the request of an opening; returns its generation, and the program in which it runs.

        Args:
            opening: the request.
            params: its sampling.
            final: the program ends with it.
            priority: see :meth:`astraea_jax.engine.engine.Engine.generate`.
            first: it is the first choice of its request; all others are programs of their own.

        Raises:
            RequestError, Overloaded, EngineDead: see :meth:`astraea_jax.engine.engine.Engine.generate`.
        """
        owner, program = opening.tenant.owner, opening.program
        if not first or program is None or (owner, program) in self._busy:
            program = None
        elif opening.begins_job and (left := self.waits.end(owner, program)) is not None and not left.wait.human:
            self.tell(owner, program, Wait())  # its tools will not be answered any more
        generation = self.engine.generate(
            opening.prompt,
            params,
            session=program,
            final=final,
            salt=opening.tenant.salt,
            owner=owner,
            parent=opening.parent,
            priority=priority,
        )
        if program is not None:
            self.waits.end(owner, program)
            self._busy.add((owner, program))
        return generation, program

    def end(self, opening: Opening, program: str | None, end: End, hints: Hints = NO_HINTS) -> None:
        """End the turn of an opening: its conversation learns it, and its program begins to wait.

        Args:
            opening: the request.
            program: in which it ran, as :meth:`generate` has returned it.
            end: how it has ended.
            hints: what the client has said of the wait that begins.
        """
        owner = opening.tenant.owner
        if opening.opened is not None:
            opening.opened.ended(end.output_ids, end.message, end.reason, whole=end.whole)
        if program is None:
            return
        self._busy.discard((owner, program))
        if end.final:
            with suppress(Overloaded, EngineDead):  # what is left will expire
                self.end_session(opening.tenant, opening.session or program)
        elif end.message is not None and end.calls is not None:
            tools = called_tools(call.name for call in end.calls)
            wait = Wait(tools, hints.expected_of(tools), hints.keep_s)
            calls = frozenset(call.id for call in end.calls)
            self.waits.begin(owner, Waiting(program, opening.session, wait, calls))
            self.tell(owner, program, wait)

    def end_session(self, tenant: Tenant, session: str) -> None:
        """End a session and forget its conversations; unknown ones are ignored.

        Raises:
            RequestError, Overloaded: see :meth:`astraea_jax.engine.engine.Engine.end_session`.
        """
        for program in {session, *self.conversations.forget(scope_of(tenant), session)}:
            self.waits.end(tenant.owner, program)
            self.engine.end_session(program, owner=tenant.owner)

    async def hand_over(self) -> list[Moving]:
        """Let programs that wait go, so that another process goes on with them; call it again until there are none.

        Raises:
            EngineDead, Overloaded: see :meth:`astraea_jax.engine.engine.Engine.hand_over`.
        """
        moving = []
        for handed in await asyncio.wrap_future(self.engine.hand_over()):
            assert isinstance(handed.key, tuple)
            owner, name = handed.key
            self.waits.end(owner, name)
            moving.append(Moving(handed, self.conversations.let_go(f"{owner}\n", name)))
        return moving

    async def take_over(self, moving: Moving) -> None:
        """Go on with a program of another process; its tokens are computed when there is time.

        Raises:
            RequestError, EngineDead, Overloaded: see :meth:`astraea_jax.engine.engine.Engine.take_over`; its next
                request is computed anew then, from the true tokens all the same.
        """
        if moving.history is not None:
            self.conversations.take_over(moving.history)
        await asyncio.wrap_future(self.engine.take_over(moving.program))

    def tell(self, owner: str, program: str, wait: Wait) -> None:
        """Say what a program waits for, unless the engine has too much to do to learn from it."""
        with suppress(Overloaded, EngineDead):
            self.engine.waits(program, wait, owner=owner)

    async def _opened(self, tenant: Tenant, characters: int, begin: Callable[[], Opened]) -> Opened:
        def checked() -> Opened:
            opened = begin()
            checked_ids(opened.prompt, self.engine.layout.max_context)
            return opened

        return await self.made(tenant, characters, checked)

    async def made(self, tenant: Tenant, characters: int, make: Callable[[], T]) -> T:
        """Return ``make()``, which tokenises about so many characters, computed in the pool of the doors.

        Raises:
            RequestError, CheckpointError: it cannot be tokenised.
            Overloaded: too much text waits.
        """
        try:
            return await DOORS.run(tenant.owner, characters, make)
        except (RequestError, CheckpointError):
            raise
        except (TypeError, ValueError) as error:
            raise RequestError(str(error)) from error

    def _opening(
        self, tenant: Tenant, session: str | None, parent: str | None, opened: Opened, *, comes_back: bool
    ) -> Opening:
        self.continued[opened.report.why] += 1
        known = opened.report.why not in ("new", "off")
        program = opened.program if session or comes_back or known else None
        above = opened.parent or self._working(tenant.owner, parent)
        return Opening(
            tenant, opened.prompt, session, program, above if above != program else None, opened.begins_job, opened
        )

    def _working(self, owner: str, session: str | None) -> str | None:
        """The program of a session that waits for tools, of which a child is one; the session's first if none does."""
        waiting = [one.program for one in self.waits.find(owner, session) if one.wait.tools] if session else []
        return waiting[-1] if waiting else session


def conversations_of(engine: Serving, mode: Mode = "job", *, normalise: bool = True) -> Conversations:
    """Return conversations that live as long as the engine's sessions, and refuse what exceeds its context early."""
    room, ttl_s = engine.layout.max_context, engine.config.session_ttl_s
    return Conversations(engine.tokenizer, mode, normalise=normalise, ttl_s=ttl_s, max_context=room)


def scope_of(tenant: Tenant) -> str:
    """Whose conversations are recognised: tenants and salts that share no KV share no history either."""
    return f"{tenant.owner}\n{tenant.salt}"
