"""Turns of the model in no API's shape: what asks for them, and how they are read.

:meth:`.door.Door.begin` takes a request and gives one :class:`Turn` for each choice that is asked for. A turn is an
async iterator of :class:`TurnDelta`, and afterwards says how it has ended. Whoever holds it no longer, or whose task is
cancelled, has cancelled its generation.
"""

from __future__ import annotations

import asyncio
import json
import secrets
import string
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from astraea_jax.agents.opened import Continuation
from astraea_jax.agents.parts import CallEnded, CallPart, Part, Reply, Said
from astraea_jax.agents.tool_calls import ToolCall
from astraea_jax.engine.generation import Delta, Generation, TokenLogprob, Usage
from astraea_jax.engine.sampling import SamplingParams
from astraea_jax.errors import Overloaded
from astraea_jax.frontends.hints import NO_HINTS, Hints, Outcome
from astraea_jax.frontends.http.errors import SessionEnded
from astraea_jax.frontends.http.tenants import Tenant

MAX_CHOICES = 64
"""Choices of one request (``n``)."""
UNBOUNDED = SamplingParams(max_tokens=2**31 - 1)


def reply_message(reply: Reply) -> dict[str, Any]:
    """Return a reply as the assistant's message, in OpenAI's shape."""
    message: dict[str, Any] = {"role": "assistant", "content": reply.text}
    if reply.thought:
        message["reasoning_content"] = reply.thought
    if reply.calls:
        message["tool_calls"] = [written_call(call) for call in reply.calls]
    return message


def written_call(call: ToolCall) -> dict[str, Any]:
    """Return a call as OpenAI writes it."""
    function = {"name": call.name, "arguments": json.dumps(call.arguments, ensure_ascii=False)}
    return {"id": call.id, "type": "function", "function": function}


def call_id() -> str:
    """Make the id of a tool call, as OpenAI's look."""
    return f"call_{secrets.token_hex(12)}"


def short_call_id(length: int) -> str:
    """Make the id of a tool call for chat templates that take nothing but so many letters and digits."""
    return "".join(secrets.choice(string.ascii_letters + string.digits) for _ in range(length))


@dataclass(frozen=True, kw_only=True)
class Request:
    """The common fields of chats and completions."""

    tenant: Tenant
    params: SamplingParams = UNBOUNDED
    """``max_tokens`` is a bound: what the context has left is one, too. Of several choices with a seed, each one has
    the seed of the previous one plus 1."""
    n: int = 1
    constraint: Mapping[str, Any] | None = None
    """What the text must look like: ``{"type": "json_object"}``, ``{"type": "json_schema", "schema": …}``,
    ``{"type": "regex", "regex": …}`` or ``{"type": "lark", "lark": …}``."""
    session: str | None = None
    """Names the program. While it has a request in progress, another one is a program of its own, as are all choices
    but the first."""
    parent: str | None = None
    """Session that this one is a child of: it takes part in its job, and shares its KV."""
    final: bool = False
    """Whether the program ends with this request."""
    hints: Hints = NO_HINTS
    """What the client says about what comes next."""
    report: bool = False
    """Whether the client is told what was reused, and why not more."""


@dataclass(frozen=True, kw_only=True)
class ChatRequest(Request):
    """A request for the next turn of a conversation. Messages and tools are as OpenAI writes them."""

    messages: Sequence[Mapping[str, Any]]
    tools: Sequence[Mapping[str, Any]] = ()
    tool_choice: str = "auto"
    """``"auto"``, ``"none"``, ``"required"``, or the name of the tool that must be called."""
    parallel_calls: bool = True
    """Whether a turn may call several tools; if not, only the first call counts."""
    thought_tokens: int | None = None
    """Tokens that the thoughts of a turn of the model may have, where :attr:`.door.Door.bounds_thoughts`; None: any."""
    template_arguments: Mapping[str, Any] = field(default_factory=dict)
    call_ids: Callable[[], str] = call_id
    """Makes the ids of tool calls, unless the model's chat template takes only some of its own."""
    early_calls: bool = True
    """Whether calls are told while they are written, and dropped if they turn out unreadable."""


@dataclass(frozen=True, kw_only=True)
class TextRequest(Request):
    """A request for what follows a text, without a chat template."""

    prompt: str | Sequence[int]
    """Text, or token ids."""
    add_bos: bool = True
    """Whether a text gets what the tokenizer adds to plain text."""


@dataclass(frozen=True, slots=True)
class TurnDelta:
    """Output of a turn since its previous one."""

    parts: Sequence[Part]
    logprobs: tuple[TokenLogprob, ...]
    token_ids: tuple[int, ...]


class Reader(Protocol):
    """Reads the text of a turn, as :class:`~astraea_jax.agents.reply.ReplyReader` does."""

    @property
    def reply(self) -> Reply: ...
    def feed(self, text: str) -> list[Part]: ...
    def finish(self) -> list[Part]: ...


class PlainReader:
    """Reads a text that is nothing but text."""

    def __init__(self) -> None:
        self._pieces: list[str] = []

    @property
    def reply(self) -> Reply:
        return Reply("", "".join(self._pieces), [], [])

    def feed(self, text: str) -> list[Part]:
        self._pieces.append(text)
        return [Said(text)] if text else []

    def finish(self) -> list[Part]:
        return []


