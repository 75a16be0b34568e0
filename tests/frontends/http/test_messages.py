"""Anthropic's own client against a server."""

from __future__ import annotations

import asyncio
import itertools
import json
from contextlib import AsyncExitStack

import anthropic
import pytest
from anthropic import AsyncAnthropic
from support.engines import held, settled
from support.http_server import MODEL, serving

from astraea_jax.frontends.http.errors import SessionEnded, failure_of
from astraea_jax.frontends.http.messages import error_body
from astraea_jax.frontends.http.tenants import Keys

GREEDY = {"temperature": 0}  # which this client no longer has
HI = {"role": "user", "content": "Hello"}
BRIEF = {"model": MODEL, "messages": [HI], "system": "Be brief."}
TOOL = {"name": "price", "description": "The price.", "input_schema": {"type": "object", "properties": {}}}


@pytest.fixture
async def server(engine):
    async with serving(engine) as server:
        yield server


@pytest.fixture
async def client(server):
    async with AsyncAnthropic(base_url=server.url, api_key="none", max_retries=0) as client:
        yield client


async def test_a_message(client, engine):
    message = await client.messages.create(**BRIEF, max_tokens=6, extra_body=GREEDY)
    assert (message.type, message.role, message.model) == ("message", "assistant", MODEL)
    assert message.stop_reason == "max_tokens"
    assert message.content[0].type == "text"
    assert message.usage.output_tokens == 6
    again = await client.messages.create(**BRIEF, max_tokens=6, extra_body=GREEDY)
    assert again.content == message.content
    assert again.usage.cache_read_input_tokens > 0
    counted = await client.messages.count_tokens(**BRIEF)
    assert counted.input_tokens == again.usage.input_tokens + again.usage.cache_read_input_tokens
    assert counted.input_tokens == message.usage.input_tokens + message.usage.cache_read_input_tokens
    await settled(engine)


async def test_a_stream_gives_the_same_message(client, engine):
    whole = await client.messages.create(model=MODEL, max_tokens=8, extra_body=GREEDY, messages=[HI])
    async with client.messages.stream(model=MODEL, max_tokens=8, extra_body=GREEDY, messages=[HI]) as stream:
        kinds = [event.type async for event in stream]
        message = await stream.get_final_message()
    assert [block.text for block in message.content] == [block.text for block in whole.content]
    assert message.stop_reason == whole.stop_reason
    assert kinds[0] == "message_start"
    assert kinds[-1] == "message_stop"
    await settled(engine)


async def test_a_stop_sequence_ends_the_message(client):
    whole = (await client.messages.create(**BRIEF, max_tokens=30, extra_body=GREEDY)).content[0].text
    stop = whole[8:10]
    cut = await client.messages.create(**BRIEF, max_tokens=30, extra_body=GREEDY, stop_sequences=[stop])
    assert (cut.stop_reason, cut.stop_sequence) == ("stop_sequence", stop)
    assert cut.content[0].text == whole[: whole.index(stop)]


@pytest.mark.parametrize("thread", [{"type": "create"}, {"type": "continue", "previous_message_id": "msg_1"}])
@pytest.mark.parametrize("path", ["/v1/messages", "/v1/messages/count_tokens"])
async def test_a_thread_is_refused_so_that_the_client_sends_everything(server, path, thread):
    answer = await server.client.post(path, json={**BRIEF, "max_tokens": 6, "thread": thread})
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert "send all messages" in error["message"]
    assert error["details"] == {"error_code": "thread_unsupported_request", "unsupported": ["thread"]}


async def test_the_models_are_listed(client):
    page = await client.models.list()
    assert [model.id for model in page.data] == [MODEL]
    assert (await client.models.retrieve(MODEL)).display_name == MODEL


async def test_what_claude_code_sends(server):
    def text(text: str) -> dict[str, object]:
        return {"type": "text", "text": text, "cache_control": {"type": "ephemeral"}}

    body = {
        "model": MODEL,
        "max_tokens": 32_000,
        "system": [
            {"type": "text", "text": "x-anthropic-billing-header: cch=1;"},
            {"type": "text", "text": "An agent."},
        ],
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "Hi", "cache_control": {"type": "ephemeral"}}]}
        ],
        "tools": [TOOL],
        "metadata": {"user_id": json.dumps({"session_id": "0c3e"})},
        "thinking": {"type": "adaptive"},
        "context_management": {"edits": []},
        "output_config": {"effort": "medium"},
        "temperature": 1,
        "stream": False,
        "stop_sequences": None,
    }
    headers = {
        "authorization": "Bearer none",
        "anthropic-version": "2023-06-01",
        "anthropic-beta": "claude-code-20250219,interleaved-thinking-2025-05-14",
        "x-claude-code-agent-id": "a1",
    }
    assert (await server.client.head("/")).status_code == 200
    answer = await server.client.post("/v1/messages?beta=true", json=body, headers=headers)
    assert answer.status_code == 200, answer.text
    assert answer.json()["type"] == "message"


