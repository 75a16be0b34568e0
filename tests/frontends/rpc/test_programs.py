"""Requests in text that go on from their own tokens, and what the Sessions service does with programs."""

from __future__ import annotations

import grpc
import pytest
from support.engines import settled

from astraea_jax.engine.sampling import SamplingParams
from astraea_jax.errors import RequestError
from astraea_jax.scheduler.wait import Wait

FOUR = SamplingParams(max_tokens=4, ignore_eos=True)
PROMPT = list(range(1, 31))
SALT = (("x-cache-salt", "text"),)


async def ask(client, prompt=PROMPT, **more):
    generation = client.generate(prompt, FOUR, **more)
    tokens = [token async for delta in generation for token in delta.token_ids]
    return generation.usage, tokens


@pytest.mark.parametrize("session", [None, "named"])
async def test_a_text_goes_on_from_the_tokens_that_were_generated(decode, engine, session):
    named = SALT if session is None else (*SALT, ("x-session-id", session))
    text, known = "The price of an apple", 0
    for _ in range(3):
        samples, trailer = await decode(named, text_content={"text": text}, max_tokens=6)
        assert int(trailer["x-cached-tokens"]) >= known - engine.config.page_size
        known = int(trailer["x-prompt-tokens"]) + int(trailer["x-output-tokens"])
        text += "".join(piece for piece, _ in samples) + " and more"
    await settled(engine)


async def test_what_a_program_waits_for_reaches_the_engine(client, engine):
    await ask(client, session="told")
    client.waits("told", Wait(("price", "stock"), expected_s=2.5))
    while client._telling:
        await client.is_live()
    usage, _ = await ask(client, session="told")
    assert (usage.wait.kind, usage.wait.predicted_s, usage.wait.hinted) == ("tool", 2.5, "accepted")
    client.waits("told", Wait())
    while client._telling:
        await client.is_live()
    usage, _ = await ask(client, session="told", final=True)
    assert usage.wait.kind == "human"
    await settled(engine)


async def test_a_fork_shares_what_its_parent_has_computed(client, engine, greedy):
    await ask(client, session="stem", salt="fork")
    await client.fork("stem", "twig", salt="fork")
    longer = [*PROMPT, *greedy(PROMPT, 4), 7, 8]
    usage, tokens = await ask(client, longer, session="twig", salt="fork", final=True)
    assert usage.cached_tokens >= len(PROMPT)
    assert tokens == greedy(longer, 4)
    client.end_session("stem", salt="fork")
    await settled(engine)


async def test_a_replaced_tail_is_found_computed(client, engine, greedy):
    await ask(client, session="long", salt="tail")
    prompt = [*PROMPT[:10], *range(40, 60)]
    assert await client.replace_tail("long", prompt, salt="tail")
    usage, tokens = await ask(client, [*prompt, 3], session="long", salt="tail", final=True)
    assert usage.cached_tokens >= len(prompt) - engine.config.page_size
    assert tokens == greedy([*prompt, 3], 4)
    await settled(engine)


async def test_what_is_not_known_is_refused(client):
    with pytest.raises(RequestError, match="expired"):
        await client.fork("never", "child")
    with pytest.raises(RequestError, match="expired"):
        await client.replace_tail("never", PROMPT)
    with pytest.raises(RequestError, match="vocabulary"):
        await client.replace_tail("never", [2**30])


async def test_a_parent_may_be_named_in_metadata(decode, engine):
    for metadata in ((("x-session-id", "p"),), (("x-session-id", "c"), ("x-parent-session-id", "p"))):
        await decode((*SALT, *metadata), token_content={"token_ids": PROMPT}, max_tokens=2)
    with pytest.raises(grpc.aio.AioRpcError, match="x-parent-session-id"):
        await decode((*SALT, ("x-session-id", "c"), ("x-parent-session-id", "p" * 257)), max_tokens=2)
    engine.end_session("p", owner="salt:text")
    await settled(engine)
