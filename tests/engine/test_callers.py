"""Tests of what callers may try against an engine and each other; the device is a stub (support/stub.py)."""

from __future__ import annotations

import asyncio
import contextlib
import math
import threading
from dataclasses import replace

import numpy as np
import pytest
from support.engines import break_loop, gathering, held, posted, until
from support.stub import STUB, stub_engine

from astraea_jax.engine.lifecycle import State
from astraea_jax.engine.replicas import Replicas
from astraea_jax.engine.sampling import SamplingParams
from astraea_jax.errors import EngineDead, RequestError
from astraea_jax.scheduler.wait import Wait

TWO = SamplingParams(max_tokens=2, ignore_eos=True)
LONG = SamplingParams(max_tokens=30, ignore_eos=True)


@pytest.fixture
def served():
    engine, runner = stub_engine(replace(STUB, max_programs=8))
    engine.start()
    yield engine, runner
    runner.go.set()
    engine.shutdown(0)


async def test_who_opens_too_many_sessions_loses_only_their_own(served):
    engine, _ = served
    await engine.generate([1, 2, 3, 4, 5], TWO, session="s", owner="one").text()
    for i in range(20):
        await engine.generate([7], TWO, session=f"s{i}", owner="many").text()
    resumed = engine.generate([1, 2, 3, 4, 5], TWO, session="s", owner="one")
    await resumed.text()
    assert resumed.usage.cached_tokens == 4
    engine.check()


class Trap(str):
    """Text whose methods fail in the engine's thread."""

    def _spring(self, method, *arguments):
        if threading.current_thread().name == "astraea-engine":
            raise ZeroDivisionError
        return getattr(str, method)(self, *arguments)

    def __hash__(self):
        return self._spring("__hash__")

    def __eq__(self, other):
        return self._spring("__eq__", other)

    def __len__(self):
        return self._spring("__len__")

    def __contains__(self, other):
        return self._spring("__contains__", other)

    def encode(self, *arguments):
        return self._spring("encode", *arguments)


@pytest.mark.parametrize(
    "arguments",
    [{"session": Trap("s")}, {"session": "s", "owner": Trap("o")}, {"salt": Trap("s")}, {"stop": Trap("\nx\n")}],
    ids=["session", "owner", "salt", "stop"],
)
async def test_text_with_methods_of_its_own_arrives_as_plain_text(arguments, served):
    engine, _ = served
    stop = arguments.pop("stop", ())
    await engine.generate([1], replace(TWO, stop=stop), **arguments).text()
    if "session" in arguments:
        engine.waits(arguments["session"], Wait((Trap("t"),)), owner=arguments.get("owner", ""))
        engine.end_session(arguments["session"], owner=arguments.get("owner", ""))
    engine.check()
    assert engine.stats().programs == 0


async def test_events_that_keep_coming_do_not_keep_the_loop_from_its_steps(served):
    engine, _ = served
    over = threading.Event()
    take = engine._loop._handle

    def handle_and_post_another(event):
        take(event)
        if not over.is_set():
            engine.waits("nobody", Wait(("nothing",)))

    engine._loop._handle = handle_and_post_another
    try:
        await asyncio.wait_for(engine.generate([1], TWO).text(), 60)
    finally:
        over.set()


@pytest.mark.parametrize("grace_s", [math.inf, 1e300])
async def test_a_shutdown_may_wait_for_ever(grace_s, served):
    engine, runner = served
    runner.go.clear()
    generation = engine.generate([1], TWO)
    ending = asyncio.ensure_future(asyncio.to_thread(engine.shutdown, grace_s))
    while engine.state is State.SERVING:
        await asyncio.sleep(0.001)
    runner.go.set()
    assert await generation.text()
    assert await ending == 0


@pytest.mark.parametrize("grace_s", [math.nan, "3", None])
def test_a_grace_that_is_no_number_shuts_nothing_down(grace_s, served):
    engine, _ = served
    with pytest.raises((ValueError, TypeError)):
        engine.shutdown(grace_s)
    assert engine.live


async def test_a_shutdown_counts_what_it_cuts_and_not_what_a_death_has_cut(served):
    engine, runner = served
    other, _ = stub_engine()
    other.start()
    runner.go.clear()  # no request ends from now on
    replicas = Replicas([engine, other])
    lost = [engine.generate([1, 2], LONG) for _ in range(2)]
    break_loop(engine, ZeroDivisionError())
    runner.go.set()
    await until(lambda: engine.state is State.DEAD)
    for generation in lost:
        with pytest.raises(EngineDead, match="ZeroDivisionError"):
            await generation.text()
    assert replicas.shutdown(3600) == engine.shutdown() == 0


@pytest.mark.parametrize("death", [False, True])
async def test_a_shutdown_counts_what_is_cut_from_its_beginning_on(death, served):
    engine, _ = served
    with held(engine, 0) as state:
        with gathering(engine):
            cut = [engine.generate([1, 2], LONG) for _ in range(2)]
        await state.still()
        ending = asyncio.create_task(asyncio.to_thread(engine.shutdown, 3600 if death else 0))
        await until(lambda: not engine.live)
        if death:
            break_loop(engine, ZeroDivisionError())
        await posted(engine)  # or else they might end before the engine is told to
    assert await ending == 2
    assert engine.shutdown() == 2, "whoever asks again gets the same answer"
    for generation in cut:
        with pytest.raises(EngineDead):
            await generation.text()


def test_an_engine_that_gets_no_thread_is_dead(monkeypatch):
    engine, _ = stub_engine()

    def refuse():
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(engine._thread, "start", refuse)
    with pytest.raises(RuntimeError, match="thread"):
        engine.start()
    assert engine.state is State.DEAD


def test_only_an_engine_that_runs_can_be_checked():
    engine, _ = stub_engine()
    with pytest.raises(EngineDead, match="new"):
        engine.check()
    engine.start()
    engine.check()
    engine.shutdown(0)
    with pytest.raises(EngineDead, match="dead"):
        engine.check()


@pytest.mark.parametrize("name", [3, b"a", ["a"], {"a": 1}, np.array(["a"]), "", "a" * 257, "\ud800"])
async def test_replicas_refuse_the_names_that_an_engine_refuses(name, served):
    engine, _ = served
    for one in (engine, Replicas([engine])):
        for call in (
            lambda one: one.generate([1], TWO, session=name),
            lambda one: one.end_session(name),
            lambda one: one.waits(name, Wait(("t",))),
        ):
            with pytest.raises(RequestError, match="session's name"):
                call(one)
        with pytest.raises(RequestError, match="owner") if name != "" else contextlib.nullcontext():
            one.end_session("s", owner=name)