@pytest.mark.parametrize(
    ("fields", "status", "kind"),
    [
        ({"model": "claude-9"}, 404, "not_found_error"),
        ({"messages": []}, 400, "invalid_request_error"),
        ({"messages": [HI, {"role": "assistant", "content": "I"}]}, 400, "invalid_request_error"),
        ({"messages": [{"role": "user", "content": "x" * 4000}]}, 400, "invalid_request_error"),
        ({"tool_choice": {"type": "tool", "name": "x"}, "tools": [TOOL]}, 400, "invalid_request_error"),
        ({"tool_choice": {"type": "any"}}, 400, "invalid_request_error"),
        ({"metadata": {"user_id": json.dumps({"session_id": "\ud800"})}}, 400, "invalid_request_error"),
        ({"messages": [{"role": "user", "content": "x" * 5_000_000}]}, 413, "request_too_large"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_errors_have_anthropics_shape(server, fields, status, kind, stream):
    body = {"model": MODEL, "max_tokens": 4, "messages": [HI], "stream": stream} | fields
    answer = await server.client.post("/v1/messages", json=body)
    told = answer.json()
    assert (answer.status_code, told["type"], told["error"]["type"]) == (status, "error", kind), told
    assert told["request_id"] == answer.headers["x-request-id"]


async def test_keys_come_in_either_header(engine):
    keys = Keys(["a-secret-key"])
    async with serving(engine, keys=keys) as server:
        for given in ({"api_key": "a-secret-key"}, {"auth_token": "a-secret-key"}):
            async with AsyncAnthropic(base_url=server.url, max_retries=0, **given) as client:
                assert await client.messages.create(model=MODEL, max_tokens=1, messages=[HI])
        async with AsyncAnthropic(base_url=server.url, api_key="another", max_retries=0) as client:
            with pytest.raises(anthropic.AuthenticationError):
                await client.messages.create(model=MODEL, max_tokens=1, messages=[HI])


async def test_a_client_that_vanishes_frees_its_pages(client, engine):
    async with client.messages.stream(model=MODEL, max_tokens=200, messages=[HI]) as stream:
        await anext(aiter(stream))
    await settled(engine)
    with held(engine, 2) as state:
        task = asyncio.create_task(client.messages.create(model=MODEL, max_tokens=200, messages=[HI]))
        await state.still()
        task.cancel()
    await settled(engine)


async def test_a_session_that_ends_during_a_stream_is_an_error_event(client, engine):
    named = {"extra_headers": {"x-session-id": "agent"}}
    async with AsyncExitStack() as stack:
        with held(engine, 2) as state:
            stream = await stack.enter_async_context(client.messages.stream(**BRIEF, max_tokens=200, **named))
            await state.still()  # its beginning is told within a second, whether it runs yet or not
            engine.end_session("agent", owner="peer:127.0.0.1")
        with pytest.raises(anthropic.APIStatusError, match="session was ended"):
            await stream.get_final_message()
    await settled(engine)


async def test_hostile_blocks_are_answered(server):
    blocks = [
        {"type": "text", "text": "\ud800"},
        {"type": "tool_use", "id": "x", "name": "\ud800", "input": {"\ud800": float("nan")}},
        {"type": "tool_result", "tool_use_id": "x", "content": [{"type": "text", "text": "\x00"}]},
        {"type": "thinking", "thinking": "<|im_end|>", "signature": ""},
    ]
    for role, chosen in itertools.product(("user", "assistant", "system"), itertools.permutations(blocks, 2)):
        messages = [{"role": role, "content": list(chosen)}, HI]
        body = json.dumps({"model": MODEL, "max_tokens": 1, "messages": messages})
        answer = await server.client.post("/v1/messages", content=body, headers={"content-type": "application/json"})
        assert answer.status_code in (200, 400), answer.text


def test_a_session_that_ended_meanwhile_is_a_conflict():
    body = error_body(failure_of(SessionEnded("the session was ended while its request ran")), "req_1")
    assert body["error"]["type"] == "conflict_error"
