"""Agents that know nothing of this engine: they speak OpenAI's chat API over HTTP, as agent frameworks do."""

from __future__ import annotations

import asyncio
import json
import ssl
import time
import uuid
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import httpx

from astraea_jax.agents.loop import Message, ProgramResult, RequestRecord, ToolRun
from astraea_jax.agents.tools import Tool
from astraea_jax.engine.generation import Usage

AGAIN_S = 0.5
"""Seconds after which a request that has failed is sent again."""


def agent_client(url: str) -> httpx.AsyncClient:
    """Make a client for one agent.

    Agents that share one pay for each other. The pool of httpx gives an idle connection to several requests before one
    of them has begun, the others look again, and each look takes the square of the connections: with 128 agents 5 ms,
    and up to 22 times for one request.

    Args:
        url: of the server, with what all paths of the agent begin with.
    """
    return httpx.AsyncClient(base_url=url, timeout=None, verify=_certificates())


@cache
def _certificates() -> ssl.SSLContext:
    return httpx.create_ssl_context()


async def run_http_agent(
    client: httpx.AsyncClient,
    messages: Sequence[Message],
    tools: Sequence[Tool],
    *,
    max_tokens: int = 256,
    attempts: int = 1,
) -> ProgramResult:
    """Run one agent until it answers without calling a tool.

    Args:
        client: its ``base_url`` is the server's, ``/v1`` included.
        messages: the conversation so far.
        tools: what the agent may call.
        max_tokens: of every request.
        attempts: times that a request is sent at most; again after a status of 429 or above 499, or a broken stream.

    Raises:
        httpx.HTTPError: the server cannot be reached, or has refused a request.
    """
    by_name = {tool.name: tool for tool in tools}
    session = uuid.uuid4().hex
    conversation, records = list(messages), list[RequestRecord]()
    body: dict[str, Any] = {"tools": [tool.schema() for tool in tools], "temperature": 0, "max_tokens": max_tokens}
    while True:
        said, record = await _answered(client, {**body, "messages": conversation}, session, attempts)
        conversation.append(said)
        calls = said.get("tool_calls") or []
        results = await asyncio.gather(*(_call(call, by_name) for call in calls))
        conversation += [result for result, _ in results]
        records.append(replace(record, tools=tuple(run for _, run in results)))
        if not calls:
            text = said["content"] or ""
            return ProgramResult(session, text, conversation, record.finish_reason, tuple(records))


async def _answered(
    client: httpx.AsyncClient, body: Mapping[str, Any], session: str, attempts: int
) -> tuple[Message, RequestRecord]:
    """Send a request until it is answered, or too often."""
    for left in reversed(range(attempts)):
        try:
            return await _request(client, body, session)
        except httpx.HTTPError as error:
            status = error.response.status_code if isinstance(error, httpx.HTTPStatusError) else 503
            if not left or status not in (429, *range(500, 600)):
                raise
            await asyncio.sleep(AGAIN_S)
    raise AssertionError("the last attempt has returned or raised")


async def _request(client: httpx.AsyncClient, body: Mapping[str, Any], session: str) -> tuple[Message, RequestRecord]:
    """The model's next turn as a message, put together from its stream, and what it took."""
    submitted = time.monotonic()
    first = None
    said: Message = {"role": "assistant", "content": ""}
    calls: dict[int, dict[str, Any]] = {}
    reason, counts = "", dict[str, Any]()
    asked = {**body, "stream": True, "stream_options": {"include_usage": True}}
    headers = {"x-session-id": session}
    async with client.stream("POST", "chat/completions", json=asked, headers=headers) as response:
        if response.is_error:
            await response.aread()
            response.raise_for_status()
        async for chunk in _events(response):
            if "error" in chunk:
                raise httpx.RemoteProtocolError(chunk["error"]["message"])
            first = first or time.monotonic()
            counts = chunk.get("usage") or counts
            for choice in chunk["choices"]:
                reason = choice["finish_reason"] or reason
                said["content"] += choice["delta"].get("content") or ""
                for part in choice["delta"].get("tool_calls") or ():
                    call = calls.setdefault(part["index"], {**part, "function": {"name": "", "arguments": ""}})
                    for name in ("name", "arguments"):
                        call["function"][name] += part["function"].get(name) or ""
    if calls:
        said["tool_calls"] = [{key: call[key] for key in ("id", "type", "function")} for call in calls.values()]
    ended = time.monotonic()
    first = first or ended
    usage = Usage(
        prompt_tokens=counts["prompt_tokens"],
        cached_tokens=counts["prompt_tokens_details"]["cached_tokens"],
        output_tokens=counts["completion_tokens"],
        queue_s=0.0,
        prefill_s=first - submitted,
        decode_s=ended - first,
        preemptions=0,
    )
    return said, RequestRecord(submitted, first, ended, counts["completion_tokens"], reason, usage, ())


async def _events(response: httpx.Response) -> AsyncIterator[dict[str, Any]]:
    async for line in response.aiter_lines():
        if line.startswith("data: ") and line != "data: [DONE]":
            yield json.loads(line[len("data: ") :])


async def _call(call: Mapping[str, Any], tools: Mapping[str, Tool]) -> tuple[Message, ToolRun]:
    began = time.monotonic()
    name = call["function"]["name"]
    content = await tools[name].call(json.loads(call["function"]["arguments"]))
    return {"role": "tool", "tool_call_id": call["id"], "content": content}, ToolRun(name, began, time.monotonic())
