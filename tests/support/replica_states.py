"""Everything that can happen to several replicas in one process, in any order, as a state machine.

What must hold: every request that was accepted ends once, with right tokens; a session never has requests on two
replicas at once; a replica that dies or is retired takes only what ran there with it; accounts balance.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from concurrent.futures import Future
from dataclasses import replace

import numpy as np
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from support.device import VOCABULARY, complete
from support.engine_states import Asked
from support.engines import break_loop, until
from support.session_states import LIMIT_S
from support.stub import STUB, stub_engine

from astraea_jax.engine.replicas import Replicas
from astraea_jax.engine.sampling import SamplingParams
from astraea_jax.errors import EngineDead, Overloaded, RequestError
from astraea_jax.scheduler.wait import Wait

NAMES = ("a", "b", "c", "d")
REFUSED = (RequestError, EngineDead, Overloaded)
CONFIG = replace(STUB, max_programs=8)


class Machine(RuleBasedStateMachine):
    loop: asyncio.AbstractEventLoop

    @initialize(count=st.integers(2, 3))
    def make(self, count) -> None:
        made = [stub_engine(CONFIG) for _ in range(count)]
        self.runners = [runner for _, runner in made]
        self.replicas = Replicas([engine for engine, _ in made])
        self.replicas._homes._router._rule = self.anywhere
        self.replicas.start()
        self.placed = 0
        self.asked: list[Asked] = []
        self.texts: dict[str, list[int]] = {}
        self.leaving: set[int] = set()
        """Replicas that have been killed or are being retired."""
        self.retiring: list[Future[int]] = []
        self.forks: list[Future[None]] = []

    def anywhere(self, segment, fleet, allowed) -> int:
        """Place a request: programs move all the time."""
        self.placed += 1
        return int(np.flatnonzero(allowed)[self.placed * 7 % 5 % allowed.sum()])

    @rule(name=st.sampled_from(NAMES), new=st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=12))
    def ask(self, name, new) -> None:
        prompt = [*self.texts.get(name, []), *new]
        self._ask(name, prompt if len(prompt) < 36 else new)

    @rule(name=st.sampled_from(NAMES), parent=st.sampled_from(NAMES))
    def ask_as_a_child(self, name, parent) -> None:
        self._ask(name, [*self.texts.get(parent, [])[:30], 1], parent=parent)

    def _ask(self, name: str, prompt: list[int], parent: str | None = None) -> None:
        asked = Asked(prompt, SamplingParams(max_tokens=6, ignore_eos=True), ("", name))
        asked.may_be_busy = any(not one.ends for one in self.asked if one.key == asked.key)
        # Before it is asked, since some may end between a refusal and a look at them. The caller has seen the end of a
        # request that was given up before the engine has.
        waiting = sum(one.may_be_cancelled or not one.ends for one in self.asked)

        async def ask() -> None:
            asked.reader = asyncio.create_task(
                asked.read(self.replicas.generate(prompt, asked.params, session=name, parent=parent))
            )

        try:
            self._call(ask())
        except EngineDead:
            assert len(self.leaving) == len(self.replicas.replicas)
        except Overloaded:
            assert waiting >= CONFIG.max_queued
        else:
            self.asked.append(asked)

    @rule(which=st.integers(0, 99))
    def give_up(self, which) -> None:
        if self.asked:
            asked = self.asked[which % len(self.asked)]
            asked.may_be_cancelled = True
            self.loop.call_soon_threadsafe(asked.reader.cancel)

    @rule(name=st.sampled_from(NAMES))
    def end(self, name) -> None:
        for asked in self.asked:
            asked.may_be_cancelled |= asked.key == ("", name)
        self.replicas.end_session(name)
        self.texts.pop(name, None)

    @rule(name=st.sampled_from(NAMES), child=st.sampled_from(NAMES))
    def fork(self, name, child) -> None:
        with contextlib.suppress(*REFUSED):
            self.forks.append(self.replicas.fork(name, child))

    @rule(name=st.sampled_from(NAMES))
    def wait(self, name) -> None:
        self.replicas.waits(name, Wait(("look",)))

    @rule(number=st.integers(0, 1))
    def kill(self, number) -> None:
        self.leaving.add(number)
        break_loop(self.replicas.replicas[number], RuntimeError("the test"))

    @rule(number=st.integers(0, 2), grace_s=st.sampled_from([0.0, 0.02, 0.1]))
    def retire(self, number, grace_s) -> None:
        if number < len(self.replicas.replicas):
            self.leaving.add(number)
            self.retiring.append(asyncio.run_coroutine_threadsafe(self.replicas.retire(number, grace_s), self.loop))

    @rule()
    def hold_all_devices(self) -> None:
        for runner in self.runners:
            runner.go.clear()

    @rule()
    def settle(self) -> None:
        self._settle()

    @invariant()
    def no_session_runs_twice(self) -> None:
        if not hasattr(self, "replicas"):
            return
        if fault := next((runner.fault for runner in self.runners if runner.fault), None):
            raise fault
        running = Counter(
            program.key
            for engine in self.replicas.replicas
            if engine.live
            for program in [*engine._scheduler._programs.live]
        )
        given_up = {asked.key for asked in self.asked if asked.may_be_cancelled}
        assert all(count == 1 or key in given_up for key, count in running.items()), "on two replicas at once"

    def _settle(self) -> None:
        for runner in self.runners:
            runner.go.set()
        for retiring in self.retiring:
            retiring.result(LIMIT_S)
        self.retiring.clear()
        for fork in self.forks:
            with contextlib.suppress(*REFUSED):
                fork.result(LIMIT_S)
        self.forks.clear()
        for asked in self.asked:
            self._call(asked.over())
            self._judge(asked)
        self.asked.clear()
        for engine in [one for one in self.replicas.replicas if one.live]:
            with contextlib.suppress(*((EngineDead,) if self.leaving else ())):
                engine.check(LIMIT_S)
        self._call(until(self._nothing_is_under_way))

    def _nothing_is_under_way(self) -> bool:
        """Whether the router knows that every request has ended."""
        homes = self.replicas._homes
        with homes.lock:
            homes._look()
            return not homes._router._sent

    def _judge(self, asked: Asked) -> None:
        expected = complete(asked.prompt, asked.params.max_tokens)
        assert asked.tokens == expected[: len(asked.tokens)], "wrong tokens"
        assert len(asked.ends) == 1, asked.ends
        match asked.ends[0]:
            case "length":
                assert asked.tokens == expected
                assert asked.key is not None
                self.texts[asked.key[1]] = [*asked.prompt, *asked.tokens]
            case "cancelled" | "dropped":
                assert asked.may_be_cancelled
            case EngineDead():
                assert self.leaving
            case Overloaded():
                assert asked.may_be_busy
            case other:
                raise AssertionError(f"an answer that nobody knows: {other!r}")

    def _call(self, work):
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(2 * LIMIT_S)

    def teardown(self) -> None:
        if hasattr(self, "replicas"):
            self._settle()
            self.replicas.shutdown(0)
