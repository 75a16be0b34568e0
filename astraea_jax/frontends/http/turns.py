"""Turns of the model, whatever API asks for them: checked, rendered, tokenised, queued, and read as they come.

:meth:`Door.begin` takes a :class:`ChatRequest` and gives one :class:`Turn` for each choice that is asked for. A turn is
an async iterator of :class:`TurnDelta`, and afterwards says how it has ended. Whoever holds it no longer, or whose task
is cancelled, has cancelled its generation.

A conversation that ends with the assistant's own message is refused: to continue it (prefill) is not served.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from astraea_jax.agents.loop import joined
from astraea_jax.agents.reply import Part, Reply, ReplyReader
from astraea_jax.engine.encoding import encode_prompt
from astraea_jax.engine.generation import Delta, Generation, TokenLogprob, Usage
from astraea_jax.engine.interface import Serving
from astraea_jax.engine.sampling import SamplingParams
from astraea_jax.errors import EngineDead, Overloaded, RequestError
from astraea_jax.frontends.http.tenants import Tenant

MAX_CHOICES = 64
"""Choices of one request (``n``)."""
TAIL = 64
"""Tokens at the end of a prompt that are decoded to see whether it has opened a thought."""


@dataclass(frozen=True)
class Limits:
    """Bounds on what waits before the engine's own queue, and how long."""

    rendering: int = 64
    """Requests whose prompts are being rendered and tokenised at once."""
    queued_tokens: int | None = None
    """Prompt tokens of all choices that have not begun; None: 64 contexts."""
    wait_s: float = 300.0
    """Seconds until the first token of a turn; beyond that it is given up."""


@dataclass(frozen=True)
class ChatRequest:
    """A request for turns of the model, in no API's shape. Messages and tools are as OpenAI writes them."""

    messages: Sequence[Mapping[str, Any]]
    tenant: Tenant
    tools: Sequence[Mapping[str, Any]] = ()
    tool_choice: str = "auto"
    """``"auto"``, ``"none"``, ``"required"``, or the name of the tool that must be called."""
    parallel_calls: bool = True
    """Whether a turn may call several tools; if not, only the first call counts."""
    params: SamplingParams = field(default_factory=lambda: SamplingParams(max_tokens=2**31 - 1))
    """``max_tokens`` is a bound: what the context has left is one, too. Of several choices with a seed, each one has
    the seed of the previous one plus 1."""
    n: int = 1
    response_format: Mapping[str, Any] | None = None
    """``{"type": "json_object"}``, ``{"type": "json_schema", "schema": …}``, ``{"type": "regex", "regex": …}`` or
    ``{"type": "lark", "lark": …}``."""
    template_arguments: Mapping[str, Any] = field(default_factory=dict)
    session: str | None = None
    """Names the program. While it has a request in progress, another one is a program of its own."""
    final: bool = False
    """Whether the program ends with this request."""
    call_ids: Callable[[], str] = lambda: f"call_{secrets.token_hex(12)}"
    """Makes the ids of tool calls."""


@dataclass(frozen=True, slots=True)
class TurnDelta:
    """Output of a turn since its previous one."""

    parts: Sequence[Part]
    logprobs: tuple[TokenLogprob, ...]
    token_ids: tuple[int, ...]


class Turn:
    """One choice of a request: an async iterator of :class:`TurnDelta`. Iterating raises what went wrong."""

    def __init__(
        self,
        generation: Generation,
        reader: ReplyReader,
        wait_s: float,
        on_begin: Callable[[], None],
        on_end: Callable[[Turn], None],
    ):
        self._generation = generation
        self._reader = reader
        self._wait_s = wait_s
        self._on_begin, self._on_end = on_begin, on_end
        self._begun = self._over = False
        self.finish_reason: str | None = None
        """``"stop"``, ``"length"``, ``"tool_calls"`` or ``"cancelled"``; None until the turn has ended."""
        self.stop_sequence: str | None = None
        """The stop string that has ended the turn, if one has."""

    @property
    def usage(self) -> Usage | None:
        """Token counts and times; complete once the turn has ended."""
        return self._generation.usage

    @property
    def reply(self) -> Reply:
        """All that the model has written, once the turn has ended."""
        return self._reader.reply

    def __aiter__(self) -> Turn:
        return self

    async def __anext__(self) -> TurnDelta:
        if self._over:
            raise StopAsyncIteration
        try:
            delta = await (anext(self._generation) if self._begun else self._first())
        except BaseException:
            self._end()
            raise
        parts = self._reader.feed(delta.text)
        if delta.finish_reason is not None:
            parts = [*parts, *self._reader.finish()]
            called = delta.finish_reason == "stop" and self._reader.reply.calls
            self.finish_reason = "tool_calls" if called else delta.finish_reason
            self._end()
        return TurnDelta(parts, delta.logprobs, delta.token_ids)

    def cancel(self) -> None:
        """Stop the generation; its pages are free within a step."""
        self._generation.cancel()
        self._end()

    async def _first(self) -> Delta:
        try:
            async with asyncio.timeout(self._wait_s):
                delta = await anext(self._generation)
        except TimeoutError:
            raise Overloaded(f"no token within {self._wait_s:.0f} s: too many requests; try again later") from None
        self._begin()
        return delta

    def _begin(self) -> None:
        if not self._begun:
            self._begun = True
            self._on_begin()

    def _end(self) -> None:
        if not self._over:
            self._over = True
            self._begin()
            self._on_end(self)

    def __del__(self) -> None:
        self.cancel()


