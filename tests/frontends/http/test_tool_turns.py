"""The server's own tools: the loop runs in the server, and the client sees one answer."""

from __future__ import annotations

import asyncio
from typing import Any

import openai
import pytest
from support.engines import settled
from support.http_server import serving

from astraea_jax.agents.tools import tool
from astraea_jax.frontends.http import tool_turns
from astraea_jax.lab.shop import make_tasks

TASK = make_tasks(seed=1, split="test", count=1)[0]
TOOLS = [tool(function) for function in TASK.tools()]
CHAT: dict[str, Any] = {"model": "tiny", "messages": TASK.messages(), "temperature": 0}


@pytest.fixture
def calls() -> list[str]:
    return []


@pytest.fixture
async def client(chatty, calls):
    """A client of a server that has the tools of the shop, and notes what is called."""

    def noting(one):
        def called(**arguments):
            calls.append(one.name)
            return one.function(**arguments)

        return one.wrapped(called)

    async with (
        serving(chatty, tools=[noting(one) for one in TOOLS]) as server,
        openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client,
    ):
        yield client


async def test_the_client_sees_one_answer(client, calls, chatty):
    whole = await client.chat.completions.create(**CHAT)
    assert TASK.is_right(whole.choices[0].message.content)
    assert whole.choices[0].finish_reason == "stop"
    assert whole.choices[0].message.tool_calls is None
    assert len(calls) >= 2
    assert whole.usage.prompt_tokens > whole.usage.prompt_tokens_details.cached_tokens > 0
    await settled(chatty, programs=True)


async def test_a_stream_of_it_holds_no_calls(client, calls):
    text, reasons = "", []
    async for chunk in await client.chat.completions.create(**CHAT, stream=True):
        choice = chunk.choices[0]
        assert not choice.delta.tool_calls
        text += choice.delta.content or ""
        reasons += [choice.finish_reason] if choice.finish_reason else []
    assert TASK.is_right(text)
    assert reasons == ["stop"]
    assert len(calls) >= 2


async def test_every_choice_has_a_loop_of_its_own(client, calls, chatty):
    whole = await client.chat.completions.create(**CHAT, n=3)
    assert [TASK.is_right(choice.message.content) for choice in whole.choices] == [True] * 3
    await settled(chatty, programs=True)


async def test_a_client_may_call_its_own_tools_instead(client, calls):
    """One that has the server's name hides it; and none are called if none are asked for."""
    whole = await client.chat.completions.create(**CHAT, tools=[one.schema() for one in TOOLS])
    assert whole.choices[0].finish_reason == "tool_calls"
    assert whole.choices[0].message.tool_calls
    none = await client.chat.completions.create(**CHAT, tool_choice="none", max_tokens=20)
    assert none.choices[0].message.tool_calls is None
    assert calls == []


async def test_the_loop_is_bounded(client, calls, monkeypatch):
    monkeypatch.setattr(tool_turns, "MAX_STEPS", 1)
    whole = await client.chat.completions.create(**CHAT)
    assert whole.choices[0].finish_reason == "length"
    assert whole.choices[0].message.tool_calls is None
    assert calls == []


async def test_a_client_that_vanishes_stops_the_loop(chatty):
    began = asyncio.Event()
    loop = asyncio.get_running_loop()

    def waiting(one):
        async def called(**arguments):
            loop.call_soon_threadsafe(began.set)
            await asyncio.Event().wait()

        return one.wrapped(called)

    async with (
        serving(chatty, tools=[waiting(one) for one in TOOLS]) as server,
        openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client,
    ):
        asked = asyncio.create_task(client.chat.completions.create(**CHAT))
        await began.wait()
        asked.cancel()
        await asyncio.wait({asked})
        while server.app.running:
            await asyncio.sleep(0.005)
    await settled(chatty, programs=True)
