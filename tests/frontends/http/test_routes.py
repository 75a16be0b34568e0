"""Streams of events while nothing comes: they begin, they say that they are alive, and errors keep their status."""

from __future__ import annotations

import json

import anthropic
import openai
import pytest
from support.engines import held, settled, until
from support.http_server import MODEL, serving

from astraea_jax.frontends.http.guard import Bounds
from astraea_jax.frontends.http.waiting import Limits

HELLO = [{"role": "user", "content": "Hello"}]
BODIES = {
    "/v1/chat/completions": {"messages": HELLO, "max_tokens": 4},
    "/v1/completions": {"prompt": "Hello", "max_tokens": 4},
    "/v1/responses": {"model": MODEL, "input": "Hello", "max_output_tokens": 4},
    "/v1/messages": {"model": MODEL, "messages": HELLO, "max_tokens": 4},
}
STARTS = {
    "/v1/responses": ["response.created", "response.in_progress"],
    "/v1/messages": ["message_start", "ping"],
}
EAGER = Bounds(start_s=0.0, ping_s=0.01)
PATIENT = Bounds(start_s=3600.0, ping_s=3600.0)


def types(text: str) -> list[str]:
    """Types of the events that have one."""
    data = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: ")]
    return [json.loads(each).get("type", "chunk") for each in data if each != "[DONE]"]


@pytest.mark.parametrize("path", BODIES)
async def test_a_stream_begins_and_pings_while_the_prompt_is_computed(engine, path):
    ping = "event: ping\n" if path == "/v1/messages" else ": ping\n\n"
    async with serving(engine, bounds=EAGER) as server:
        with held(engine, 0):
            body = {**BODIES[path], "stream": True}
            async with server.client.stream("POST", path, json=body) as answer:
                assert answer.status_code == 200
                pieces = answer.aiter_text()
                text = ""
                while text.count(ping) < 3:
                    text += await anext(pieces)
        assert types(text)[:2] == STARTS.get(path, [])
    await settled(engine)


async def test_clients_read_past_pings(engine):
    async with serving(engine, bounds=EAGER) as server:
        chats = openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
        messages = anthropic.AsyncAnthropic(base_url=server.url, api_key="none", max_retries=0)
        async with chats, messages:
            with held(engine, 0) as still:
                chat = await chats.chat.completions.create(
                    model=MODEL, messages=HELLO, max_tokens=4, stream=True, extra_body={"ignore_eos": True}
                )
                response = await chats.responses.create(model=MODEL, input="Hello", max_output_tokens=4, stream=True)
                message = await messages.messages.create(model=MODEL, messages=HELLO, max_tokens=4, stream=True)
                await still.still()
            assert [chunk async for chunk in chat][-1].choices[0].finish_reason == "length"
            assert [event async for event in response][-1].response.usage.output_tokens <= 4
            assert [event async for event in message][-1].type == "message_stop"
    await settled(engine)


@pytest.mark.parametrize("path", BODIES)
async def test_what_goes_wrong_before_the_beginning_has_a_status(engine, path):
    body = {**BODIES[path], "stream": True}
    async with serving(engine, bounds=PATIENT, limits=Limits(wait_s=0.02)) as server:
        with held(engine, 0):
            assert (await server.client.post(path, json=body)).status_code == 429
    await settled(engine)


@pytest.mark.parametrize("path", BODIES)
async def test_what_is_refused_has_a_status_however_soon_streams_begin(engine, path):
    async with serving(engine, bounds=EAGER, limits=Limits(choices=1)) as server:
        with held(engine, 0):
            async with server.client.stream("POST", path, json={**BODIES[path], "stream": True}) as first:
                assert first.status_code == 200
                assert (await server.client.post(path, json={**BODIES[path], "stream": True})).status_code == 429
        bad = {**BODIES[path], "stream": True, "temperature": "hot"}
        assert (await server.client.post(path, json=bad)).status_code == 400
    await settled(engine)


@pytest.mark.parametrize("path", BODIES)
async def test_what_goes_wrong_after_the_beginning_is_an_event(engine, path):
    async with serving(engine, bounds=EAGER, limits=Limits(wait_s=0.05)) as server:
        with held(engine, 0):
            answer = await server.client.post(path, json={**BODIES[path], "stream": True})
        assert answer.status_code == 200
        assert "no token within" in answer.text
        assert [kind for kind in types(answer.text) if kind != "ping"][-1] in ("chunk", "error", "response.failed")
    await settled(engine)


@pytest.mark.parametrize("path", BODIES)
async def test_a_client_that_vanishes_before_the_first_token_frees_everything(engine, path):
    async with serving(engine, bounds=EAGER) as server:
        with held(engine, 0):
            async with server.client.stream("POST", path, json={**BODIES[path], "stream": True}) as answer:
                assert answer.status_code == 200
            await until(lambda: not server.door.waiting.choices)
    await settled(engine)
