"""OpenAI's Responses API: the core that Open Responses describes.

Responses are stored, if ``store`` is not false, in a bounded table of each tenant for an hour after their last use. A
request that continues one that is gone gets 404. A chain of responses that may call tools is one program to the
scheduler.

Tools that OpenAI's servers would run (web search, code …) are not: models are not told of them, and the ``tools`` of a
response are those that its model was told of.
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from astraea_jax.engine.sampling import SamplingParams
from astraea_jax.frontends.http import responses_input as read
from astraea_jax.frontends.http.calls import door_of, session_of, tenant_of
from astraea_jax.frontends.http.errors import Failure
from astraea_jax.frontends.http.logprobs import chat_logprobs
from astraea_jax.frontends.http.responses_output import ResponseBuilder, reply_messages
from astraea_jax.frontends.http.responses_schema import LARGEST, FunctionTool, ResponsesRequest
from astraea_jax.frontends.http.responses_store import ResponseStore, Stored
from astraea_jax.frontends.http.routes import DONE, JsonRoute, answer, named, stream
from astraea_jax.frontends.http.tenants import Tenant
from astraea_jax.frontends.http.turns import ChatRequest, Turn, TurnDelta
from astraea_jax.models.tokenizer import Tokenizer

LOGPROBS = "message.output_text.logprobs"
"""In ``include``: the probability of each token of the text."""
REFUSED = {429: "rate_limit_exceeded"}
"""Statuses -> codes of responses that have failed; all others are the server's fault."""

router = APIRouter(route_class=JsonRoute, prefix="/v1/responses", tags=["responses"])


@dataclass(frozen=True)
class _Asked:
    """One request, and where its response belongs."""

    id: str
    body: ResponsesRequest
    tenant: Tenant
    store: ResponseStore
    before: Stored | None
    """What it continues."""
    messages: list[dict[str, Any]]
    """The conversation, without instructions."""
    session: str | None

    def keep(self, builder: ResponseBuilder, response: dict[str, Any]) -> None:
        """Store a response that has ended."""
        if not self.body.store:
            return
        known = len(self.before.messages) if self.before else 0
        messages = [*self.messages, *reply_messages(builder.output)]
        size = len(json.dumps([response, messages[known:]])) + (self.before.size if self.before else 0)
        self.store.put(self.tenant.owner, self.id, Stored(response, messages, self.session, size))


@router.post("")
async def create(body: ResponsesRequest, request: Request) -> Response:
    """Answer input items, at once or as it is written."""
    door = door_of(request)
    tokenizer = door.engine.tokenizer
    model = door.check_model(body.model)
    asked, final = _asked(body, request)
    tools, choice = read.chosen_tools(body)
    chat = ChatRequest(
        messages=read.with_instructions(body.instructions, asked.messages),
        tenant=asked.tenant,
        tools=read.chat_tools(tools),
        tool_choice=choice,
        parallel_calls=body.parallel_tool_calls,
        params=SamplingParams(**{"temperature": 1.0, **door.defaults, **_sampling(body)}),
        constraint=read.constraint(body),
        template_arguments=read.template_arguments(body),
        early_calls=body.stream,
        session=asked.session,
        final=final,
    )
    (turn,) = await door.begin(chat)
    builder = ResponseBuilder(_response(asked, model, chat.params))
    if body.stream:
        start = named(builder.start())
        return await stream(request, _events(asked, turn, builder, tokenizer), partial(_failed, builder), start=start)
    async for delta in turn:
        _add(builder, delta, tokenizer)
    response = _end(turn, builder)[-1]["response"]
    asked.keep(builder, response)
    return answer(response)


@router.get("/{id}")
async def retrieve(id: str, request: Request) -> Response:
    """Return a stored response."""
    return answer(_store_of(request).get(tenant_of(request).owner, id).response)


@router.delete("/{id}")
async def delete(id: str, request: Request) -> Response:
    """Forget a stored response."""
    _store_of(request).delete(tenant_of(request).owner, id)
    return answer({"id": id, "object": "response", "deleted": True})


