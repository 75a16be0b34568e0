"""``/v1/chat/completions``: OpenAI's chats, with vLLM's names for what OpenAI does not have.

Reasoning travels as ``reasoning`` and as ``reasoning_content``, in and out. A message of the assistant's at the end is
refused. ``chat_template_kwargs`` may hold what :data:`.chat_schema.TEMPLATE_ARGUMENTS` names.

A stream has a call's name as soon as it is known, and its arguments as the model writes them. They are whole JSON as
soon as the call is complete, and not before, so a client may run the tool then. What turns out to be no call, or is cut
off by ``max_tokens``, never is, and its text follows as content.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterator, Sequence
from functools import partial
from typing import Any

from fastapi import APIRouter, Request, Response

from astraea_jax.agents.reply import CallArguments, CallBegan, Said, Thought
from astraea_jax.engine.generation import TokenLogprob
from astraea_jax.errors import RequestError
from astraea_jax.frontends.http.bodies import prepared
from astraea_jax.frontends.http.calls import door_of, program_of, tenant_of
from astraea_jax.frontends.http.chat_schema import ChatCompletionRequest
from astraea_jax.frontends.http.door import Door
from astraea_jax.frontends.http.logprobs import chat_logprobs, count, written
from astraea_jax.frontends.http.routes import DONE, JsonRoute, answer_of_choices, event, stream
from astraea_jax.frontends.http.turns import ChatRequest, Turn, TurnDelta, merged, written_call
from astraea_jax.frontends.http.usage import cached_header, usage_of

router = APIRouter(route_class=JsonRoute, tags=["chat"])


@router.post("/v1/chat/completions")
async def chat_completions(request: Request, body: ChatCompletionRequest) -> Response:
    """Give the model's next turn in a conversation."""
    door = door_of(request)
    head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": door.check_model(body.model)}
    turns = await door.begin(await prepared(request, partial(request_of, request, body, door)))
    outputs = merged(turns)
    if body.stream:
        chunks = _Chunks(door, body, head, turns)
        return await stream(request, chunks.of(outputs), lambda failure: event(failure.openai()))
    logprobs: list[list[TokenLogprob]] = [[] for _ in turns]
    async for index, delta in outputs:
        logprobs[index] += delta.logprobs

    def whole() -> Response:
        choices = (_choice(door, body, i, turn, logprobs[i]) for i, turn in enumerate(turns))
        content = {**head, "object": "chat.completion", "usage": usage_of(turns)}
        return answer_of_choices(content, choices, cached_header(turns[0]))

    return await written(sum(map(count, logprobs)), whole)


def request_of(request: Request, body: ChatCompletionRequest, door: Door) -> ChatRequest:
    """Return what a call asks for.

    Raises:
        RequestError: it asks for what is not served, or contradicts itself.
    """
    body.refuse_unserved()
    if body.thinking_token_budget is not None and not door.bounds_thoughts:
        raise RequestError(
            "thinking_token_budget is not served: this model has no tokens that begin and end its thoughts"
        )
    return ChatRequest(
        tenant=tenant_of(request, body.cache_salt),
        params=body.sampling(
            door.defaults,
            body.max_completion_tokens or body.max_tokens,
            (body.top_logprobs or 0) if body.logprobs else None,
        ),
        n=body.n or 1,
        constraint=body.constraint(),
        messages=[message.plain() for message in body.messages],
        tools=[{"type": "function", "function": tool.function.plain()} for tool in body.tools or ()],
        tool_choice=body.choice(),
        parallel_calls=body.parallel_tool_calls is not False,
        thought_tokens=body.thinking_token_budget,
        template_arguments=body.template_arguments(),
        **program_of(request, body),
        early_calls=bool(body.stream),
    )


def _choice(
    door: Door, body: ChatCompletionRequest, index: int, turn: Turn, logprobs: Sequence[TokenLogprob]
) -> dict[str, Any]:
    reply = turn.reply
    message: dict[str, Any] = {
        "role": "assistant",
        "content": reply.text or (None if reply.calls else ""),
        "refusal": None,
    }
    if reply.thought:
        message |= {"reasoning": reply.thought, "reasoning_content": reply.thought}
    if reply.calls:
        message["tool_calls"] = [written_call(call) for call in reply.calls]
    return {
        "index": index,
        "message": message,
        "logprobs": chat_logprobs(door.engine.tokenizer, logprobs) if body.logprobs else None,
        "finish_reason": turn.finish_reason,
        "stop_reason": turn.stop_sequence,
    }


class _Chunks:
    """Makes the chunks of a stream.

    Args:
        door: has the tokenizer.
        body: of the request.
        head: fields that every chunk has.
        turns: the choices.
    """

    def __init__(self, door: Door, body: ChatCompletionRequest, head: dict[str, Any], turns: Sequence[Turn]):
        self._tokenizer = door.engine.tokenizer
        self._body, self._turns = body, turns
        self._tells_usage = body.include_usage or turns[0].about.told
        usage = {"usage": None} if self._tells_usage else {}
        self._head = {**head, "object": "chat.completion.chunk", **usage}

    async def of(self, outputs: AsyncIterator[tuple[int, TurnDelta]]) -> AsyncIterator[bytes]:
        """Server-sent events of what the turns give; those that come together are one piece."""
        told: set[int] = set()
        async for index, output in outputs:
            events = []
            if index not in told:
                told.add(index)
                events.append(self._chunk(index, {"role": "assistant", "content": ""}))
            delta = _delta(output)
            if delta or output.logprobs:
                events.append(
                    await written(count(output.logprobs), partial(self._chunk, index, delta, output.logprobs))
                )
            if (reason := self._turns[index].finish_reason) is not None:
                events.append(self._chunk(index, {}, reason=reason, stop=self._turns[index].stop_sequence))
            if events:
                yield b"".join(events)
        usage = event({**self._head, "choices": [], "usage": usage_of(self._turns)}) if self._tells_usage else b""
        yield usage + DONE

    def _chunk(
        self,
        index: int,
        delta: dict[str, Any],
        logprobs: Sequence[TokenLogprob] = (),
        reason: str | None = None,
        stop: str | None = None,
    ) -> bytes:
        choice: dict[str, Any] = {"index": index, "delta": delta, "logprobs": None, "finish_reason": reason}
        if logprobs:
            choice["logprobs"] = chat_logprobs(self._tokenizer, logprobs)
        if reason is not None:
            choice["stop_reason"] = stop
        return event({**self._head, "choices": [choice]})


def _delta(output: TurnDelta) -> dict[str, Any]:
    """Make the delta of a chunk; each call that it continues has one entry."""
    delta: dict[str, Any] = {}
    calls: dict[int, dict[str, Any]] = {}
    for part in output.parts:
        match part:
            case Said(text):
                delta["content"] = delta.get("content", "") + text
            case Thought(text):
                delta["reasoning"] = delta["reasoning_content"] = delta.get("reasoning", "") + text
            case CallBegan(index, id, name):
                function = {"name": name, "arguments": ""}
                calls[index] = {"index": index, "id": id, "type": "function", "function": function}
            case CallArguments(index, text):
                call = calls.setdefault(index, {"index": index, "function": {"arguments": ""}})
                call["function"]["arguments"] += text
    if calls:
        delta["tool_calls"] = [*calls.values()]
    return delta
