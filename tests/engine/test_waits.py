"""What callers say of waits, priorities and parents, and what they are told of how a turn went on."""

from __future__ import annotations

import asyncio
import math

import pytest
from support.engines import gathering, held, settled
from support.stub import stub_engine

from astraea_jax.engine.replicas import Replicas
from astraea_jax.engine.sampling import SamplingParams
from astraea_jax.errors import RequestError
from astraea_jax.scheduler.wait import Wait

PARAMS = SamplingParams(max_tokens=4, ignore_eos=True)


@pytest.fixture
async def engine():
    engine, _ = stub_engine()
    await asyncio.to_thread(engine.start)
    yield engine
    engine.shutdown(0)


async def turn(engine, text, **more):
    """A request of session "s", and how it went; ``text`` grows by its tokens."""
    generation = engine.generate(text, PARAMS, session="s", **more)
    async for delta in generation:
        text += delta.token_ids
    text.append(1)
    return generation.usage


async def test_usage_says_what_was_waited_for_and_where_the_kv_was(engine):
    text = [1, 2, 3]
    first = await turn(engine, text)
    assert (first.wait, first.resumed.source) == (None, "new")
    engine.waits("s", Wait(("search", "search"), expected_s=0.5, keep_s=10**400))
    second = await turn(engine, text)
    assert (second.wait.kind, second.wait.predicted_s) == ("tool", 0.5)
    assert (second.wait.hinted, second.wait.leased) == ("accepted", "clipped")
    assert 0 <= second.wait.actual_s < 60
    assert (second.resumed.source, second.resumed.device_tokens) == ("device", second.cached_tokens)
    engine.waits("s", Wait(keep_s=math.nan))
    third = await turn(engine, [7, *text])
    assert (third.wait.kind, third.wait.hinted, third.wait.leased) == ("human", None, "ignored")
    assert (third.resumed.source, third.resumed.why) == ("recomputed", "prefix differs")
    assert sum(engine.tool_waits.seconds.counts) == sum(engine.human_waits.seconds.counts) == 1
    assert sum(engine.job_times.counts) == 1
    assert await asyncio.to_thread(engine.check) is None


async def test_programs_that_wait_for_a_human_are_counted_and_shown(engine):
    for name in ("s", "t"):
        await engine.generate([1, 2], PARAMS, session=name).text()
    engine.waits("t", Wait())
    engine.waits("nobody", Wait())
    states = {view.key[1]: view.state for view in await asyncio.wrap_future(engine.look(10))}
    assert states == {"s": "tool_wait", "t": "human_wait"}
    assert (engine.stats().in_tool_wait, engine.stats().in_human_wait) == (1, 1)
    engine.end_session("t")
    await settled(engine)
    assert engine.stats().in_human_wait == 0


@pytest.mark.parametrize("priority", [1, 2**70])
async def test_who_gives_way_starts_later_and_nobody_gets_before_others(priority):
    engine, _ = stub_engine()
    await asyncio.to_thread(engine.start)
    ended = []

    async def ask(name, count, priority=0):
        params = SamplingParams(max_tokens=count, ignore_eos=True)
        await engine.generate([1, 2], params, priority=priority).text()
        ended.append(name)

    with held(engine, 0) as control:
        with gathering(engine):
            asked = [asyncio.create_task(ask("first", count)) for count in (2, 7, 12)]  # all slots
            await asyncio.sleep(0)
        await control.still()
        for name, of in (("later", priority), ("plain", 0), ("pushing", -(2**70))):
            asked.append(asyncio.create_task(ask(name, 3, of)))
            await asyncio.sleep(0)
    await asyncio.gather(*asked)
    assert [name for name in ended if name != "first"] == ["plain", "pushing", "later"]
    engine.shutdown(0)


async def test_a_child_goes_where_its_parent_is():
    replicas = Replicas([stub_engine()[0] for _ in range(3)])
    await asyncio.to_thread(replicas.start)
    await replicas.generate([1, 2], PARAMS, session="parent", owner="o").text()
    for name in ("a", "b"):
        await replicas.generate([1, 2], PARAMS, session=name, owner="o", parent="parent").text()
    await replicas.generate([1, 2], PARAMS, session="c", owner="another", parent="parent").text()
    assert sorted(engine.stats().programs for engine in replicas.replicas) == [0, 1, 3]
    replicas.waits("a", Wait(), owner="o")
    replicas.check()
    assert replicas.stats().in_human_wait == 1
    replicas.tool_called("a", "search", "shell", owner="o")
    replicas.check()
    assert replicas.stats().in_human_wait == 0
    replicas.shutdown(0)


@pytest.mark.parametrize("wait", ["search", None, Wait(["a"]), Wait((1,)), Wait((), "soon"), Wait((), None, False)])
async def test_a_wait_that_is_none_is_refused(engine, wait):
    with pytest.raises(RequestError, match=r"must be|empty"):
        engine.waits("s", wait)
