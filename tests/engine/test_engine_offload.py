"""The engine with a host tier too small, a pool too small, faults and cancels: tokens are those of a quiet run."""

from __future__ import annotations

import asyncio
import dataclasses
import gc
import random
import sys

import jax
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.disturbed import SYSTEM, params, program, tokens
from support.engines import settled, until
from support.sizes import NARROW, PAGE_BYTES, SMALL

from astraea_jax.engine.engine import Engine
from astraea_jax.engine.layout import Layout
from astraea_jax.errors import RequestError, StartupError
from astraea_jax.models.sharding import default_mesh

TIGHT = dataclasses.replace(NARROW, host_kv_bytes=200 * PAGE_BYTES, residency="infercept")
"""The strategy that moves whatever somebody else needs."""


async def at_rest(engine: Engine) -> None:
    """Until no program is left; then nothing may be held."""
    await settled(engine, programs=True)
    assert engine.stats().free_pages == engine.layout.num_pages - 1
    assert not engine._store._copies


@pytest.mark.serves("native", "tested", "KV to the host and back")
@pytest.mark.serves("reference", "tested", "KV to the host and back")
@pytest.mark.parametrize(
    ("strategy", "attention"), [("adaptive", None), ("always-offload", "reference"), ("infercept", None)]
)  # all: test_scheduler.py
async def test_greedy_tokens_do_not_depend_on_residency(strategy, attention, make_engine, greedy):
    engine = make_engine(dataclasses.replace(TIGHT, residency=strategy, attention=attention))
    rng = random.Random(1)
    await asyncio.gather(*(program(engine, greedy, i, random.Random(rng.random())) for i in range(24)))
    await at_rest(engine)
    stats = engine.stats()
    assert stats.offloaded_pages > 0
    assert stats.failed_transfers == 0


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 10**6), faults=st.sampled_from([0.0, 0.3]), cancels=st.sampled_from([0.0, 0.3]))
def test_disturbances_change_no_token(seed, faults, cancels, make_engine, greedy):
    engine = make_engine(TIGHT)
    rng, injected = random.Random(seed), 0

    def put(block, sharding):
        nonlocal injected
        if rng.random() < faults:
            injected += 1
            raise RuntimeError("an injected fault")
        return jax.device_put(block, sharding)

    async def crowd():
        await asyncio.gather(*(program(engine, greedy, i, random.Random(seed + i), cancels=cancels) for i in range(16)))
        await at_rest(engine)

    engine._store._put, before = put, engine.stats().failed_transfers
    try:
        asyncio.run(crowd())
    finally:
        engine._store._put = jax.device_put
    assert (engine.stats().failed_transfers > before) == (injected > 0)


async def test_a_lost_slot_is_computed_again(make_engine, greedy):
    engine = make_engine(dataclasses.replace(TIGHT, residency="always-offload"))
    rng = random.Random(7)
    text = [rng.randrange(256) for _ in range(40)]
    output = await tokens(engine.generate(text, params(5), session="lost"))
    longer = [*text, *output, 1, 2]
    while (await asyncio.wrap_future(engine.held(longer, session="lost"))).device:  # others write on the pages
        await tokens(engine.generate([rng.randrange(256) for _ in range(60)], params(5)))
    await until(lambda: not engine._store.busy)
    assert (await asyncio.wrap_future(engine.held(longer, session="lost"))).host == len(text) + len(output) - 1
    engine._store._copies.clear()
    before = engine.stats().failed_transfers
    again = engine.generate(longer, params(5), session="lost", final=True)
    assert await tokens(again) == greedy(longer, 5)
    assert engine.stats().failed_transfers == before + 1


async def test_equal_beginnings_are_computed_once_per_salt(make_engine, greedy):
    engine = make_engine(dataclasses.replace(SMALL, max_queued=2))  # nobody else has put these texts into it
    first = engine.generate([*SYSTEM, 1], params(3), salt="a")
    await tokens(first)
    assert first.usage.cached_tokens == 0
    for salt, cached in (("a", 16), ("b", 0), ("b", 16), ("", 0)):
        generation = engine.generate([*SYSTEM, 2, 3], params(3), salt=salt)
        assert await tokens(generation) == greedy([*SYSTEM, 2, 3], 3)
        assert generation.usage.cached_tokens == cached
    # Without a session too: what was generated is part of the next prompt.
    text = [*SYSTEM, *(await tokens(engine.generate(SYSTEM, params(10))))]
    longer = engine.generate([*text, 9], params(2))
    assert await tokens(longer) == greedy([*text, 9], 2)
    assert longer.usage.cached_tokens == 24
    with pytest.raises(RequestError, match="salt has 257"):
        engine.generate([1], params(1), salt="x" * 257)


