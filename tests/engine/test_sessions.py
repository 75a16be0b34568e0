"""Forks, tails replaced and what is held, as callers of an engine see them."""

from __future__ import annotations

import asyncio
import dataclasses
import random

import pytest
from support.device import complete
from support.engines import break_loop, held, settled, until
from support.sizes import NARROW, PAGE_BYTES
from support.stub import STUB, stub_engine

from astraea_jax.engine.engine import Engine
from astraea_jax.engine.sampling import SamplingParams
from astraea_jax.errors import EngineDead, Overloaded, RequestError, StepFailed
from astraea_jax.scheduler.view import Held

TIGHT = dataclasses.replace(NARROW, host_kv_bytes=200 * PAGE_BYTES, residency="infercept")
TEXT = list(range(40, 70))


def params(n: int) -> SamplingParams:
    return SamplingParams(max_tokens=n, ignore_eos=True)


async def tokens(generation) -> list[int]:
    return [t async for delta in generation for t in delta.token_ids]


async def asked(future):
    return await asyncio.wait_for(asyncio.wrap_future(future), 60)


@pytest.fixture
def stub():
    engine, runner = stub_engine()
    engine.start()
    yield engine
    engine.shutdown(0)
    assert runner.fault is None


# -- forks -----------------------------------------------------------------------------------------------------


async def test_a_fork_says_what_a_cold_run_says(engine, greedy):
    output = await tokens(engine.generate(TEXT, params(9), session="parent", owner="o"))
    await asked(engine.fork("parent", "child", owner="o"))
    for name, more in (("child", [1, 2]), ("parent", [3])):
        text = [*TEXT, *output, *more]
        generation = engine.generate(text, params(6), session=name, owner="o", final=True)
        assert await tokens(generation) == greedy(text, 6)
        assert generation.usage.cached_tokens >= (len(TEXT) + 8) // 4 * 4
        assert generation.usage.wait is None or name == "parent"
    await settled(engine)


async def test_a_child_begins_with_what_its_parent_has(engine, greedy):
    output = await tokens(engine.generate(TEXT, params(9), session="parent", salt="s"))
    text = [*TEXT, *output, 5]
    for salt, cached in (("s", 36), ("t", 0)):
        child = engine.generate(text, params(4), session=f"child {salt}", parent="parent", salt=salt, final=True)
        assert await tokens(child) == greedy(text, 4)
        assert child.usage.cached_tokens == cached
    engine.end_session("parent")
    await settled(engine)


async def test_forks_that_cannot_be(stub):
    with pytest.raises(RequestError, match="has expired"):
        await asked(stub.fork("parent", "child"))
    await tokens(stub.generate([1, 2], params(2), session="parent", owner="a"))
    with pytest.raises(RequestError, match="has expired"):
        await asked(stub.fork("parent", "child", owner="b"))
    with pytest.raises(RequestError, match="name already"):
        await asked(stub.fork("parent", "parent", owner="a"))
    for odd in ("", "x" * 257, None, "\ud800"):
        with pytest.raises(RequestError):
            stub.fork("parent", odd, owner="a")
        with pytest.raises(RequestError):
            stub.fork(odd, "child", owner="a")
    await asked(stub.fork("parent", "child", owner="a"))
    assert stub.knows("child", owner="a")
    assert not stub.knows("child", owner="b")
    stub.shutdown(0)
    with pytest.raises(EngineDead, match="is dead knows no session"):
        stub.fork("parent", "child")


async def test_a_full_table_of_sessions_forks_nothing():
    engine, _ = stub_engine(dataclasses.replace(STUB, max_programs=2))
    engine.start()
    with held(engine, 1):
        running = [engine.generate([i], params(9), session=f"s{i}") for i in range(2)]
        forked = engine.fork("s0", "child")
    with pytest.raises(Overloaded, match="2 programs are live"):
        await asked(forked)
    for one, generation in enumerate(running):
        assert await tokens(generation) == complete([one], 9)
    engine.shutdown(0)


