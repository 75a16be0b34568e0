"""Homes of sessions at the worst moments: names that nobody has any more, callers without a loop, moves that cross."""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial

import pytest
from support.device import complete
from support.engines import WAIT_S, settled, until
from support.stub import PAGE_BYTES, STUB, StubRunner, stub_engine
from support.wide import tokens

from astraea_jax.engine.answers import MAX_HANDED
from astraea_jax.engine.replicas import Replicas
from astraea_jax.engine.sampling import SamplingParams
from astraea_jax.errors import EngineDead, Overloaded, RequestError

PARAMS = SamplingParams(max_tokens=4, ignore_eos=True)
PROMPT = [3, 1, 4, 1, 5]
ROOMY = replace(STUB, max_queued=400, kv_bytes=121 * PAGE_BYTES)
ONE = replace(ROOMY, max_programs=1)


@pytest.fixture
def made(request) -> Iterator[tuple[Replicas, list[StubRunner]]]:
    """Two replicas on stub devices, and what runs their steps."""
    pairs = [stub_engine(config) for config in getattr(request, "param", (ROOMY, ROOMY))]
    replicas = Replicas([engine for engine, _ in pairs])
    replicas.start()
    yield replicas, [runner for _, runner in pairs]
    for _, runner in pairs:
        runner.go.set()
    replicas.shutdown(0)


async def _at(replicas: Replicas, number: int, name: str, **options) -> list[int]:
    """Run a request of a session that is at a replica, and return its tokens."""
    replicas._homes.settle(("", name), replicas.replicas[number])
    return await tokens(replicas.generate(PROMPT, PARAMS, session=name, **options))


def test_a_caller_without_an_event_loop_leaves_nothing_behind(made):
    """Its request never began, so its session is not busy, and no replica has more to do."""
    replicas, _ = made
    for session in ("s", None):
        with pytest.raises(RuntimeError, match="event loop"):
            replicas.generate(PROMPT, PARAMS, session=session)
    router = replicas._homes._router
    assert not router.fleet.requests.any()
    assert not router.busy(("", "s"))


def test_a_session_that_ends_with_a_request_is_forgotten_unless_that_never_was_one(made):
    """One that was refused, since the session had another in progress, has ended nothing."""
    replicas, runners = made
    homes = replicas._homes

    async def work() -> None:
        for name in ("s", "t"):
            await tokens(replicas.generate(PROMPT, PARAMS, session=name))
        runners[replicas.replicas.index(homes.of(("", "s")))].go.clear()
        running = replicas.generate(PROMPT, PARAMS, session="s")
        refused = replicas.generate(PROMPT, PARAMS, session="s", final=True)
        for runner in runners:
            runner.go.set()
        with pytest.raises(Overloaded, match="in progress"):
            await tokens(refused)
        await tokens(running)
        await tokens(replicas.generate(PROMPT, PARAMS, session="t", final=True))
        with homes.lock:
            homes._look()
        assert homes.of(("", "s")) is not None
        assert homes.of(("", "t")) is None
        assert len(homes._router) == 1

    asyncio.run(work())


def test_sessions_that_expire_are_forgotten(made):
    replicas, _ = made
    homes = replicas._homes

    async def work() -> None:
        for name in "abc":
            await tokens(replicas.generate(PROMPT, PARAMS, session=name))
        assert len(homes._router) == 3
        homes._ttl_s = 0.0

        def forgotten() -> bool:
            with homes.lock:
                homes._look()
            return not len(homes._router)

        await until(forgotten)

    asyncio.run(work())


def test_sessions_move_however_many_names_are_stale(made):
    """Most of the names that the router knows may have ended, and those are the ones that it has known longest."""
    replicas, _ = made
    leaving, other = replicas.replicas

    async def work() -> None:
        await tokens(replicas.generate(PROMPT, PARAMS))
        for i in range(2 * MAX_HANDED):
            replicas._homes.settle(("", f"ended{i}"), leaving)
        said = await _at(replicas, 0, "alive")
        assert await asyncio.wait_for(replicas.retire(0, 0.0), WAIT_S) == 0
        await settled(other)
        again = replicas.generate([*PROMPT, *said, 2], PARAMS, session="alive")
        await tokens(again)
        assert leaving.stats().moved == 1
        assert again.usage.cached_tokens > len(PROMPT)

    asyncio.run(work())


