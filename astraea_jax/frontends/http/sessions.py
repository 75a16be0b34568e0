"""Routes for what lies between requests: what a request would reuse, sessions, and hints that come during a wait.

A tenant sees and changes its own sessions only; the same name is another session to everybody else.
"""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from typing import Annotated, Any

from fastapi import APIRouter, Request, Response
from pydantic import Field, model_validator

from astraea_jax.frontends.hint_fields import KvHints, ToolProfileAction, ToolWait, ToolWaitAction
from astraea_jax.frontends.hints import Outcome, named_actions, read_tool_wait, unknown
from astraea_jax.frontends.http import chat, messages
from astraea_jax.frontends.http.agent_fields import Name
from astraea_jax.frontends.http.bodies import prepared
from astraea_jax.frontends.http.calls import door_of, program_of, tenant_of
from astraea_jax.frontends.http.chat_schema import MAX_MESSAGES, ChatCompletionRequest, Message
from astraea_jax.frontends.http.door import Door, rendered_tools
from astraea_jax.frontends.http.errors import NotFound
from astraea_jax.frontends.http.messages_schema import CountRequest
from astraea_jax.frontends.http.responses_asked import Asked
from astraea_jax.frontends.http.responses_schema import ResponsesRequest
from astraea_jax.frontends.http.routes import JsonRoute, answer
from astraea_jax.frontends.http.sampling_schema import Model, TokenId
from astraea_jax.frontends.http.tenants import Tenant
from astraea_jax.frontends.http.turns import ChatRequest
from astraea_jax.frontends.http.usage import known_of
from astraea_jax.frontends.identity import identify

router = APIRouter(route_class=JsonRoute, prefix="/v1", tags=["sessions"])

MAX_TOKENS = 2**20


class ForkRequest(Model):
    """The body of a fork: the name of the new session."""

    session_id: Annotated[Name, Field(min_length=1)]


class ReplaceTailRequest(Model):
    """The body of a replacement: messages that come after the first ``keep`` ones, or the tokens of a whole prompt."""

    keep: Annotated[int, Field(ge=0, le=MAX_MESSAGES)] = 0
    messages: Annotated[list[Message], Field(max_length=MAX_MESSAGES, fail_fast=True)] | None = None
    tokens: Annotated[list[TokenId], Field(min_length=1, max_length=MAX_TOKENS, fail_fast=True)] | None = None

    @model_validator(mode="after")
    def _one_of_them(self) -> ReplaceTailRequest:
        if (self.messages is None) == (self.tokens is None):
            raise ValueError("give either messages or tokens")
        return self


@router.post("/cache/explain")
async def explain_chat(request: Request, body: ChatCompletionRequest) -> Response:
    """Say what a chat completion would reuse, and why not more; nothing is queued."""
    door = door_of(request)
    door.check_model(body.model)
    return await _explained(door, await prepared(request, partial(chat.request_of, request, body, door)))


@router.post("/cache/explain/messages")
async def explain_messages(request: Request, body: CountRequest) -> Response:
    """Say the same of a request of Anthropic's Messages API."""
    door = door_of(request)
    door.check_model(body.model)
    return await _explained(door, await prepared(request, partial(messages.chat_of, body, request)))


@router.post("/cache/explain/responses")
async def explain_response(request: Request, body: ResponsesRequest) -> Response:
    """Say the same of a request for a response."""
    door = door_of(request)
    door.check_model(body.model)
    tenant, program, store = tenant_of(request), program_of(request, body), request.app.state.responses

    def asked() -> ChatRequest:
        return Asked.of(body, tenant, store, program).chat(door.defaults)

    return await _explained(door, await prepared(request, asked))


@router.get("/sessions/{id:path}")
async def show(request: Request, id: str) -> Response:
    """Describe the programs of a session."""
    door, tenant = door_of(request), tenant_of(request)
    return answer({"session_id": id, "programs": await _shown(door, tenant, id)})


@router.delete("/sessions/{id:path}")
async def end(request: Request, id: str) -> Response:
    """End a session: its requests are cancelled, and its KV is given up."""
    door, tenant = door_of(request), tenant_of(request)
    await _shown(door, tenant, id)
    door.programs.end_session(tenant, id)
    return answer({"session_id": id, "deleted": True})


@router.post("/sessions/{id:path}/fork")
async def fork(request: Request, id: str, body: ForkRequest) -> Response:
    """Open a session that begins where this one is."""
    await door_of(request).sessions.fork(tenant_of(request), id, body.session_id)
    return answer({"session_id": body.session_id, "parent_session_id": id})


@router.post("/sessions/{id:path}/replace_tail")
async def replace_tail(request: Request, id: str, body: ReplaceTailRequest) -> Response:
    """Replace the end of a session's history, and wait until the next prompt is computed, in idle time."""
    given = None if body.messages is None else [message.plain() for message in body.messages]
    sessions, tenant = door_of(request).sessions, tenant_of(request)
    tokens, computed = await sessions.replace_tail(tenant, id, body.keep, given, body.tokens)
    return answer({"session_id": id, "tokens": tokens, "computed": computed})


@router.post("/kv_hints")
async def hint(request: Request, body: KvHints) -> Response:
    """Take hints about waits that programs are in now."""
    door, tenant = door_of(request), tenant_of(request)
    session = identify(request.headers).session
    outcomes = []
    for where, action in named_actions(body):
        if body.known and isinstance(action, ToolWaitAction):
            outcomes.append(_told(door, tenant, session, where, action.payload))
        else:
            profile = body.known and isinstance(action, ToolProfileAction)
            outcomes.append(Outcome(where, "ignored", "it goes with a request" if profile else unknown(body)))
    return answer({"message_id": body.message_id, "outcomes": [outcome.plain() for outcome in outcomes]})


def _told(door: Door, tenant: Tenant, session: str | None, where: str, wait: ToolWait) -> Outcome:
    """Tell the programs that an announced wait is of; returns what became of the announcement."""
    expected_s, outcome = read_tool_wait(where, wait)
    named = wait.session_id or session
    if named is None and not wait.tool_call_ids:
        return Outcome(where, "ignored", "it names no session and no call")
    if expected_s is None or door.sessions.hint(tenant, named, wait.tool_call_ids, expected_s):
        return outcome
    return Outcome(where, "ignored", "no such program waits")


async def _shown(door: Door, tenant: Tenant, session: str) -> list[dict[str, Any]]:
    views = await door.sessions.show(tenant, session)
    if not views:
        raise NotFound(f"there is no session {session[:100]!r}: it has ended, has expired, or has never begun")
    hidden = ("number", "key")
    return [
        {"program": view.key[1]} | {name: value for name, value in asdict(view).items() if name not in hidden}
        for view in views
        if isinstance(view.key, tuple)
    ]


async def _explained(door: Door, asked: ChatRequest) -> Response:
    door.check(asked)
    look = await door.sessions.look(
        asked.tenant,
        asked.session,
        asked.messages,
        rendered_tools(asked),
        asked.template_arguments,
        characters=asked.characters,
    )
    held = look.held
    return answer(
        {
            "program": look.program,
            "prompt_tokens": held.tokens,
            "held": {"device": held.device, "host": held.host, "nowhere": held.nowhere},
            "known": known_of(look.known),
        }
    )
