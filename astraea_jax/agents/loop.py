"""Runs an agent: model, tools, model, …, until it answers without calling a tool.

The loop is the same for an engine in this process and for the client of a server: both are a
:class:`astraea_jax.engine.interface.Model`.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

from astraea_jax.agents import formats
from astraea_jax.agents.call_bodies import Tools
from astraea_jax.agents.conversations import Conversations
from astraea_jax.agents.json_calls import ToolCall
from astraea_jax.agents.opened import Opened
from astraea_jax.agents.tool_calls import Turn, read_turn
from astraea_jax.agents.tools import Tool, error_text
from astraea_jax.engine.encoding import encode_prompt
from astraea_jax.engine.events import MAX_NAME
from astraea_jax.engine.generation import Delta, Usage
from astraea_jax.engine.interface import Model
from astraea_jax.engine.sampling import SamplingParams
from astraea_jax.models.chat import normalise_messages

Message = dict[str, Any]
"""A chat message in OpenAI's shape."""


@dataclass(frozen=True)
class ToolRun:
    """One call of a tool; times as in :class:`RequestRecord`."""

    name: str
    began: float
    ended: float


@dataclass(frozen=True)
class RequestRecord:
    """One model call of a program and the tools it led to. Times are ``time.monotonic()`` seconds."""

    submitted: float
    first_token: float
    ended: float
    output_tokens: int
    finish_reason: str
    usage: Usage | None
    """Token counts and times that the model reports; None from a server that does not."""
    tools: tuple[ToolRun, ...]


@dataclass(frozen=True)
class ProgramResult:
    """A program that has ended."""

    session: str
    text: str
    """The model's last words without tool calls; empty after an error."""
    messages: list[Message]
    """The conversation, from the first message given to the last that was said."""
    finish_reason: str
    """``"error"``; ``"max_steps"`` if the last request allowed still called tools; else that of the last request,
    ``"cancelled"`` among them if somebody else ended the session."""
    requests: tuple[RequestRecord, ...]
    error: Exception | None = None
    """Why the program ended early."""


class Output(NamedTuple):
    """What one request has generated."""

    text: str
    token_ids: Sequence[int]
    whole: bool
    """No stop string or stop token of the request's own has cut it."""


async def run_program(
    model: Model,
    messages: Sequence[Any],
    tools: Sequence[Tool] = (),
    *,
    params: SamplingParams | None = None,
    max_steps: int = 16,
    session: str | None = None,
    template_arguments: Mapping[str, Any] | None = None,
    call_format: str | None = None,
    conversations: Conversations | None = None,
    return_error: bool = False,
) -> ProgramResult:
    """Run one agent until it answers without calling a tool. The calls of one turn run at the same time.

    Cancelling it cancels its request and its tools; a sync tool that runs already cannot be stopped, but no other one
    begins. Neither does one after a request that somebody else has cancelled by ending the session.

    Args:
        model: serves the requests.
        messages: the conversation so far, dicts or an SDK's message objects.
        tools: what the agent may call.
        params: sampling of every request.
        max_steps: bound on requests; calls made in the last one are not run.
        session: names the program; a fresh name by default. The session is ended here, whatever happens.
        template_arguments: variables for the chat template, such as ``{"enable_thinking": False}``.
        call_format: how the model writes tool calls, of :data:`.formats.NAMES`; by default as its template shows.
        conversations: what is known of earlier turns, whose tokens requests continue; by default, of this program only.
        return_error: put an error that ends the program into its result, beside the conversation; do not raise it.

    Raises:
        TypeError, ValueError: the arguments cannot be used, or the chat template refuses them.
        RequestError, Overloaded, EngineDead: from the model; the first when its context is outgrown.
    """
    session = uuid.uuid4().hex if session is None else session
    conversation, records = list[Message](), list[RequestRecord]()
    by_name, schemas = check_tools(tools, max_steps), [tool.schema() for tool in tools]
    known, format = Tools.of(schemas), formats.choose(model.tokenizer, call_format)
    known_turns = conversations or Conversations(model.tokenizer)
    try:
        conversation += normalise_messages(messages)
        while True:
            opened = await _open(known_turns, session, conversation, schemas or None, template_arguments)
            final = len(records) + 1 == max_steps
            read = partial(read_turn, first=sum(len(one.tools) for one in records), tools=known, format=format)
            turn, record = await _turn(model, opened, params, session, final, read)
            conversation.append(turn.message())
            cut = record.finish_reason == "cancelled"
            if final or cut or not turn.calls:
                reason = "max_steps" if turn.calls and not cut else record.finish_reason
                return ProgramResult(session, turn.content, conversation, reason, (*records, record))
            done = await _run_tools(model, session, turn.calls, by_name)
            conversation += [message for message, _ in done]
            records.append(replace(record, tools=tuple(run for _, run in done)))
    except Exception as error:
        if not return_error:
            raise
        return ProgramResult(session, "", conversation, "error", tuple(records), error)
    finally:
        model.end_session(session)


