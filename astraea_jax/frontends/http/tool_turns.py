"""Turns that call the server's own tools: the loop of model and tools runs here, and the client sees one answer.

The server's tools (MCP servers, modules with ``@tool``) join those of a request; a request's own tool hides one of the
server's that has the same name. A turn that calls only the server's tools goes on with their results. A turn that calls
the client's, too, ends there with the client's calls: the model may call the server's again when it has the results.
"""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from astraea_jax.agents.parts import CallBegan, CallPart, Part, Reply
from astraea_jax.agents.tool_calls import ToolCall
from astraea_jax.agents.tools import Tool
from astraea_jax.engine.generation import Usage
from astraea_jax.frontends.http.turns import ChatRequest, Turn, TurnDelta

MAX_STEPS = 16
"""Turns of the model for one answer; calls made in the last one are not run."""


class ToolTurn:
    """A :class:`~.turns.Turn` that consists of several of the model's.

    Args:
        turn: the first one.
        request: what it answers, the server's tools among its own.
        begin: begins the next turn.
        end: called when the answer has ended, however.
        tools: the server's by name, without those that the client's hide.
    """

    def __init__(
        self,
        turn: Turn,
        request: ChatRequest,
        begin: Callable[[ChatRequest], Awaitable[Turn]],
        end: Callable[[], None],
        tools: Mapping[str, Tool],
    ):
        self._turn = turn
        self._request = request
        self._begin, self._end_program = begin, end
        self._tools = tools
        self._steps = 1
        self._done: list[Turn] = []
        self._shown: dict[int, int] = {}  # index of a client's call in the model's turn -> in the answer
        self._numbers = itertools.count()
        self._over = False
        self.prompt_tokens = turn.prompt_tokens
        self.finish_reason: str | None = None
        self.stop_sequence: str | None = None

    @property
    def usage(self) -> Usage | None:
        """Sums over all turns of the model."""
        return _total([turn.usage for turn in [*self._done, self._turn]])

    @property
    def reply(self) -> Reply:
        """All that the model has written for the client."""
        replies = [turn.reply for turn in [*self._done, self._turn]]
        return Reply(
            "\n".join(filter(None, (reply.thought for reply in replies))),
            "".join(reply.text for reply in replies),
            self._theirs(replies[-1].calls),
            [error for reply in replies for error in reply.errors],
        )

    def __aiter__(self) -> ToolTurn:
        return self

    async def __anext__(self) -> TurnDelta:
        if self._over:
            raise StopAsyncIteration
        try:
            if self._turn.finish_reason is not None:
                await self._go_on()
            delta = await anext(self._turn)
        except BaseException:
            self.cancel()
            raise
        if (reason := self._turn.finish_reason) is not None and not self._goes_on():
            called = reason == "tool_calls" and self._theirs(self._turn.reply.calls)
            self.finish_reason = reason if called or reason != "tool_calls" else "length"
            self.stop_sequence = self._turn.stop_sequence
            self._end()
        return TurnDelta(self._visible(delta.parts), delta.logprobs, delta.token_ids)

    def cancel(self) -> None:
        """Stop the model's turn; tools that run are stopped with the task that waits for them."""
        self._turn.cancel()
        self._end()

    def _goes_on(self) -> bool:
        calls = self._turn.reply.calls if self._turn.finish_reason == "tool_calls" else []
        return bool(calls) and not self._theirs(calls) and self._steps < MAX_STEPS

    async def _go_on(self) -> None:
        """Run the tools that the turn has called, and begin the next turn with their results."""
        reply = self._turn.reply
        results = await asyncio.gather(*(self._tools[call.name].call(call.arguments) for call in reply.calls))
        said: dict[str, Any] = {
            "role": "assistant",
            "content": reply.text,
            "tool_calls": [_written(call) for call in reply.calls],
        }
        if reply.thought:
            said["reasoning_content"] = reply.thought
        answers = [
            {"role": "tool", "tool_call_id": call.id, "name": call.name, "content": result}
            for call, result in zip(reply.calls, results, strict=True)
        ]
        self._request = replace(self._request, messages=[*self._request.messages, said, *answers], tool_choice="auto")
        self._done.append(self._turn)
        self._shown.clear()
        self._turn = await self._begin(self._request)
        self._steps += 1

    def _theirs(self, calls: Sequence[ToolCall]) -> list[ToolCall]:
        """The calls of the client's tools, or of tools that nobody has."""
        return [call for call in calls if call.name not in self._tools]

    def _visible(self, parts: Sequence[Part]) -> list[Part]:
        """The parts without the server's calls; the client's are counted anew."""
        visible: list[Part] = []
        for part in parts:
            if isinstance(part, CallBegan) and part.name not in self._tools:
                self._shown[part.index] = next(self._numbers)
            if not isinstance(part, CallPart):
                visible.append(part)
            elif part.index in self._shown:
                visible.append(replace(part, index=self._shown[part.index]))
        return visible

    def _end(self) -> None:
        if not self._over:
            self._over = True
            self._end_program()


def _written(call: ToolCall) -> dict[str, Any]:
    function = {"name": call.name, "arguments": json.dumps(call.arguments, ensure_ascii=False)}
    return {"type": "function", "id": call.id, "function": function}


def _total(usages: Sequence[Usage | None]) -> Usage | None:
    known = [usage for usage in usages if usage is not None]
    if not known:
        return None
    fields = known[0].__dataclass_fields__
    return Usage(**{name: sum(getattr(usage, name) for usage in known) for name in fields})