def test_thousands_of_sessions_find_another_home_at_once(made):
    """Requests of everybody wait meanwhile, so each session costs the same."""
    replicas, _ = made
    leaving = replicas.replicas[0]

    async def work() -> None:
        await tokens(replicas.generate(PROMPT, PARAMS))
        for i in range(5000):
            replicas._homes.settle(("", f"s{i}"), leaving)
        calls = []
        original = type(leaving).stats
        try:
            for engine in replicas.replicas:
                engine.stats = lambda engine=engine: calls.append(1) or original(engine)
            await asyncio.wait_for(replicas._homes._move_from(leaving), WAIT_S)
        finally:
            for engine in replicas.replicas:
                del engine.stats
        assert len(calls) <= 2

    asyncio.run(work())


@pytest.mark.parametrize("made", [(ROOMY, ONE, ROOMY)], indirect=True)
def test_one_session_that_finds_no_room_keeps_no_other_from_moving(made):
    """Of three replicas one leaves, and one has a program, which is all that it remembers."""
    replicas, runners = made
    leaving, full, roomy = replicas.replicas

    async def work() -> None:
        for name in "abcde":
            await _at(replicas, 0, name)
        read, free, over = runners[1].read, [1, 2], threading.Event()

        def read_when_asked(step) -> list[int]:
            """After two steps one ends whenever there is an event to take: fewer than the request has tokens."""
            while not (free or full._loop.events.qsize() or over.is_set()):
                time.sleep(0.001)
            del free[:1]
            return read(step)

        runners[1].read = read_when_asked
        running = full.generate(PROMPT, SamplingParams(max_tokens=39, ignore_eos=True), session="runs")
        await anext(running)
        assert await replicas.retire(0, 0.0) == 0
        over.set()
        await settled(roomy)
        assert await tokens(running) == complete(PROMPT, 39)[1:]
        assert leaving.stats().moved == 5
        assert 3 <= roomy.stats().programs < 5

    asyncio.run(work())


def test_a_session_that_is_here_already_is_not_taken_over_beside_itself(made):
    """It has come back before what was handed over of it, to the busier replica."""
    replicas, runners = made

    async def work() -> None:
        elsewhere, _ = stub_engine(ROOMY)
        elsewhere.start()
        await tokens(elsewhere.generate(PROMPT, PARAMS, session="s"))
        [handed] = await asyncio.wrap_future(elsewhere.hand_over())
        elsewhere.shutdown(0)
        runners[0].go.clear()
        replicas._homes.settle(("", "s"), replicas.replicas[0])
        running = replicas.generate(PROMPT, PARAMS, session="s")
        taken = replicas.take_over(handed)
        runners[0].go.set()
        with pytest.raises(RequestError, match="already"):
            await asyncio.wrap_future(taken)
        assert await tokens(running) == complete(PROMPT, 4)
        assert replicas._homes.of(("", "s")) is replicas.replicas[0]
        assert not replicas.replicas[1].knows("s")

    asyncio.run(work())


def test_what_is_taken_over_before_anything_else_is_found_again(made):
    """As by a new version, which begins with the sessions of the old one."""
    replicas, _ = made

    async def work() -> None:
        elsewhere, _ = stub_engine(ROOMY)
        elsewhere.start()
        said = [await tokens(elsewhere.generate([*PROMPT, i], PARAMS, session=f"s{i}")) for i in range(4)]
        for one in await asyncio.wrap_future(elsewhere.hand_over()):
            await asyncio.wrap_future(replicas.take_over(one))
        elsewhere.shutdown(0)
        for engine in replicas.replicas:
            await settled(engine)
        for i in range(4):
            again = replicas.generate([*PROMPT, i, *said[i], 1], PARAMS, session=f"s{i}")
            await tokens(again)
            assert again.usage.cached_tokens > len(PROMPT)
        assert replicas.stats().created == 4

    asyncio.run(work())


def test_waiting_sessions_are_let_go_beside_many_that_run(made):
    """Whoever lets sessions go asks until there are none."""
    replicas, runners = made

    async def work() -> None:
        for name in "ab":
            await _at(replicas, 1, name)
        runners[0].go.clear()
        running = [replicas.replicas[0].generate(PROMPT, PARAMS, session=f"r{i}") for i in range(6)]
        handed = await asyncio.wrap_future(replicas.hand_over())
        assert {one.key[1] for one in handed} == {"a", "b"}
        runners[0].go.set()
        for generation in running:
            await tokens(generation)

    asyncio.run(work())


