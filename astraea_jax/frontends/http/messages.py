"""Anthropic's Messages API, so that its SDKs and Claude Code can be pointed here.

The model answers under its own name and those of ``--served_model_name``, and no other. So a client with names of its
own is either told the model's (Claude Code reads ``ANTHROPIC_MODEL`` and ``ANTHROPIC_DEFAULT_HAIKU_MODEL``), or the
server is given the client's (``--served_model_name=claude-sonnet-4-5``).

A conversation that ends with the assistant's own message (prefill) is refused; so are images, Anthropic's own tools,
and threads, which leave the conversation with the server: the tool runner of Anthropic's SDK asks for one, and goes on
without it.
"""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from astraea_jax.engine.generation import Usage
from astraea_jax.engine.sampling import SamplingParams
from astraea_jax.frontends.http import messages_input as read
from astraea_jax.frontends.http.calls import door_of, program_of, tenant_of
from astraea_jax.frontends.http.errors import Failure, ThreadsUnserved
from astraea_jax.frontends.http.messages_output import PING, MessageBuilder
from astraea_jax.frontends.http.messages_schema import CountRequest, MessagesRequest
from astraea_jax.frontends.http.routes import JsonRoute, answer, named, stream
from astraea_jax.frontends.http.turns import ChatRequest, Turn
from astraea_jax.frontends.http.usage import cached_header, report_of

ERROR_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    529: "overloaded_error",
}

router = APIRouter(route_class=JsonRoute, tags=["messages"])


@router.post("/v1/messages")
async def create(body: MessagesRequest, request: Request) -> Response:
    """Answer a conversation, at once or as it is written."""
    door = door_of(request)
    model = door.check_model(body.model)
    (turn,) = await door.begin(chat_of(body, request, body.max_tokens))
    builder = MessageBuilder(f"msg_{secrets.token_hex(16)}", model)
    if body.stream:
        request_id = str(request.state.request_id)
        return await stream(
            request,
            _events(turn, builder),
            lambda failure: named([error_body(failure, request_id)]),
            start=named(builder.start(turn.prompt_tokens)),
            ping=named([PING]),
        )
    async for delta in turn:
        builder.add(delta.parts)
    return answer(builder.message(*_end_of(turn)), cached_header(turn))


@router.post("/v1/messages/count_tokens")
async def count_tokens(body: CountRequest, request: Request) -> Response:
    """Count the tokens of a prompt."""
    door = door_of(request)
    door.check_model(body.model)
    return answer({"input_tokens": len(await door.prompt(chat_of(body, request)))})


@router.head("/")
async def probe() -> Response:
    """Answer whoever looks whether a server is here at all, as Claude Code does."""
    return Response()


def error_body(failure: Failure, request_id: str) -> dict[str, Any]:
    """Return a failure in Anthropic's shape."""
    kind = ERROR_TYPES.get(failure.status, "api_error" if failure.status >= 500 else "invalid_request_error")
    error: dict[str, Any] = {"type": kind, "message": failure.message}
    if failure.code == "thread_unsupported_request":  # what clients go by
        error["details"] = {"error_code": failure.code, "unsupported": ["thread"]}
    return {"type": "error", "error": error, "request_id": request_id}


def chat_of(body: CountRequest, request: Request, max_tokens: int = 1) -> ChatRequest:
    """Return the chat that a call asks for.

    Raises:
        RequestError: it asks for what is not served, or contradicts itself.
    """
    if body.thread is not None:
        raise ThreadsUnserved("threads are not served: send all messages, without thread")
    params: dict[str, Any] = {"max_tokens": max_tokens}
    user_id = None
    if isinstance(body, MessagesRequest):
        user_id = body.metadata.user_id if body.metadata else None
        params["stop"] = tuple(body.stop_sequences)
        given = {name: getattr(body, name) for name in ("temperature", "top_p", "top_k")}
        params |= {name: value for name, value in given.items() if value is not None}
    return ChatRequest(
        messages=read.chat_messages(body, keep_billing=not door_of(request).programs.conversations.normalise),
        tenant=tenant_of(request),
        tools=read.chat_tools(body.tools),
        tool_choice=read.tool_choice(body),
        parallel_calls=read.parallel_calls(body),
        params=SamplingParams(**{"temperature": 1.0, **door_of(request).defaults, **params}),
        constraint=read.constraint(body),
        thought_tokens=body.thinking.budget_tokens if body.thinking else None,
        template_arguments=read.template_arguments(body),
        **program_of(request, body, user_id=user_id, ttls=read.lifetimes(body)),
        early_calls=isinstance(body, MessagesRequest) and body.stream,
        call_ids=lambda: f"toolu_{secrets.token_hex(12)}",
    )


def _end_of(turn: Turn) -> tuple[str, str | None, Usage, dict[str, Any]]:
    """Return how a turn has ended, in the form that builders take."""
    assert turn.finish_reason is not None  # its last delta is out
    assert turn.usage is not None
    return turn.finish_reason, turn.stop_sequence, turn.usage, report_of(turn)


async def _events(turn: Turn, builder: MessageBuilder) -> AsyncIterator[bytes]:
    async for delta in turn:
        if events := builder.add(delta.parts):
            yield named(events)
    yield named(builder.finish(*_end_of(turn)))
