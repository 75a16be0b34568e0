"""The agent's loop: model, tools, model, …, within one program.

The model is anything with an engine's ``generate``, ``tool_called`` and ``end_session``: the engine in this process,
or the client of a server. One loop serves both.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from astraea_jax.agents.tool_calls import ToolCall, assistant_message, parse
from astraea_jax.agents.tools import Tool, error_text
from astraea_jax.engine.generation import Delta, Usage
from astraea_jax.engine.sampling import SamplingParams
from astraea_jax.models.tokenizer import Tokenizer

Message = dict[str, Any]
"""An OpenAI-shaped chat message."""


class Stream(Protocol):
    """A running request, such as :class:`astraea_jax.engine.generation.Generation`."""

    usage: Usage | None

    def __aiter__(self) -> AsyncIterator[Delta]: ...
    def cancel(self) -> None: ...


class Model(Protocol):
    """What a program needs of an engine."""

    tokenizer: Tokenizer

    def generate(
        self, prompt: Sequence[int], params: SamplingParams | None = None, *, session: str | None, final: bool
    ) -> Stream: ...
    def tool_called(self, session: str, tool: str) -> None: ...
    def end_session(self, session: str) -> None: ...


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
    """As the model reports it; None from a server that does not."""
    tools: tuple[ToolRun, ...]


@dataclass(frozen=True)
class ProgramResult:
    """A program that has run to its end."""

    session: str
    text: str
    """What the model said last, tool calls taken out."""
    messages: list[Message]
    """The conversation, from the first message given to the last answer."""
    finish_reason: str
    """``"max_steps"`` if it still called tools in its last request, else that of the last request."""
    requests: tuple[RequestRecord, ...]


async def run_program(
    model: Model,
    messages: Sequence[Message],
    tools: Sequence[Tool] = (),
    *,
    params: SamplingParams | None = None,
    max_steps: int = 16,
    session: str | None = None,
) -> ProgramResult:
    """Run one agent until it answers without calling a tool. The calls of one turn run at the same time.

    Args:
        model: serves the requests.
        messages: the conversation so far.
        tools: what the agent may call.
        params: sampling of every request.
        max_steps: requests at most; calls made in the last one are not run.
        session: names the program; a fresh name by default. It is ended here, whatever happens.

    Raises:
        ValueError: two tools of one name, or ``max_steps`` below 1.
        RequestError, Overloaded, EngineDead: from the model; the first when its context is outgrown.
    """
    by_name = {tool.name: tool for tool in tools}
    if len(by_name) < len(tools):
        raise ValueError(f"two tools have the same name among {[tool.name for tool in tools]}")
    if max_steps < 1:
        raise ValueError(f"max_steps must be at least 1, not {max_steps}")
    session = session or uuid.uuid4().hex
    conversation = list(messages)
    schemas = [tool.schema() for tool in tools] or None
    records: list[RequestRecord] = []
    calls_made = 0
    try:
        while True:
            prompt = model.tokenizer.encode_chat(conversation, schemas)
            final = len(records) + 1 == max_steps
            text, record = await _request(model, prompt, params, session, final)
            content, calls = parse(text, calls_made)
            conversation.append(assistant_message(text, content, calls))
            if final or not calls:
                records.append(record)
                reason = "max_steps" if calls else record.finish_reason
                return ProgramResult(session, content, conversation, reason, tuple(records))
            calls_made += len(calls)
            if names := sorted({call.name for call in calls if call.name in by_name}):
                model.tool_called(session, "+".join(names))
            done = await asyncio.gather(*(_call(call, by_name) for call in calls))
            conversation += [message for message, _ in done]
            records.append(replace(record, tools=tuple(run for _, run in done)))
    finally:
        model.end_session(session)


async def _request(
    model: Model, prompt: Sequence[int], params: SamplingParams | None, session: str, final: bool
) -> tuple[str, RequestRecord]:
    submitted = time.monotonic()
    stream = model.generate(prompt, params, session=session, final=final)
    first_token = None
    text, tokens, reason = [], 0, None
    try:
        async for delta in stream:
            if first_token is None:
                first_token = time.monotonic()
            text.append(delta.text)
            tokens += len(delta.token_ids)
            reason = delta.finish_reason
    finally:
        if reason is None:
            stream.cancel()
    ended = time.monotonic()
    return "".join(text), RequestRecord(
        submitted, first_token or ended, ended, tokens, reason or "cancelled", stream.usage, ()
    )


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