class Queue:
    """Counts what waits before the engine: prompts that are being made, and tokens of turns that have not begun."""

    def __init__(self, rendering: int, tokens: int):
        self._most_rendering, self._most_tokens = rendering, tokens
        self.rendering = 0
        self.tokens = 0

    @contextmanager
    def rendered(self) -> Iterator[None]:
        """Count a request while its prompt is made.

        Raises:
            Overloaded: too many are being made.
        """
        if self.rendering >= self._most_rendering:
            raise Overloaded("too many prompts are being read; try again later")
        self.rendering += 1
        try:
            yield
        finally:
            self.rendering -= 1

    def enter(self, tokens: int) -> None:
        """Count the tokens of a request that is going to be queued; :meth:`leave` takes them out.

        Raises:
            Overloaded: there are too many; a request that is alone is always taken.
        """
        if self.tokens and self.tokens + tokens > self._most_tokens:
            raise Overloaded("too many prompt tokens are waiting; try again later")
        self.tokens += tokens

    def leave(self, tokens: int) -> None:
        """Take out what :meth:`enter` has counted."""
        self.tokens -= tokens


class Door:
    """Begins turns on an engine; every API goes through the same one. All of it runs in the server's event loop.

    Args:
        engine: serves the turns.
        call_format: how the model writes calls and thoughts.
        names: names of the model; the first one is its own.
        limits: bounds on what waits.
    """

    def __init__(self, engine: Serving, call_format: Any, names: Sequence[str], limits: Limits | None = None):
        self.engine = engine
        self.names = tuple(names)
        self.limits = limits or Limits()
        self.draining = False
        """Set when the server is shutting down: nothing begins any more."""
        self._format = call_format
        self.queue = Queue(self.limits.rendering, self.limits.queued_tokens or 64 * engine.layout.max_context)
        self._busy: set[tuple[str, str]] = set()
        """Owner and name of sessions with a turn in progress."""

    async def begin(self, request: ChatRequest) -> list[Turn]:
        """Check, render, tokenise and queue a request; returns a turn for each choice.

        Raises:
            RequestError: the request cannot be served as it is.
            Overloaded: too much is waiting.
            EngineDead: the server does not serve.
        """
        self._check(request)
        with self.queue.rendered():
            characters = len(str(request.messages)) + len(str(request.tools))
            prompt = await encode_prompt(characters, partial(self._prompt, request))
        tokenizer = self.engine.tokenizer
        tail = tokenizer.decode(prompt[-TAIL:])
        readers = [ReplyReader(self._format, tail, request.tools, request.call_ids) for _ in range(request.n)]
        return self._queue(request, prompt, readers)

    def _check(self, request: ChatRequest) -> None:
        if self.draining:
            raise EngineDead("the server is shutting down; use another one")
        if not self.engine.live:
            raise EngineDead("the engine does not serve yet, or no longer")
        if not 1 <= request.n <= MAX_CHOICES:
            raise RequestError(f"n is {request.n}; it must be an integer in [1, {MAX_CHOICES}]")
        if not request.messages:
            raise RequestError("there are no messages; a chat needs at least one")
        if request.messages[-1].get("role") == "assistant":
            raise RequestError(
                "the last message is the assistant's own; continuing it (prefill) is not served: end with a message "
                "of the user or a tool"
            )
        names = [str(tool["function"]["name"]) for tool in request.tools]
        if request.tool_choice not in ("auto", "none") and not names:
            raise RequestError("tool_choice asks for a call, but there are no tools")
        if request.tool_choice not in ("auto", "none", "required", *names):
            raise RequestError(f"tool_choice names {request.tool_choice[:60]!r}, which is none of the tools")

    def _prompt(self, request: ChatRequest) -> list[int]:
        tools = [*request.tools] if request.tools and request.tool_choice != "none" else None
        try:
            return self.engine.tokenizer.encode_chat(request.messages, tools, **request.template_arguments)
        except (TypeError, ValueError) as error:
            raise RequestError(str(error)) from error

    def _queue(self, request: ChatRequest, prompt: list[int], readers: Sequence[ReplyReader]) -> list[Turn]:
        """Queue all choices, or none: a request that is refused in part is refused."""
        room = max(1, self.engine.layout.max_context - len(prompt))
        params = replace(request.params, max_tokens=min(request.params.max_tokens, room))
        tenant, key = request.tenant, (request.tenant.owner, request.session or "")
        session = None if key in self._busy else request.session
        self.queue.enter(len(prompt) * len(readers))
        waiting = len(readers)
        turns: list[Turn] = []
        try:
            for i, reader in enumerate(readers):
                generation = self.engine.generate(
                    prompt,
                    params if params.seed is None else replace(params, seed=(params.seed + i) % 2**32),
                    session=session if i == 0 else None,
                    final=request.final,
                    salt=tenant.salt,
                    owner=tenant.owner,
                )
                waiting -= 1
                on_begin = partial(self.queue.leave, len(prompt))
                on_end = partial(self._ended, request=request, key=key if session and i == 0 else None)
                turns.append(Turn(generation, reader, self.limits.wait_s, on_begin, on_end))
        except BaseException:
            for turn in turns:
                turn.cancel()
            raise
        finally:
            self.queue.leave(len(prompt) * waiting)
        if session:
            self._busy.add(key)
        return turns

    def _ended(self, turn: Turn, request: ChatRequest, key: tuple[str, str] | None) -> None:
        if key is None:
            return
        self._busy.discard(key)
        known = {str(tool["function"]["name"]) for tool in request.tools}
        if turn.finish_reason == "tool_calls" and (names := joined({c.name for c in turn.reply.calls} & known)):
            with suppress(Overloaded):  # the engine has too much to do to learn from it
                self.engine.tool_called(key[1], names, owner=key[0])
