"""The client stands for an engine: the same text and errors, and nothing left behind."""

from __future__ import annotations

import asyncio
import contextlib
import socket

import grpc
import pytest
from support.engines import held, settled

from astraea_jax.agents.loop import run_program
from astraea_jax.engine.sampling import SamplingParams
from astraea_jax.errors import EngineDead, RequestError
from astraea_jax.frontends.rpc import client as client_module
from astraea_jax.frontends.rpc.client import Client
from astraea_jax.frontends.rpc.server import Server

LONG = SamplingParams(max_tokens=200, ignore_eos=True)


async def tokens_of(generation) -> list[int]:
    return [token async for delta in generation for token in delta.token_ids]


async def test_a_cancelled_task_stays_cancelled(client, engine):
    async def consume():
        async for _ in client.generate([1, 2], LONG):
            pass

    with held(engine, 2):
        task = asyncio.create_task(consume())
        while not engine.stats().running:
            await asyncio.sleep(0.002)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    await settled(engine)


async def test_our_client_sees_text_usage_and_errors(client, engine, greedy):
    generation = client.generate([7, 8, 9], SamplingParams(max_tokens=10, ignore_eos=True), session="c")
    deltas = [delta async for delta in generation]
    assert [t for d in deltas for t in d.token_ids] == greedy([7, 8, 9], 10)
    assert "".join(d.text for d in deltas) == engine.tokenizer.decode(greedy([7, 8, 9], 10))
    assert deltas[-1].finish_reason == "length"
    assert generation.usage.output_tokens == 10
    client.end_session("c")
    with pytest.raises(RequestError, match="vocabulary"):
        [delta async for delta in client.generate([10**6], SamplingParams(max_tokens=1))]
    with pytest.raises(RequestError, match="stop_token_ids"):
        client.generate([1], SamplingParams(stop_token_ids=(1,)))
    await settled(engine, programs=True)


async def test_letting_go_of_a_request_cancels_it(client, engine):
    with held(engine, 2) as engine_held:
        async for _ in client.generate([1, 2], LONG):
            break
        iterator = aiter(client.generate([3, 4], LONG))
        await engine_held.still()
        await iterator.aclose()
        while engine.in_progress:
            engine_held.more(1)
            await asyncio.sleep(0.005)
    await settled(engine)


async def test_counts_and_tools_travel(client, engine):
    await tokens_of(client.generate([1, 2, 3], SamplingParams(max_tokens=2), session="tooled"))
    client.tool_called("tooled", "price")
    while engine.stats().in_tool_wait == 0 or client._telling:
        await asyncio.sleep(0.005)
    report = await client.report()
    assert (report.pool, report.running, report.draining) == (engine.report().pool, 0, False)
    counts = await client.counts()
    assert counts["in_tool_wait"] >= 1
    assert counts["offloaded_bytes"] == counts["failed_transfers"] == 0
    assert any(name.startswith("kv keep: ") for name in counts)
    client.end_session("tooled")


async def test_what_the_server_refuses_to_be_told_goes_to_the_log(engine, endpoint, caplog):
    async with Client(endpoint, engine.tokenizer) as client:
        client.tool_called("s", "+".join(f"a-tool-with-a-long-name-{i}" * 3 for i in range(6)))
        client.end_session("")
    assert "the tool's name has" in caplog.text
    assert "the session's name is empty" in caplog.text
    with pytest.raises(grpc.aio.UsageError):
        await client.counts()


async def test_agents_run_against_a_server(client, engine):
    message = {"role": "user", "content": "hi"}
    params = SamplingParams(max_tokens=6, ignore_eos=True)
    here, there = [await run_program(model, [message], params=params) for model in (engine, client)]
    assert here.text == there.text
    await settled(engine, programs=True)


async def test_a_server_that_does_not_answer_holds_nobody(engine, caplog, monkeypatch):
    """It takes connections and says nothing."""
    monkeypatch.setattr(client_module, "TELL_S", 0.2)
    monkeypatch.setattr(client_module, "MAX_TELLS", 3)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        async with Client(f"127.0.0.1:{silent.getsockname()[1]}", engine.tokenizer) as client:
            for i in range(5):
                client.end_session(f"{i}")
            assert len(client._telling) == 3
    assert caplog.text.count("busy") == 2


async def test_a_server_that_is_gone(engine, caplog):
    server = Server(engine)
    async with Client(f"127.0.0.1:{await server.start()}", engine.tokenizer) as client:
        await server.stop(0)
        with pytest.raises(EngineDead):
            await tokens_of(client.generate([1], SamplingParams(max_tokens=1)))
        client.end_session("s")
    assert not caplog.records


async def test_a_closed_client(engine, endpoint, caplog):
    async with Client(endpoint, engine.tokenizer) as client:
        with held(engine, 2) as engine_held:
            running = asyncio.create_task(tokens_of(client.generate([1, 2], LONG)))
            await engine_held.still()
            await client.__aexit__()
            await running
    await settled(engine)
    with pytest.raises(EngineDead, match="closed"):
        client.generate([1])
    client.end_session("s")
    assert "closed" in caplog.text


async def test_it_closes_even_if_its_block_is_cancelled(engine):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        client = Client(f"127.0.0.1:{silent.getsockname()[1]}", engine.tokenizer)

        async def block() -> None:
            async with client:
                client.end_session("s")

        task = asyncio.create_task(block())
        while not client._closed:
            await asyncio.sleep(0)
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
    with pytest.raises(grpc.aio.UsageError):
        await client.is_live()


@pytest.mark.parametrize("name", ["é", "a\nb", " a", "a "])
async def test_names_that_metadata_cannot_carry(client, name):
    for session, salt in ((name, ""), ("fine", name)):
        with pytest.raises(RequestError, match="printable ASCII"):
            client.generate([1], session=session, salt=salt)


@pytest.mark.parametrize("prompt", [["a"], [None], [2**40], [1.5]])
async def test_prompts_that_are_no_tokens(client, prompt):
    with pytest.raises(RequestError, match="no token id"):
        client.generate(prompt)