async def test_a_session_is_forked_while_it_runs(engine, greedy):
    with held(engine, 6) as state:
        parent = engine.generate(TEXT, params(20), session="parent")
        await state.still()
        forked = engine.fork("parent", "child")
    await asked(forked)
    text = [*TEXT, 9]
    child = engine.generate(text, params(4), session="child", final=True)
    assert await tokens(child) == greedy(text, 4)
    assert child.usage.cached_tokens >= 28
    assert await tokens(parent) == greedy(TEXT, 20)
    engine.end_session("parent")
    await settled(engine)


async def test_whoever_asks_an_engine_that_dies_is_answered():
    engine, _ = stub_engine()
    engine.start()
    with held(engine, 1) as state:
        running = engine.generate([1], params(9))
        await state.still()
        asking = [engine.fork("a", "b"), engine.held([1, 2])]
        prepares = asyncio.create_task(engine.replace_tail("a", [1, 2]))
        await until(lambda: engine._loop.events.qsize() == 3)
        engine._die("the test")
        for future in asking:
            with pytest.raises(EngineDead, match="the test"):
                await asked(future)
        with pytest.raises(EngineDead, match="the test"):
            await prepares
    with pytest.raises(EngineDead):
        await tokens(running)


# -- tails replaced ----------------------------------------------------------------------------------------------


async def test_a_tail_is_computed_before_it_is_asked_for(engine, greedy):
    output = await tokens(engine.generate(TEXT, params(9), session="s"))
    before, computed = engine.stats(), engine.work.prompt_tokens
    prompt = [*TEXT[:20], *range(100, 130)]
    assert await engine.replace_tail("s", prompt) is True
    after = engine.stats()
    assert after.computed_tokens - before.computed_tokens == 29
    assert (after.in_tool_wait, after.created) == (before.in_tool_wait, before.created)
    assert engine.work.prompt_tokens == computed
    assert (await asked(engine.held([*prompt, 1], session="s"))).device == 49
    generation = engine.generate([*prompt, *output[:2]], params(5), session="s", final=True)
    assert await tokens(generation) == greedy([*prompt, *output[:2]], 5)
    assert generation.usage.cached_tokens == 49
    assert generation.usage.wait is not None
    await settled(engine)


async def test_the_next_request_supersedes_a_tail(stub):
    await tokens(stub.generate([1, 2, 3], params(2), session="s"))
    with held(stub, 1) as state:
        busy = stub.generate([5], params(9))
        await state.still()
        prepares = asyncio.create_task(stub.replace_tail("s", [1] * 20))
        await until(stub._loop.events.qsize)
        again = stub.generate([1] * 21, params(3), session="s")
    assert await prepares is False
    assert await tokens(again) == complete([1] * 21, 3)
    await tokens(busy)
    await settled(stub)


async def test_tails_that_cannot_be(stub):
    with pytest.raises(RequestError, match="has expired"):
        await stub.replace_tail("s", [1, 2])
    await tokens(stub.generate([1, 2], params(2), session="s", salt="a"))
    with pytest.raises(RequestError, match="salt"):
        await stub.replace_tail("s", [1, 2], salt="b")
    for odd in ([], [True], [50], "text", [1] * 44, None):
        with pytest.raises(RequestError):
            await stub.replace_tail("s", odd, salt="a")
    with held(stub, 1) as state:
        busy = stub.generate([1, 2, 3], params(9), session="s", salt="a")
        await state.still()
        prepares = asyncio.create_task(stub.replace_tail("s", [1, 2], salt="a"))
        await until(stub._loop.events.qsize)
    with pytest.raises(Overloaded, match="in progress"):
        await prepares
    await tokens(busy)
    stub.end_session("s")
    await settled(stub, programs=True)


async def test_a_tail_ends_with_its_session(stub):
    await tokens(stub.generate([1, 2], params(2), session="s"))
    with held(stub, 1) as state:
        busy = stub.generate([5], params(9))
        await state.still()
        prepares = asyncio.create_task(stub.replace_tail("s", [1] * 20))
        await until(stub._loop.events.qsize)
        stub.end_session("s")
    with pytest.raises(RequestError, match="has ended"):
        await prepares
    await tokens(busy)
    await settled(stub, programs=True)


