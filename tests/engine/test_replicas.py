"""Copies of a model in one process: the tokens of one, sessions that stay, work that spreads, a copy that dies."""

from __future__ import annotations

import asyncio
import dataclasses
import threading
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import pytest
from support.engines import break_loop, gathering, until
from support.wide import PROMPTS, TIGHT, run_programs, tokens

from astraea_jax.engine.replicas import Replicas, load_engine
from astraea_jax.engine.sampling import SamplingParams
from astraea_jax.errors import EngineDead, RequestError
from astraea_jax.scheduler.wait import Wait

PARAMS = SamplingParams(max_tokens=8, ignore_eos=True)


@pytest.fixture
def replicas(wide_folder, request) -> Iterator[Replicas]:
    """Two copies of the model, each with forty pages, with the attention of the test's parameter if it has one."""
    attention = getattr(request, "param", None)
    made = load_engine(wide_folder, dataclasses.replace(TIGHT, data_parallel=2, attention=attention))
    assert isinstance(made, Replicas)
    seen = []
    made.start(lambda done, total: seen.append((done, total)))
    assert seen[-1] == (16, 16), "four steps, the page table, and three that draw rows again, of two copies"
    assert sorted(seen) == seen
    yield made
    made.shutdown(grace_s=0)


@pytest.mark.serves("native", "tested", "replicas")
@pytest.mark.serves("reference", "tested", "replicas")
@pytest.mark.parametrize("replicas", [None, "reference"], indirect=True)
def test_two_copies_say_what_one_says(replicas, wide_engine):
    """Each under pressure; and together they count what they did."""
    devices = [{d for page in e._runner._pages for d in page.sharding.device_set} for e in replicas.replicas]
    assert devices == [{jax.devices()[0]}, {jax.devices()[1]}]
    assert run_programs(replicas) == run_programs(wide_engine, alone=True)
    each = [engine.stats() for engine in replicas.replicas]
    assert min(one.computed_tokens for one in each) > 0, "both were meant to work"
    assert sum(one.preemptions + one.dropped_pages for one in each) > 0, "the pools were meant to be small"
    stats, counts = replicas.stats(), replicas.counts()
    assert (stats.created, stats.finished, stats.programs) == (10, 10, 0)
    assert counts["computed_tokens"] == stats.computed_tokens == sum(one.computed_tokens for one in each)
    assert sum(stats.decisions.values()) == sum(sum(one.decisions.values()) for one in each)


def test_programs_spread_and_stay(replicas):
    async def work() -> None:
        for i in range(6):  # nobody is busy: the one with fewer programs gets the next
            await tokens(replicas.generate(PROMPTS[i][:20], PARAMS, session=f"s{i}"))
        assert [engine.stats().programs for engine in replicas.replicas] == [3, 3]
        for i in reversed(range(6)):
            replicas.waits(f"s{i}", Wait(("search",)))
            again = replicas.generate([*PROMPTS[i][:20], 5, 6], PARAMS, session=f"s{i}")
            await tokens(again)
            assert again.usage.cached_tokens > 0, "its KV is where it went"
        assert [engine.stats().created for engine in replicas.replicas] == [3, 3]
        with gathering(replicas):
            busy = [replicas.generate(PROMPTS[0], PARAMS) for _ in range(4)]  # programs of one request
            assert [engine.in_progress for engine in replicas.replicas] == [2, 2]
        for generation in busy:
            await tokens(generation)
        with pytest.raises(RequestError):
            replicas.generate([], PARAMS, session="never")
        assert replicas._homes.of(("", "never")) is None
        for i in range(6):
            replicas.end_session(f"s{i}")
        await until(lambda: not replicas.stats().programs)
        assert not any(replicas._homes.of(("", f"s{i}")) for i in range(6))

    asyncio.run(work())


def test_a_compilation_elsewhere_is_no_fault(replicas):
    """Such as that of a copy that starts while another serves."""

    async def work() -> None:
        running = replicas.generate(PROMPTS[0], SamplingParams(max_tokens=40, ignore_eos=True))
        await anext(running)
        other = threading.Thread(target=lambda: jax.jit(lambda x: x * 3 + 1)(jnp.ones(7)))
        other.start()
        other.join()
        assert len(await tokens(running)) == 39
        assert all(engine.live for engine in replicas.replicas)

    asyncio.run(work())


def test_the_programs_of_a_dead_copy_go_to_the_other(replicas):
    async def work() -> None:
        first = await tokens(replicas.generate(PROMPTS[0], PARAMS, session="s"))
        home = replicas._homes.of(("", "s"))
        with gathering(replicas):
            lost = replicas.generate(PROMPTS[0] + first, PARAMS, session="s")
            break_loop(home, ZeroDivisionError())
        with pytest.raises(EngineDead, match="ZeroDivisionError"):
            await tokens(lost)
        assert replicas.live
        again = replicas.generate(PROMPTS[0], PARAMS, session="s")
        assert await tokens(again) == first
        assert replicas._homes.of(("", "s")) is not home
        break_loop(replicas._homes.of(("", "s")), ZeroDivisionError())
        await until(lambda: not replicas.live)
        with pytest.raises(EngineDead, match="ZeroDivisionError"):
            replicas.generate(PROMPTS[0], PARAMS)

    asyncio.run(work())


def test_they_share_the_memory_of_the_host(wide_folder):
    config = dataclasses.replace(TIGHT, data_parallel=2, host_kv_bytes=20 * 4096)
    made = load_engine(wide_folder, config)
    assert [engine.layout.host.pages for engine in made.replicas] == [10, 10]


def test_branches_go_where_their_session_is(replicas):
    async def work() -> None:
        first = await tokens(replicas.generate(PROMPTS[0], PARAMS, session="parent"))
        home = replicas._homes.of(("", "parent"))
        await asyncio.wrap_future(replicas.fork("parent", "child"))
        text = [*PROMPTS[0], *first, 5]
        found = await asyncio.wrap_future(replicas.held(text, session="child"))
        assert found.matched == found.device + 1 == len(text) - 1
        child = replicas.generate(text, PARAMS, session="child")
        await tokens(child)
        assert child.usage.cached_tokens > 0
        assert replicas._homes.of(("", "child")) is home
        tail = [*PROMPTS[0][:10], *PROMPTS[1][:20]]
        assert await replicas.replace_tail("child", tail) is True
        assert (await asyncio.wrap_future(replicas.held([*tail, 1], session="child"))).device == len(tail) - 1
        assert (await asyncio.wrap_future(replicas.held(tail))).tokens == len(tail)

        await tokens(replicas.generate(PROMPTS[2], PARAMS, session="elsewhere"))
        assert replicas._homes.of(("", "elsewhere")) is not home
        with pytest.raises(RequestError, match="name already"):
            replicas.fork("parent", "elsewhere")
        replicas._homes.of(("", "elsewhere")).end_session("elsewhere")
        await until(lambda: not replicas._homes.of(("", "elsewhere")).knows("elsewhere"))
        await asyncio.wrap_future(replicas.fork("parent", "elsewhere"))  # the name is free again
        for call in (lambda: replicas.fork("nobody", "x"), lambda: replicas.fork("parent", "x", owner="o")):
            with pytest.raises(RequestError, match="has expired"):
                await asyncio.wrap_future(call())
        with pytest.raises(RequestError, match="has expired"):
            await replicas.replace_tail("nobody", tail)
        break_loop(home, ZeroDivisionError())
        await until(lambda: not home.live)
        with pytest.raises(RequestError, match="has expired"):
            replicas.fork("parent", "x")

    asyncio.run(work())