async def test_a_session_keeps_its_salt(make_engine):
    engine = make_engine(TIGHT)
    await tokens(engine.generate([1, 2], params(1), session="salted", salt="a"))
    with pytest.raises(RequestError, match="this session was begun with another cache salt"):
        await tokens(engine.generate([1, 2, 3], params(1), session="salted", salt="b"))
    engine.end_session("salted")


def test_a_soak_of_ten_thousand_programs_leaks_nothing(make_engine):
    """Programs of two requests, every fifth cancelled somewhere; Python's memory is flat over the last 4,000. (Many run
    at once, so that there are fewer steps to wait for.)"""
    engine = make_engine(dataclasses.replace(TIGHT, max_seqs=32, max_step_tokens=128, kv_bytes=160 * PAGE_BYTES))
    rng = random.Random(3)

    async def one(number: int) -> None:
        text = [*SYSTEM[: rng.randrange(17)], *(rng.randrange(256) for _ in range(rng.randint(1, 30)))]
        for final in (False, True):
            generation = engine.generate(text, params(rng.randint(1, 3)), session=f"s{number}", final=final)
            if rng.random() < 0.1:
                generation.cancel()
            text = [*text, *(await tokens(generation)), 5]
        engine.end_session(f"s{number}")

    async def soak(numbers: range) -> None:
        places = asyncio.Semaphore(64)

        async def placed(number: int) -> None:
            async with places:
                await one(number)

        await asyncio.gather(*map(placed, numbers))
        await at_rest(engine)

    before = engine.stats()
    asyncio.run(soak(range(6_000)))
    gc.collect()
    middle = sys.getallocatedblocks()
    asyncio.run(soak(range(6_000, 10_000)))
    gc.collect()
    end = sys.getallocatedblocks()
    after = engine.stats()
    assert after.created - before.created >= 10_000
    assert after.created == after.finished + after.failed + after.expired
    assert after.offloaded_pages > before.offloaded_pages
    assert end - middle < 4_000  # not one block a program


@pytest.mark.parametrize(
    ("budget", "words"),
    [(2**60, "exceeds the [0-9]+ bytes of this machine's memory"), (100, "holds no page of 2048 bytes")],
)
def test_host_budgets_that_cannot_be_had_are_refused(budget, words, engine):
    with pytest.raises(StartupError, match=words):
        Layout.plan(dataclasses.replace(SMALL, host_kv_bytes=budget), engine.model_config, default_mesh())


def test_without_a_budget_there_is_no_host_tier_on_a_cpu(engine):
    for budget in (0, None):
        layout = Layout.plan(dataclasses.replace(SMALL, host_kv_bytes=budget), engine.model_config, default_mesh())
        assert layout.host.pages == 0


def test_a_backend_that_cannot_pin_memory_says_so(engine, monkeypatch, caplog):
    monkeypatch.setattr("astraea_jax.engine.layout.has_pinned_host", lambda: False)
    with pytest.raises(StartupError, match="cannot pin host memory; start with host_kv_bytes 0"):
        Layout.plan(dataclasses.replace(SMALL, host_kv_bytes=2**20), engine.model_config, default_mesh())
    monkeypatch.setattr("jax.default_backend", lambda: "other")
    layout = Layout.plan(dataclasses.replace(SMALL, kv_bytes=2**20), engine.model_config, default_mesh())
    assert layout.host.pages == 0
    assert "cannot pin host memory" in caplog.text


def test_staging_never_exceeds_half_of_the_pool(engine):
    layout = Layout.plan(dataclasses.replace(TIGHT), engine.model_config, default_mesh())
    assert layout.host.pages == 200
    assert layout.host.staging == 23


def test_staging_is_part_of_the_memory_that_pages_are_given_by_default(engine, monkeypatch):
    """Pages on their way to the host and back, and one block."""
    for budget, staged, least in ((2**29, 1024, 260_000), (2**20, 95, 192)):
        monkeypatch.setattr("astraea_jax.engine.layout.CPU_KV_BYTES", budget)
        config = dataclasses.replace(SMALL, kv_bytes=None, host_kv_bytes=2**20)
        layout = Layout.plan(config, engine.model_config, default_mesh())
        assert layout.host.staging == staged
        assert least <= layout.num_pages <= budget // layout.page_bytes - 2 * staged - 64
        without = Layout.plan(dataclasses.replace(config, host_kv_bytes=0), engine.model_config, default_mesh())
        assert without.num_pages == budget // layout.page_bytes
