"""Everything that callers, the device and operators can do to an engine, in any order, as a state machine.

What must hold: every accepted request ends exactly once; pages, programs and requests are accounted for; a request is
touched by its own caller, a failing step or the end of the engine, and by nobody else. The device is a stub of
dictionaries (support/stub.py), so a misplaced page shows as a wrong token.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from support.device import VOCABULARY, complete
from support.engines import break_loop
from support.stub import STUB, stub_engine

from astraea_jax.engine.generation import Generation
from astraea_jax.engine.lifecycle import State
from astraea_jax.engine.loop import MAX_FAILURES
from astraea_jax.engine.sampling import SamplingParams
from astraea_jax.errors import EngineDead, Overloaded, RequestError, StepFailed

STEPS = 50
EXAMPLES = 400 if os.environ.get("CI") else 40
"""Of so many steps each; CI takes 20,000 steps."""
LIMIT_S = 30.0
"""An answer that takes longer is taken for one that never comes."""

NAMES = (None, "a", "b", "#1", "#2", "#3")
OWNERS = ("", "x")
ODD = {
    "no sequence": lambda e: e.generate(7),
    "text": lambda e: e.generate("text"),
    "bytes": lambda e: e.generate(b"text"),
    "nothing": lambda e: e.generate([]),
    "a flag among tokens": lambda e: e.generate([1, True]),
    "a fraction": lambda e: e.generate([1.5]),
    "None among tokens": lambda e: e.generate([None]),
    "lists of different lengths": lambda e: e.generate([[1], [2, 3]]),
    "two axes": lambda e: e.generate(np.ones((2, 2), np.int32)),
    "beyond 64 bits": lambda e: e.generate([2**70]),
    "outside the vocabulary": lambda e: e.generate([VOCABULARY]),
    "negative": lambda e: e.generate([-1]),
    "too long": lambda e: e.generate([1] * 44),
    "params": lambda e: e.generate([1], {"max_tokens": 2}),
    "session of a list": lambda e: e.generate([1], session=["a"]),
    "session of a number": lambda e: e.generate([1], session=3),
    "empty session": lambda e: e.generate([1], session=""),
    "long session": lambda e: e.generate([1], session="a" * 257),
    "half a character": lambda e: e.generate([1], session="\ud800"),
    "owner": lambda e: e.generate([1], session="a", owner=None),
    "final": lambda e: e.generate([1], session="a", final="yes"),
    "salt": lambda e: e.generate([1], salt=b"salt"),
    "long salt": lambda e: e.generate([1], salt="s" * 257),
    "salt of half a character": lambda e: e.generate([1], salt="\udfff"),
    "end of a list": lambda e: e.end_session(["a"]),
    "end of nobody": lambda e: e.end_session(None),
    "tool without a name": lambda e: e.tool_called("a", ""),
    "tool of a list": lambda e: e.tool_called("a", ["x"]),
    "long tool": lambda e: e.tool_called("a", "t" * 257),
}


@pytest.fixture(scope="module", autouse=True)
def callers():
    """The event loop that all callers share, in a thread of its own."""
    loop = Machine.loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    yield
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()


@dataclass(eq=False)
class Asked:
    """A request that was accepted, and what its caller has seen of it."""

    prompt: list[int]
    params: SamplingParams
    key: tuple[str, str] | None
    tokens: list[int] = field(default_factory=list)
    ends: list[str | Exception] = field(default_factory=list)
    reader: Future | None = None
    may_be_cancelled: bool = False
    may_be_busy: bool = False

    async def read(self, generation: Generation) -> None:
        try:
            async for delta in generation:
                self.tokens += delta.token_ids
                if delta.finish_reason is not None:
                    self.ends.append(delta.finish_reason)
        except Exception as error:
            self.ends.append(error)
        except asyncio.CancelledError:
            self.ends.append("dropped")
            raise
        assert generation._mailbox.items.empty(), "something came after the end"


class Machine(RuleBasedStateMachine):
    loop: asyncio.AbstractEventLoop

    @initialize()
    def make(self) -> None:
        self.engine, self.runner = stub_engine()
        self.asked: list[Asked] = []
        self.failures = 0
        self.may_die = False

    # -- callers -----------------------------------------------------------------------------------------------

    @rule(
        prompt=st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=20),
        max_tokens=st.integers(1, 12),
        stop=st.integers(0, VOCABULARY - 1),
        name=st.sampled_from(NAMES),
        owner=st.sampled_from(OWNERS),
        final=st.booleans(),
    )
    def submit(self, prompt, max_tokens, stop, name, owner, final) -> None:
        params = SamplingParams(max_tokens=max_tokens, ignore_eos=True, stop_token_ids=(stop,))
        self._submit(Asked(prompt, params, None if name is None else (owner, name)), final)

    @rule(data=st.data())
    def next_turn(self, data) -> None:
        turns = [a for a in self.asked if a.key and a.ends and len(a.prompt) + len(a.tokens) < 30]
        if turns:
            last = data.draw(st.sampled_from(turns))
            prompt = [*last.prompt, *last.tokens, 1, 2]
            self._submit(Asked(prompt, SamplingParams(max_tokens=6, ignore_eos=True), last.key), final=False)

    def _submit(self, asked: Asked, final: bool) -> None:
        open_ = [a for a in self.asked if not a.ends]
        asked.may_be_busy = asked.key is not None and any(a.key == asked.key for a in open_)
        owner, name = asked.key or ("", None)

        async def ask() -> None:
            generation = self.engine.generate(asked.prompt, asked.params, session=name, owner=owner, final=final)
            asked.reader = asyncio.ensure_future(asked.read(generation))

        serving = self.engine.live
        try:
            self._call(ask())
        except EngineDead:
            assert not serving or self.may_die
        except Overloaded:
            assert len(open_) >= STUB.max_queued
        else:
            assert serving, "accepted by an engine that does not serve"
            self.asked.append(asked)

    @rule(odd=st.sampled_from(sorted(ODD)))
    def ask_something_odd(self, odd) -> None:
        async def ask() -> None:
            with pytest.raises(RequestError):
                ODD[odd](self.engine)

        self._call(ask())

    @rule(data=st.data(), how=st.sampled_from(["cancel the task", "break", "cancel"]))
    def give_up(self, data, how) -> None:
        if open_ := [a for a in self.asked if not a.ends]:
            asked = data.draw(st.sampled_from(open_))
            asked.may_be_cancelled = True
            self.loop.call_soon_threadsafe(asked.reader.cancel)

    @rule(name=st.sampled_from(NAMES[1:]), owner=st.sampled_from(OWNERS))
    def end_session(self, name, owner) -> None:
        for asked in self.asked:
            asked.may_be_cancelled |= asked.key == (owner, name) and not asked.ends
        self.engine.end_session(name, owner=owner)

    @rule(name=st.sampled_from(NAMES[1:]), owner=st.sampled_from(OWNERS), tool=st.sampled_from(["look", "x" * 256]))
    def name_a_tool(self, name, owner, tool) -> None:
        self.engine.tool_called(name, tool, owner=owner)

    @rule(seeds=st.lists(st.integers(0, 30), min_size=2, max_size=4))
    def ask_and_forget_from_several_threads(self, seeds) -> None:
        async def ask(seed: int) -> None:
            generation = self.engine.generate([seed], SamplingParams(max_tokens=12, ignore_eos=True))
            if seed % 2:
                with contextlib.suppress(TimeoutError, StepFailed):
                    await asyncio.wait_for(generation.text(), 0.002)

        def thread(seed: int) -> None:
            with contextlib.suppress(EngineDead, Overloaded):
                asyncio.run(ask(seed))

        with ThreadPoolExecutor(len(seeds)) as pool:
            list(pool.map(thread, seeds))

    # -- the device and the operator ---------------------------------------------------------------------------

    @rule()
    def start(self) -> None:
        before = self.engine.state
        try:
            self.engine.start()
        except EngineDead:
            assert before is not State.NEW
            assert before is not State.SERVING or self.may_die
        else:
            assert before in (State.NEW, State.SERVING)

    @rule(call=st.sampled_from(["dispatch", "read"]))
    def let_a_step_fail(self, call) -> None:
        self.failures += 1
        self.may_die |= self.failures >= MAX_FAILURES
        self.runner.failing.append(call)

    @rule()
    def lose_the_device(self) -> None:
        self.may_die |= bool(self.runner.failing)
        if self.runner.failing:
            self.runner.broken = RuntimeError("the device is gone")

    @precondition(lambda self: self.engine.live)
    @rule(error=st.sampled_from([ZeroDivisionError, SystemExit, MemoryError]))
    def break_the_loop(self, error) -> None:
        self.may_die = True
        break_loop(self.engine, error("the test"))

    @rule()
    def hold_the_device(self) -> None:
        self.runner.go.clear()

    @rule()
    def release_the_device(self) -> None:
        self.runner.go.set()

    @rule(again=st.booleans())
    def shut_down(self, again) -> None:
        self.may_die = True
        with ThreadPoolExecutor(2) as pool:
            ends = [pool.submit(self.engine.shutdown, 0) for _ in range(1 + again)]
            self.runner.go.set()
            for end in ends:
                end.result(LIMIT_S)
        assert self.engine.state is State.DEAD
        assert not self.engine._thread.is_alive()
        self._settle()
        with pytest.raises(EngineDead):
            self.engine.start()
        self.make()

    @rule()
    def settle(self) -> None:
        self.runner.go.set()
        self._settle()

    # -- what must hold ----------------------------------------------------------------------------------------

    @invariant()
    def the_device_finds_no_fault(self) -> None:
        if hasattr(self, "runner") and self.runner.fault:
            raise self.runner.fault

    @invariant()
    def a_dead_engine_had_a_reason(self) -> None:
        if hasattr(self, "engine"):
            assert self.engine.state is not State.DEAD or self.may_die

    def _settle(self) -> None:
        """Wait for every answer, and look at each."""
        for asked in self.asked:
            with contextlib.suppress(asyncio.CancelledError):
                self._call(asyncio.wait_for(asyncio.shield(asked.reader), LIMIT_S))
            self._judge(asked)
        self.asked = [a for a in self.asked if a.key]  # their sessions may go on
        if self.engine.live:
            with contextlib.suppress(TimeoutError if self.may_die else ()):
                self.engine.check(1.0 if self.may_die else LIMIT_S)
            if not self.may_die:
                assert self.engine.in_progress == 0
                self.failures = 0

    def _judge(self, asked: Asked) -> None:
        expected = complete(asked.prompt, asked.params.max_tokens, frozenset(asked.params.stop_token_ids))
        assert asked.tokens == expected[: len(asked.tokens)], "wrong tokens"
        assert len(asked.ends) == 1, asked.ends
        match asked.ends[0]:
            case "stop" | "length":
                assert asked.tokens == expected
            case "cancelled" | "dropped":
                assert asked.may_be_cancelled, "cancelled by somebody else"
            case Overloaded():
                assert asked.may_be_busy, "kept out by somebody else"
            case StepFailed():
                assert self.failures
            case EngineDead():
                assert self.may_die
            case other:
                raise AssertionError(f"an answer that nobody knows: {other!r}")

    def _call(self, work):
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(LIMIT_S)

    def teardown(self) -> None:
        if hasattr(self, "engine"):
            self.runner.go.set()
            self._settle()
            self.engine.shutdown(0)
            self.may_die = True
            self._settle()


def run(examples: int, *phases: Phase) -> None:
    run_state_machine_as_test(
        Machine,
        settings=settings(
            max_examples=examples,
            stateful_step_count=STEPS,
            deadline=None,
            phases=phases or tuple(Phase),
            suppress_health_check=list(HealthCheck),
        ),
    )


def test_whatever_happens_every_request_ends_once_and_nobody_meets_another():
    run(EXAMPLES)