@dataclass(frozen=True)
class About:
    """What is known of a turn beside its output, for reports to its client."""

    program: str | None = None
    """Name of the program that it belongs to; None: it is one of a single request."""
    known: Continuation | None = None
    """How much of its prompt was known; None: the client has sent tokens."""
    outcomes: Sequence[Outcome] = ()
    """What has become of the client's hints."""
    told: bool = False
    """Whether the client wants to know."""


class Turn(Protocol):
    """One choice of a request: an async iterator of :class:`TurnDelta`. Iterating raises what went wrong."""

    about: About
    prompt_tokens: int
    """Of the prompt, known at once."""
    finish_reason: str | None
    """``"stop"``, ``"length"`` or ``"tool_calls"``; None until the turn has ended."""
    stop_sequence: str | None
    """The stop string that has ended the turn, if one has."""

    @property
    def usage(self) -> Usage | None:
        """Token counts and times; complete once the turn has ended."""

    @property
    def reply(self) -> Reply:
        """All that the model has written, once the turn has ended."""

    def __aiter__(self) -> AsyncIterator[TurnDelta]: ...
    async def __anext__(self) -> TurnDelta: ...
    def cancel(self) -> None:
        """Stop the generation; its pages are free within a step."""


class ModelTurn:
    """A :class:`Turn` that is one turn of the model.

    Args:
        generation: of the engine.
        reader: reads its text.
        prompt_tokens: of the prompt.
        parallel_calls: see :class:`ChatRequest`.
        wait_s: seconds until the first token; then ``Overloaded`` is raised.
        on_begin: called once, when the first tokens are out or none will come.
        on_end: called once, when the turn has ended, however.
        about: its program, and what was known of it.
    """

    def __init__(
        self,
        generation: Generation,
        reader: Reader,
        *,
        prompt_tokens: int,
        parallel_calls: bool,
        wait_s: float,
        on_begin: Callable[[], None],
        on_end: Callable[[ModelTurn], None],
        about: About,
    ):
        self._generation = generation
        self._reader = reader
        self.prompt_tokens = prompt_tokens
        self._parallel_calls = parallel_calls
        self._wait_s = wait_s
        self._on_begin, self._on_end = on_begin, on_end
        self.about = about
        self.output_ids: list[int] = []
        """All tokens so far."""
        self._begun = self._over = False
        self._called: int | None = None
        """Index of the first call that is complete, if no other one counts."""
        self.finish_reason: str | None = None
        self.stop_sequence: str | None = None

    @property
    def usage(self) -> Usage | None:
        return self._generation.usage

    @property
    def reply(self) -> Reply:
        reply = self._reader.reply
        return reply if self._parallel_calls else replace(reply, calls=reply.calls[:1])

    @property
    def left_out(self) -> bool:
        """Whether the model has called more tools than the client wanted to know of."""
        return not self._parallel_calls and len(self._reader.reply.calls) > 1

    def __aiter__(self) -> ModelTurn:
        return self

    async def __anext__(self) -> TurnDelta:
        if self._over:
            raise StopAsyncIteration
        try:
            delta = await (anext(self._generation) if self._begun else self._first())
            if delta.finish_reason == "cancelled":
                raise SessionEnded("the session was ended while its request ran")
        except BaseException:
            self._end()
            raise
        self.output_ids += delta.token_ids
        parts = self._reader.feed(delta.text)
        if delta.finish_reason is not None:
            parts = [*parts, *self._reader.finish()]
            called = delta.finish_reason == "stop" and self._reader.reply.calls
            self.finish_reason = "tool_calls" if called else delta.finish_reason
            self.stop_sequence = delta.stop
            self._end()
        if not self._parallel_calls:
            parts = list(self._first_call(parts))
        return TurnDelta(parts, delta.logprobs, delta.token_ids)

    def _first_call(self, parts: Sequence[Part]) -> Iterator[Part]:
        """The parts without calls after the first that is complete."""
        for part in parts:
            if self._called is None or not isinstance(part, CallPart):
                yield part
            if self._called is None and isinstance(part, CallEnded):
                self._called = part.index

    def cancel(self) -> None:
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


async def merged(turns: Sequence[Turn]) -> AsyncIterator[tuple[int, TurnDelta]]:
    """Index of a turn and its next output, whichever comes first; whatever ends this ends all turns."""
    try:
        if len(turns) == 1:
            async for delta in turns[0]:
                yield 0, delta
            return
        waiting = {_next(turn): i for i, turn in enumerate(turns)}
        try:
            while waiting:
                done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    i = waiting.pop(task)
                    output = task.result()
                    if output is not None:
                        waiting[_next(turns[i])] = i
                        yield i, output
        finally:
            for task in waiting:
                task.cancel()
    finally:
        for turn in turns:
            turn.cancel()


def _next(turn: Turn) -> asyncio.Task[TurnDelta | None]:
    async def wait() -> TurnDelta | None:
        return await anext(turn, None)

    return asyncio.create_task(wait())
