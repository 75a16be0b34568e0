"""What clients get when the replica that serves them dies, before the first token and in the middle of a stream."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from contextlib import ExitStack
from typing import Any

import anthropic
import grpc
import openai
import pytest
from support.engines import break_loop, held, until
from support.http_server import MODEL, serving
from support.sizes import CHAT
from support.stub import STUB, stub_engine
from support.wide import tokens

from astraea_jax.engine.engine import Engine
from astraea_jax.engine.replicas import Replicas
from astraea_jax.engine.sampling import SamplingParams
from astraea_jax.errors import EngineDead
from astraea_jax.frontends.rpc.client import Client
from astraea_jax.frontends.rpc.server import Server
from astraea_jax.models import resolve

MESSAGES = [{"role": "user", "content": "Which colour has the sky?"}]
LONG = SamplingParams(max_tokens=30, ignore_eos=True)


@pytest.fixture
def stubs():
    made = [stub_engine(STUB) for _ in range(2)]
    replicas = Replicas([engine for engine, _ in made])
    replicas.start()
    yield replicas, [runner for _, runner in made]
    replicas.shutdown(0)


async def busy(replicas: Replicas) -> Engine:
    """Wait until a replica has a request, and return it."""
    await until(lambda: replicas.in_progress)
    return max(replicas.replicas, key=lambda engine: engine.in_progress)


async def test_http_before_the_first_token(stubs):
    replicas, runners = stubs
    body = {"prompt": [1, 2, 3], "max_tokens": 5, "ignore_eos": True, "session_id": "s"}
    async with serving(replicas) as server:
        expected = (await server.client.post("/v1/completions", json={**body, "session_id": "t"})).json()
        for runner in runners:
            runner.go.clear()
        asked = [
            asyncio.create_task(server.client.post("/v1/completions", json={**body, "stream": stream}))
            for stream in (False, True)
        ]
        dies = await busy(replicas)
        await until(lambda: replicas.in_progress == 2)
        break_loop(dies, ZeroDivisionError("a secret"))
        for runner in runners:
            runner.go.set()
        answers = await asyncio.gather(*asked)
        lost = [answer for answer in answers if answer.status_code == 503]
        assert lost, "one of them was there"
        for answer in lost:
            assert answer.headers["retry-after"] == "1"
            assert answer.json()["error"]["code"] == "not_serving"
            assert "send the whole request again" in answer.text
            assert "a secret" not in answer.text
        again = await server.client.post("/v1/completions", json=body)
        assert again.status_code == 200
        assert again.json()["choices"] == expected["choices"], "another replica computes it"


async def test_grpc_before_the_first_token_and_in_the_middle(stubs):
    """Whoever waits on the replica that dies, and whoever reads from it, is told when to come back; nobody else is."""
    replicas, _ = stubs
    server = Server(replicas)
    async with Client(f"127.0.0.1:{await server.start()}", replicas.tokenizer) as client:
        expected = await tokens(client.generate([1, 2], LONG))
        with held(replicas.replicas[0], 3), held(replicas.replicas[1], 3):
            reading = aiter(client.generate([1, 2], LONG, session="s"))
            said = [*(await anext(reading)).token_ids]
            dies = await busy(replicas)
            waiting = [asyncio.create_task(tokens(client.generate([1, 2], LONG))) for _ in range(5)]
            await until(lambda: replicas.in_progress == 6)
            break_loop(dies, ZeroDivisionError("a secret"))
        with pytest.raises(EngineDead) as middle:
            said += [token async for delta in reading for token in delta.token_ids]
        assert 0 < len(said) < len(expected)
        assert said == expected[: len(said)]
        outcomes = await asyncio.gather(*waiting, return_exceptions=True)
        lost = [outcome for outcome in outcomes if isinstance(outcome, EngineDead)]
        assert lost, "some waited there"
        assert [outcome for outcome in outcomes if outcome not in lost] == [expected] * (5 - len(lost))
        for error in (middle.value, *lost):
            assert error.__cause__.code() is grpc.StatusCode.UNAVAILABLE
            assert ("grpc-retry-pushback-ms", "1000") in tuple(error.__cause__.trailing_metadata())
            assert "a secret" not in str(error)
        assert await tokens(client.generate([1, 2], LONG, session="s")) == expected
        await server.stop(0)


async def _dies_while_read(replicas: Replicas, begin: Coroutine[Any, Any, Any]) -> Exception:
    """Let the replica die that a stream comes from; returns what the stream raises."""
    with ExitStack() as stack:
        controls = {engine: stack.enter_context(held(engine, 3)) for engine in replicas.replicas if engine.live}
        asked = asyncio.create_task(begin)
        dies = await busy(replicas)
        await controls[dies].still()
        stream = await asked
        break_loop(dies, ZeroDivisionError("a secret"))
    with pytest.raises(Exception, match="send the whole request again") as caught:
        async for _ in stream:
            pass
    assert "a secret" not in str(caught.value)
    return caught.value


async def test_sdks_in_the_middle_of_a_stream():
    """With real engines: each SDK raises an error that can be told from the end of a turn; the next try is right."""
    replicas = Replicas([Engine.from_folder(resolve("astraea-tiny"), CHAT) for _ in range(3)])
    replicas.start()
    async with serving(replicas) as server:
        chat = openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
        claude = anthropic.AsyncAnthropic(base_url=server.url, api_key="none", max_retries=0)
        greedy = {"temperature": 0.0, "ignore_eos": True, "session_id": "s"}
        asked: Any = {"model": MODEL, "messages": MESSAGES, "max_tokens": 60, "extra_body": greedy}
        async with chat, claude:
            whole, message = await chat.chat.completions.create(**asked), await claude.messages.create(**asked)
            error = await _dies_while_read(replicas, chat.chat.completions.create(**asked, stream=True))
            assert isinstance(error, openai.APIError)
            assert error.code == "not_serving"
            again = await chat.chat.completions.create(**asked)
            assert again.choices[0].message == whole.choices[0].message
            error = await _dies_while_read(replicas, claude.messages.create(**asked, stream=True))
            assert isinstance(error, anthropic.APIStatusError)
            assert "overloaded_error" in str(error), "by which its clients know that they may try again"
            assert (await claude.messages.create(**asked)).content == message.content
    await until(lambda: not replicas.in_progress)
    replicas.check()
    replicas.shutdown(0)
