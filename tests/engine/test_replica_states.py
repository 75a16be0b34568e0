"""Replicas under everything at once: the state machine of support/replica_states.py, and one that dies under load."""

from __future__ import annotations

import asyncio
import os
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import run_state_machine_as_test
from support.callers import callers_of
from support.device import complete
from support.engines import break_loop, settled, until
from support.replica_states import Machine
from support.stub import PAGE_BYTES, STUB, stub_engine
from support.wide import tokens

from astraea_jax.engine.replicas import Replicas
from astraea_jax.engine.sampling import SamplingParams
from astraea_jax.errors import EngineDead

PARAMS = SamplingParams(max_tokens=4, ignore_eos=True)
ROOMY = replace(STUB, max_queued=64, kv_bytes=61 * PAGE_BYTES)
EXAMPLES = 200 if os.environ.get("CI") else 25

callers = callers_of(Machine)


def test_whatever_happens_no_session_is_lost_or_served_twice():
    run_state_machine_as_test(
        Machine,
        settings=settings(
            max_examples=EXAMPLES,
            stateful_step_count=40,
            deadline=None,
            derandomize=False,
            suppress_health_check=list(HealthCheck),
        ),
    )


def _begun(name: str) -> list[int]:
    return [letter % 50 for letter in name.encode()]


async def _agent(replicas: Replicas, name: str, turns: int) -> list[int]:
    """A program that sends a turn again when its replica dies; returns what it has said."""
    text = _begun(name)
    for _ in range(turns):
        while True:
            try:
                text += await tokens(replicas.generate(text, PARAMS, session=name))
                break
            except EngineDead:
                assert replicas.live, "nobody is left"
        text.append(1)
    return text


def _alone(name: str, turns: int) -> list[int]:
    text = _begun(name)
    for _ in range(turns):
        text += [*complete(text, PARAMS.max_tokens), 1]
    return text


@pytest.mark.parametrize("dies", [0, 1])
def test_a_replica_that_dies_under_load_loses_no_program(dies):
    """32 programs on two replicas, of which one dies in the middle of them."""
    engines = [stub_engine(ROOMY)[0] for _ in range(2)]
    replicas = Replicas(engines)
    replicas.start()
    names = [f"p{i}" for i in range(32)]

    async def work() -> list[list[int]]:
        async def kill() -> None:
            while not all(engine.stats().created > 3 for engine in engines):
                await asyncio.sleep(0)
            break_loop(engines[dies], RuntimeError("the test"))

        killing = asyncio.create_task(kill())
        texts = await asyncio.gather(*[_agent(replicas, name, 6) for name in names])
        await killing
        await until(lambda: not engines[dies].live)
        return texts

    texts = asyncio.run(work())
    assert texts == [_alone(name, 6) for name in names]
    assert [engine.live for engine in engines] == [number != dies for number in range(2)]
    replicas.check()
    replicas.shutdown(0)


def test_sessions_of_a_replica_that_is_retired_move_with_their_tokens():
    engines = [stub_engine(ROOMY)[0] for _ in range(2)]
    replicas = Replicas(engines)
    replicas.start()
    names = [f"p{i}" for i in range(8)]

    async def work() -> None:
        texts = await asyncio.gather(*[_agent(replicas, name, 1) for name in names])
        at_home = {name: replicas._homes.of(("", name)) for name in names}
        leaving = at_home[names[0]]
        other = next(engine for engine in engines if engine is not leaving)
        moving = [name for name in names if at_home[name] is leaving]
        assert await replicas.retire(engines.index(leaving), 0.0) == 0
        assert not leaving.live
        await settled(other)
        assert leaving.stats().moved == len(moving) == other.stats().created - (len(names) - len(moving))
        for name, text in zip(names, texts, strict=True):
            again = replicas.generate(text, PARAMS, session=name)
            assert await tokens(again) == complete(text, PARAMS.max_tokens)
            if name in moving:
                assert again.usage.cached_tokens >= len(text) - 2, "it was computed ahead"

    asyncio.run(work())
    replicas.shutdown(0)


def test_a_retired_replica_serves_who_comes_back_within_the_grace_and_lets_requests_end():
    made = [stub_engine(ROOMY) for _ in range(2)]
    engines, runners = [engine for engine, _ in made], [runner for _, runner in made]
    replicas = Replicas(engines)
    replicas.start()

    async def work() -> None:
        text = await _agent(replicas, "a", 1)
        home = replicas._homes.of(("", "a"))
        number = engines.index(home)
        runners[number].go.clear()
        running = replicas.generate(text, PARAMS, session="a")
        retired = asyncio.create_task(replicas.retire(number, 60.0))
        await until(lambda: home.draining)
        new = replicas.generate(text, PARAMS, session="new")
        assert replicas._homes.of(("", "new")) is not home, "it takes no new programs"
        assert await tokens(new) == complete(text, PARAMS.max_tokens)
        assert home.live
        assert home.report().draining
        assert not replicas.report().draining
        runners[number].go.set()
        said = await tokens(running)
        assert said == complete(text, PARAMS.max_tokens)
        back = replicas.generate([*text, *said, 1], PARAMS, session="a")
        assert replicas._homes.of(("", "a")) is home, "who comes back goes on there"
        assert len(await tokens(back)) == PARAMS.max_tokens
        replicas.end_session("a")
        assert await retired == 0, "it waits for nobody any more"

    asyncio.run(work())
    replicas.shutdown(0)