def check_tools(tools: Sequence[Tool], max_steps: int) -> dict[str, Tool]:
    """Check the arguments of an agent that need no model; returns the tools by name.

    Raises:
        TypeError: something is no tool, or ``max_steps`` is no integer.
        ValueError: two tools of one name, or ``max_steps`` below 1.
    """
    for tool in tools:
        if not isinstance(tool, Tool):
            raise TypeError(f"tools must be made with @tool; this is a {type(tool).__name__}: {str(tool)[:80]}")
    by_name = {tool.name: tool for tool in tools}
    if len(by_name) < len(tools):
        raise ValueError(f"two tools have the same name among {[tool.name for tool in tools]}")
    if not isinstance(max_steps, int):
        raise TypeError(f"max_steps must be an integer, not {max_steps!r}")
    if max_steps < 1:
        raise ValueError(f"max_steps must be at least 1, not {max_steps}")
    return by_name


async def _open(
    conversations: Conversations,
    session: str,
    conversation: Sequence[Message],
    schemas: Any,
    template_arguments: Mapping[str, Any] | None,
) -> Opened:
    characters = len(str(schemas)) + sum(len(str(value)) for message in conversation for value in message.values())
    begin = partial(conversations.begin, "", session, conversation, schemas, template_arguments)
    return await encode_prompt(characters, begin)


async def _turn(
    model: Model,
    opened: Opened,
    params: SamplingParams | None,
    session: str,
    final: bool,
    read: Callable[[str], Turn],
) -> tuple[Turn, RequestRecord]:
    """Run an opened request, read the turn that it brought, and let the next one know of it."""
    try:
        output, record = await _request(model, opened.prompt, params, session, final)
        turn = read(output.text)
        opened.ended(output.token_ids, turn.message(), record.finish_reason, whole=output.whole)
        return turn, record
    finally:
        opened.ended()


def called_tools(names: Iterable[str]) -> tuple[str, ...]:
    """Return the names of tools that are called together, as an engine takes them; those too long are left out."""
    return tuple(sorted(name for name in names if name and len(name) <= MAX_NAME))


async def _request(
    model: Model, prompt: Sequence[int], params: SamplingParams | None, session: str, final: bool
) -> tuple[Output, RequestRecord]:
    submitted = time.monotonic()
    stream = model.generate(prompt, params, session=session, final=final)
    first_token = None
    deltas = []
    try:
        async for delta in stream:
            if first_token is None:
                first_token = time.monotonic()
            deltas.append(delta)
    finally:
        if not deltas or deltas[-1].finish_reason is None:
            stream.cancel()
    ended = time.monotonic()
    last = Delta.joined(deltas) if deltas else Delta("", ())
    own_stops = frozenset(params.stop_token_ids if params else ()) - model.tokenizer.eos_ids
    whole = last.stop is None and own_stops.isdisjoint(last.token_ids[-1:])
    if whole:  # a model that is not this engine may give tokens which are not those of its text
        whole = model.tokenizer.decode(last.token_ids).strip() == last.text.strip()
    output = Output(last.text, last.token_ids, whole)
    reason = last.finish_reason or "cancelled"
    record = RequestRecord(submitted, first_token or ended, ended, len(output.token_ids), reason, stream.usage, ())
    return output, record


async def _run_tools(
    model: Model, session: str, calls: Sequence[ToolCall], tools: Mapping[str, Tool]
) -> list[tuple[Message, ToolRun]]:
    """Run the calls of one turn at the same time, after telling the model what its program waits for."""
    if names := called_tools(call.name for call in calls if call.name in tools):
        model.tool_called(session, *names)
    async with asyncio.TaskGroup() as group:
        running = [group.create_task(_call(call, tools)) for call in calls]
    return [task.result() for task in running]


async def _call(call: ToolCall, tools: Mapping[str, Tool]) -> tuple[Message, ToolRun]:
    began = time.monotonic()
    if call.error is not None:
        content = error_text(call.error)
    elif call.name not in tools:
        content = error_text(f"there is no tool {call.name!r}; there are: {', '.join(tools) or 'none'}")
    else:
        content = await tools[call.name].call(call.arguments)
    message = {"role": "tool", "tool_call_id": call.id, "name": call.name, "content": content}
    return message, ToolRun(call.name, began, time.monotonic())
