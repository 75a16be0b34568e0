"""A request for a response: what it continues and quotes, the chat it asks for, and where its response belongs."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from astraea_jax.engine.sampling import SamplingParams
from astraea_jax.errors import RequestError
from astraea_jax.frontends.http import responses_input as read
from astraea_jax.frontends.http.calls import ProgramFields
from astraea_jax.frontends.http.responses_items import listed, resolved
from astraea_jax.frontends.http.responses_output import reply_messages
from astraea_jax.frontends.http.responses_record import Record
from astraea_jax.frontends.http.responses_schema import LARGEST, FunctionTool, ResponsesRequest
from astraea_jax.frontends.http.responses_store import ResponseStore, Stored
from astraea_jax.frontends.http.tenants import Tenant
from astraea_jax.frontends.http.turns import ChatRequest

LOGPROBS = "message.output_text.logprobs"
"""In ``include``: the probability of each token of the text."""


@dataclass(frozen=True)
class Asked:
    """One request, and where its response belongs."""

    id: str
    body: ResponsesRequest
    tenant: Tenant
    store: ResponseStore
    before: Stored | None
    """What it continues."""
    items: list[dict[str, Any]]
    """All input items of the conversation."""
    messages: list[dict[str, Any]]
    """The conversation, without instructions."""
    size: int
    """Bytes of what the request has brought, about."""
    program: ProgramFields

    @classmethod
    def of(cls, body: ResponsesRequest, tenant: Tenant, store: ResponseStore, program: ProgramFields) -> Asked:
        """Read a request.

        Args:
            body: of the request.
            tenant: whose it is.
            store: has what it continues and quotes.
            program: what it says about its program; without a name that of what it continues.

        Raises:
            NotFound: what it continues or quotes is not there.
            RequestError: what it continues has failed, or a result belongs to no call.
        """
        id, before = f"resp_{secrets.token_hex(24)}", None
        if body.previous_response_id:
            before = store.get(tenant.owner, body.previous_response_id)
            if before.response["status"] == "failed":
                raise RequestError("previous_response_id names a response that has failed; continue the one before it")
        items = resolved(body.input, partial(store.item, tenant.owner))
        told = before.messages if before else ()
        messages = [*told, *read.conversation(items, told)]
        if program["session"] is None and before is not None:
            program["session"] = before.session
        new = [*map(listed, items)]
        size = len(json.dumps([messages[len(told) :], new, body.instructions, body.metadata]))
        size += sum(len(str(tool)) for tool in body.tools)
        every = [*(before.conversation if before else ()), *new]
        return cls(id, body, tenant, store, before, every, messages, size, program)

    def keep(self, response: dict[str, Any], record: Record | None) -> None:
        """Store a response that has ended, with the record of its events if it has one."""
        if not self.body.store:
            return
        known = len(self.before.conversation) if self.before else 0
        answers = reply_messages(response["output"])
        messages = [*self.messages, *answers]
        size = self.size + len(json.dumps([response["output"], answers]))
        size += (record.bytes if record else 0) + (self.before.size if self.before else 0)
        stored = Stored(response, messages, self.program["session"], self.items, known, size, record)
        self.store.put(self.tenant.owner, self.id, stored)

    def chat(self, defaults: Mapping[str, Any]) -> ChatRequest:
        """Return the chat that is asked for; ``defaults`` are sampling parameters that the request may override."""
        body = self.body
        tools, choice = read.chosen_tools(body)
        return ChatRequest(
            messages=read.with_instructions(body.instructions, self.messages),
            tenant=self.tenant,
            tools=read.chat_tools(tools),
            tool_choice=choice,
            parallel_calls=body.parallel_tool_calls,
            params=SamplingParams(**{"temperature": 1.0, **defaults, **_sampling(body)}),
            constraint=read.constraint(body),
            template_arguments=read.template_arguments(body),
            early_calls=body.stream,
            **self.program,
        )

    def response(self, model: str, params: SamplingParams) -> dict[str, Any]:
        """Return the fields of the response that are known before it begins."""
        body = self.body
        return {
            "id": self.id,
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
            "background": body.background,
            "store": body.store,
            "service_tier": "default",
            "prompt_cache_key": body.prompt_cache_key,
            "safety_identifier": None,
            "user": None,
        }


def _sampling(body: ResponsesRequest) -> dict[str, Any]:
    """Sampling parameters that the request gives."""
    names = ("temperature", "top_p", "presence_penalty", "frequency_penalty")
    given = {name: value for name in names if (value := getattr(body, name)) is not None}
    given["max_tokens"] = body.max_output_tokens or LARGEST
    if body.top_logprobs is not None or LOGPROBS in body.include:
        given["logprobs"] = body.top_logprobs or 0
    return given


def _tool(tool: FunctionTool) -> dict[str, Any]:
    return tool.model_dump() | {"parameters": tool.parameters or None}