def _store_of(request: Request) -> ResponseStore:
    store: ResponseStore = request.app.state.responses
    return store


def _asked(body: ResponsesRequest, request: Request) -> tuple[_Asked, bool]:
    """Return the chat that a body asks for, and whether its program ends with it."""
    id, tenant, store = f"resp_{secrets.token_hex(24)}", tenant_of(request), _store_of(request)
    before = store.get(tenant.owner, body.previous_response_id) if body.previous_response_id else None
    told = before.messages if before else ()
    messages = [*told, *read.conversation(body.input, told)]
    session, final = session_of(request)
    if session is None and before is not None:
        session = before.session
    elif session is None and body.store and body.tools:  # whoever has tools will come back
        session = id
    return _Asked(id, body, tenant, store, before, messages, session), final


def _sampling(body: ResponsesRequest) -> dict[str, Any]:
    """Sampling parameters that the request gives."""
    names = ("temperature", "top_p", "presence_penalty", "frequency_penalty")
    given = {name: value for name in names if (value := getattr(body, name)) is not None}
    given["max_tokens"] = body.max_output_tokens or LARGEST
    if body.top_logprobs is not None or LOGPROBS in body.include:
        given["logprobs"] = body.top_logprobs or 0
    return given


def _response(asked: _Asked, model: str, params: SamplingParams) -> dict[str, Any]:
    """Make the fields of a response that are known before it begins."""
    body = asked.body
    return {
        "id": asked.id,
        "object": "response",
        "created_at": int(time.time()),
        "model": model,
        "previous_response_id": body.previous_response_id,
        "instructions": body.instructions,
        "metadata": body.metadata,
        "tools": [_tool(tool) for tool in body.tools if isinstance(tool, FunctionTool)],
        "tool_choice": body.tool_choice if isinstance(body.tool_choice, str) else body.tool_choice.model_dump(),
        "parallel_tool_calls": body.parallel_tool_calls,
        "text": {"format": body.text.format.model_dump(by_alias=True)},
        "reasoning": {"effort": body.reasoning.effort, "summary": None},
        "temperature": params.temperature,
        "top_p": params.top_p,
        "presence_penalty": params.presence_penalty,
        "frequency_penalty": params.frequency_penalty,
        "top_logprobs": body.top_logprobs or 0,
        "max_output_tokens": body.max_output_tokens,
        "max_tool_calls": None,
        "truncation": "disabled",
        "background": False,
        "store": body.store,
        "service_tier": "default",
        "prompt_cache_key": body.prompt_cache_key,
        "safety_identifier": None,
        "user": None,
    }


def _tool(tool: FunctionTool) -> dict[str, Any]:
    return tool.model_dump() | {"parameters": tool.parameters or None}


def _end(turn: Turn, builder: ResponseBuilder) -> list[dict[str, Any]]:
    """Finish a response; returns the last events."""
    assert turn.finish_reason is not None  # its last delta is out
    assert turn.usage is not None
    return builder.finish(turn.finish_reason, turn.usage)


def _add(builder: ResponseBuilder, delta: TurnDelta, tokenizer: Tokenizer) -> list[dict[str, Any]]:
    logprobs = chat_logprobs(tokenizer, delta.logprobs)["content"] if delta.logprobs else ()
    return builder.add(delta.parts, len(delta.token_ids), logprobs)


async def _events(asked: _Asked, turn: Turn, builder: ResponseBuilder, tokenizer: Tokenizer) -> AsyncIterator[bytes]:
    async for delta in turn:
        if events := _add(builder, delta, tokenizer):
            yield named(events)
    last = _end(turn, builder)
    asked.keep(builder, last[-1]["response"])
    yield named(last) + DONE


def _failed(builder: ResponseBuilder, failure: Failure) -> bytes:
    return named(builder.fail(REFUSED.get(failure.status, "server_error"), failure.message)) + DONE