def test_a_fork_takes_no_name_that_is_about_to_be_somebodys(made):
    """The request of that name is on its way to the other replica, whose loop has not seen it."""
    replicas, runners = made

    async def work() -> None:
        await _at(replicas, 0, "parent")
        runners[1].go.clear()
        stuck = replicas.replicas[1].generate(PROMPT, PARAMS)
        while replicas.replicas[1].times.steps == 0:
            await asyncio.sleep(0.001)
        replicas._homes.settle(("", "child"), replicas.replicas[1])
        running = replicas.generate(PROMPT, PARAMS, session="child")
        assert not replicas.replicas[1].knows("child"), "its loop was meant to be busy"
        with pytest.raises(RequestError, match="name already"):
            replicas.fork("parent", "child")
        runners[1].go.set()
        for generation in (stuck, running):
            assert await tokens(generation) == complete(PROMPT, 4)
        assert not replicas.replicas[0].knows("child")

    asyncio.run(work())


@pytest.mark.parametrize("leaves", [[0], [1, 2], [0, 1, 2]])
@pytest.mark.parametrize("when", ["before", "meanwhile"])
def test_a_replica_that_is_retired_before_it_serves_keeps_no_other_from_starting(leaves, when):
    pairs = [stub_engine(ROOMY) for _ in range(3)]
    replicas = Replicas([engine for engine, _ in pairs])
    compiling, go = [threading.Event() for _ in pairs], threading.Event()

    def compile(number, progress) -> None:
        compiling[number].set()
        assert go.wait(WAIT_S)
        progress(1, 1)

    for number, (_, runner) in enumerate(pairs):
        runner.compile = partial(compile, number)

    async def retire() -> None:
        for number in leaves:
            assert await asyncio.wait_for(replicas.retire(number, 60.0), WAIT_S) == 0

    told = []
    if when == "before":
        asyncio.run(retire())
    with ThreadPoolExecutor(1) as pool:
        starting = pool.submit(replicas.start, lambda *counts: told.append(counts))
        if when == "meanwhile":
            assert all(one.wait(WAIT_S) for one in compiling)
            asyncio.run(retire())
        go.set()
        if len(leaves) == 3:
            with pytest.raises(EngineDead):
                starting.result(WAIT_S)
        else:
            starting.result(WAIT_S)
            left = 3 - len(leaves)
            assert told[-1] == (left, left)
    assert [engine.live for engine in replicas.replicas] == [number not in leaves for number in range(3)]
    if replicas.live:
        assert asyncio.run(tokens_of_one(replicas)) == complete(PROMPT, 4)
        replicas.check()
    replicas.shutdown(0)


async def tokens_of_one(replicas) -> list[int]:
    return await tokens(replicas.generate(PROMPT, PARAMS, session="s"))


@pytest.mark.parametrize("number", [2, -3, True, 0.0, "0"])
def test_who_is_retired_is_one_of_them(made, number):
    replicas, _ = made
    with pytest.raises(ValueError, match="0 to 1"):
        asyncio.run(replicas.retire(number))
    assert not any(engine.draining for engine in replicas.replicas)


@pytest.mark.parametrize("grace_s", [math.nan, -1.0])
def test_a_grace_that_is_no_time_retires_nobody(made, grace_s):
    replicas, _ = made
    with pytest.raises(ValueError, match="grace_s"):
        asyncio.run(replicas.retire(0, grace_s))
    assert not replicas.replicas[0].draining


def test_a_replica_may_be_retired_twice_at_once_and_the_last_one_too(made):
    replicas, _ = made

    async def work() -> None:
        said = [await _at(replicas, 0, f"s{i}") for i in range(5)]
        ended = await asyncio.gather(replicas.retire(0, 0.05), replicas.retire(0, 0.0))
        assert list(ended) == [0, 0]
        await settled(replicas.replicas[1])
        for i in range(5):
            again = replicas.generate([*PROMPT, *said[i], 1], PARAMS, session=f"s{i}")
            assert await tokens(again) == complete([*PROMPT, *said[i], 1], 4)
        assert await replicas.retire(0, 0.0) == 0
        assert await asyncio.wait_for(replicas.retire(1, 0.0), WAIT_S) == 0
        assert not replicas.live

    asyncio.run(work())