async def test_who_gives_up_waiting_for_a_tail_ends_it(stub):
    await tokens(stub.generate([1, 2], params(2), session="s"))
    with held(stub, 1) as state:
        busy = stub.generate([5], params(9))
        await state.still()
        prepares = asyncio.create_task(stub.replace_tail("s", [1] * 20))
        await until(stub._loop.events.qsize)
        prepares.cancel()
        with pytest.raises(asyncio.CancelledError):
            await prepares
    await tokens(busy)
    await settled(stub)
    assert stub.in_progress == 0
    again = stub.generate([1, 2, 7], params(2), session="s")
    assert await tokens(again) == complete([1, 2, 7], 2)


async def test_a_step_that_fails_fails_the_tail_that_ran():
    engine, runner = stub_engine()
    engine.start()
    await tokens(engine.generate([1, 2], params(2), session="s"))
    runner.failing.append("dispatch")
    with pytest.raises(StepFailed):
        await engine.replace_tail("s", [1] * 20)
    assert await engine.replace_tail("s", [1] * 20) is True
    again = engine.generate([1] * 21, params(2), session="s")
    assert await tokens(again) == complete([1] * 21, 2)
    assert again.usage.cached_tokens == 19
    await settled(engine)
    engine.shutdown(0)
    assert runner.fault is None


# -- what is held ------------------------------------------------------------------------------------------------


async def test_what_is_held(stub):
    output = await tokens(stub.generate([1] * 10, params(3), session="s", salt="a"))
    text = [*[1] * 10, *output, 4]
    assert await asked(stub.held(text, session="s", salt="a")) == Held(14, 13, 12, 0)
    assert (await asked(stub.held(text, session="s", salt="a"))).nowhere == 2
    assert await asked(stub.held(text, salt="a")) == Held(14, 0, 12, 0)
    for other in ({}, {"session": "s"}, {"session": "s", "owner": "b"}, {"session": "nobody"}):
        assert await asked(stub.held(text, **other)) == Held(14, 0, 0, 0)
    for odd in ([], [50], None):
        with pytest.raises(RequestError):
            stub.held(odd)
    break_loop(stub, ZeroDivisionError("the test"))
    await until(lambda: not stub.live)
    with pytest.raises(EngineDead):
        stub.held(text)


# -- under pressure ----------------------------------------------------------------------------------------------


async def family(engine: Engine, greedy, number: int, rng: random.Random) -> None:
    """A session, its forks, and tails replaced, whose answers are those of cold runs; they end in any order."""
    name, text = f"f{number}", [*range(40, 57), *(rng.randrange(256) for _ in range(rng.randint(1, 12)))]

    async def turn(session: str, text: list[int]) -> list[int]:
        n = rng.randint(1, 8)
        output = await tokens(engine.generate(text, params(n), session=session, salt=str(number % 2)))
        assert output == greedy(text, n, output)
        return [*text, *output, rng.randrange(256)]

    async def branch(session: str, text: list[int]) -> None:
        await asyncio.sleep(rng.random() * 0.03)
        if rng.random() < 0.5:
            text = [*text[: rng.randint(1, len(text))], *(rng.randrange(256) for _ in range(rng.randint(1, 20)))]
            if rng.random() < 0.5:
                await engine.replace_tail(session, text, salt=str(number % 2))
            else:
                ahead = asyncio.create_task(engine.replace_tail(session, text, salt=str(number % 2)))
                await asyncio.sleep(rng.random() * 0.02)
                text = await turn(session, text)
                await asyncio.gather(ahead, return_exceptions=True)
        await turn(session, text)
        engine.end_session(session)

    text = await turn(name, text)
    children = [f"{name}/{i}" for i in range(rng.randint(1, 3))]
    for child in children:
        await asked(engine.fork(name, child))
    await asyncio.gather(*(branch(session, text) for session in (name, *children)))


@pytest.mark.parametrize("strategy", ["infercept", "always-offload", "adaptive"])
async def test_greedy_tokens_do_not_depend_on_forks_and_tails(strategy, make_engine, greedy):
    engine = make_engine(dataclasses.replace(TIGHT, residency=strategy))
    rng = random.Random(3)
    await asyncio.gather(*(family(engine, greedy, i, random.Random(rng.random())) for i in range(10)))
    await settled(engine, programs=True)
    assert engine.stats().free_pages == engine.layout.num_pages - 1
    assert not engine._store._copies
    assert engine.stats().offloaded_pages > 0
