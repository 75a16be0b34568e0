"""Pictures of an engine's programs, asked for from other threads."""

from __future__ import annotations

import asyncio

import pytest
from support.engines import held, settled
from support.stub import stub_engine

from astraea_jax.engine.sampling import SamplingParams
from astraea_jax.errors import EngineDead, RequestError

PARAMS = SamplingParams(max_tokens=4, ignore_eos=True)


async def test_only_an_engine_that_runs_has_programs():
    engine, _ = stub_engine()
    with pytest.raises(EngineDead, match="new"):
        engine.look(10)
    await asyncio.to_thread(engine.start)
    assert await asyncio.wrap_future(engine.look(10)) == []
    engine.shutdown(0)
    with pytest.raises(EngineDead, match="dead"):
        engine.look(10)


async def test_owners_are_apart_and_names_are_checked():
    engine, _ = stub_engine()
    await asyncio.to_thread(engine.start)
    for owner in ("a", "b"):
        await engine.generate([1, 2], PARAMS, session="s", owner=owner).text()
    [view] = await asyncio.wrap_future(engine.look(10, "a"))
    assert (view.key, view.state, view.turns) == (("a", "s"), "tool_wait", 1)
    assert len(await asyncio.wrap_future(engine.look(10))) == 2
    with pytest.raises(RequestError, match="owner"):
        engine.look(10, "x" * 1000)
    engine.shutdown(0)


async def test_whoever_gives_up_waiting_does_no_harm():
    engine, _ = stub_engine()
    await asyncio.to_thread(engine.start)
    with held(engine, 0) as control:
        generation = engine.generate([1, 2], PARAMS)
        await control.still()
        assert engine.look(10).cancel()
    await generation.text()
    await settled(engine)
    assert engine.live
    engine.shutdown(0)
