"""A session belongs to the tenant that opened it: a cache salt, or a connection. Nobody else can reach it."""

from __future__ import annotations

import asyncio

import pytest
from support.engines import held, settled

from astraea_jax.engine.engine import Engine
from astraea_jax.engine.sampling import SamplingParams
from astraea_jax.frontends.rpc.client import Client

FOUR = SamplingParams(max_tokens=4, ignore_eos=True)
LONG = SamplingParams(max_tokens=100, ignore_eos=True)
PROMPT = list(range(1, 31))
NAMES = ["same", "#1", "#2", "0", "peer:", "salt:mine"]
"""Among them such as the engine might give itself."""


async def ask(client: Client, params: SamplingParams = FOUR, **more):
    """Usage of a request, and its tokens."""
    generation = client.generate(PROMPT, params, **more)
    tokens = [token async for delta in generation for token in delta.token_ids]
    return generation.usage, tokens


@pytest.fixture
async def other(endpoint, engine):
    """A client with another connection."""
    async with Client(endpoint, engine.tokenizer) as client:
        yield client


@pytest.fixture
async def mine(endpoint, engine):
    async with Client(endpoint, engine.tokenizer, salt="mine") as client:
        yield client


@pytest.mark.parametrize("name", NAMES)
async def test_the_same_name_is_another_session_to_somebody_else(client, other, mine, engine, greedy, name):
    """Four tenants use one name at the same time; a program that has a request in progress would refuse another."""
    asked = [
        ask(client, session=name),
        ask(other, session=name),
        ask(mine, session=name),
        ask(other, session=name, salt="theirs"),
    ]
    for _, tokens in await asyncio.gather(*asked):
        assert tokens == greedy(PROMPT, 4)
    assert engine.stats().in_tool_wait == 4
    for asker, salt in ((client, ""), (other, ""), (mine, ""), (other, "theirs")):
        asker.end_session(name, salt=salt)
    await settled(engine, programs=True)


@pytest.mark.parametrize("name", NAMES)
async def test_nobody_else_can_end_a_session(client, other, mine, engine: Engine, name):
    with held(engine, 2) as engine_held:
        running = asyncio.create_task(ask(client, LONG, session=name))
        await engine_held.still()
        for stranger, salt in ((other, ""), (mine, ""), (other, "x")):
            stranger.end_session(name, salt=salt)
            stranger.tool_called(name, "price", salt=salt)
        while other._telling or mine._telling:
            await asyncio.sleep(0.002)
    usage, _ = await running
    assert usage.output_tokens == 100
    client.end_session(name)
    await settled(engine, programs=True)


async def test_an_anonymous_request_cannot_be_ended_by_name(client, engine: Engine):
    with held(engine, 2) as engine_held:
        running = asyncio.create_task(ask(client, LONG))
        await engine_held.still()
        for number in range(200):
            client.end_session(f"#{number}")
        while client._telling:
            await asyncio.sleep(0.002)
    usage, _ = await running
    assert usage.output_tokens == 100
    await settled(engine, programs=True)


async def test_a_session_comes_back_on_its_connection_or_with_its_salt(client, other, mine, endpoint, engine, greedy):
    expected = greedy(PROMPT, 4)
    for asker in (client, mine):
        await ask(asker, session="s")
    assert (await ask(client, session="s"))[0].cached_tokens == len(PROMPT) - 1
    async with Client(endpoint, engine.tokenizer, salt="mine") as elsewhere:
        usage, tokens = await ask(elsewhere, session="s")
        assert (usage.cached_tokens, tokens) == (len(PROMPT) - 1, expected)
        elsewhere.end_session("s")
    created = engine.stats().created
    usage, tokens = await ask(
        other, session="s"
    )  # finds the tokens by their prefix, in full pages, but not the session
    assert tokens == expected
    assert usage.cached_tokens < len(PROMPT) - 1
    assert engine.stats().created == created + 1
    for asker in (client, other):
        asker.end_session("s")
    await settled(engine, programs=True)


async def test_equal_beginnings_are_shared_under_one_salt_only(client):
    usages = [(await ask(client, salt=salt))[0].cached_tokens for salt in ("here", "here", "there")]
    assert usages == [0, 28, 0]


async def test_counts_name_nobody(client, mine):
    await ask(mine, session="a-secret-session", final=False)
    mine.tool_called("a-secret-session", "a-secret-tool")
    while mine._telling:
        await asyncio.sleep(0.002)
    assert not [name for name in await client.counts() if "secret" in name or "mine" in name]
    mine.end_session("a-secret-session")
