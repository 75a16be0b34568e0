"""Everything that callers, the device and operators can do to an engine, in any order, as a state machine.

What must hold: every accepted request ends exactly once; pages, programs and requests are accounted for; a request is
touched by its own caller, a failing step or the end of the engine, and by nobody else. The device is a stub of
dictionaries (support/stub.py), so a misplaced page shows as a wrong token.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
from hypothesis import strategies as st
from hypothesis.stateful import (
    initialize,
    invariant,
    rule,
)
from support.device import VOCABULARY, complete
from support.engines import break_loop
from support.grammars import EVEN, Broken
from support.session_states import LIMIT_S, NAMES, OWNERS, SessionRules
from support.stub import STUB, stub_engine

from astraea_jax.engine.generation import Generation, Mailbox
from astraea_jax.engine.lifecycle import State
from astraea_jax.engine.loop import MAX_FAILURES
from astraea_jax.engine.sampling import SamplingParams
from astraea_jax.engine.shared_bound import RESERVE
from astraea_jax.errors import EngineDead, Overloaded, RequestError, StepFailed
from astraea_jax.scheduler.wait import Wait

ONE = SamplingParams(max_tokens=1, ignore_eos=True)
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
    "fork of nobody": lambda e: e.fork(None, "b"),
    "fork without a name": lambda e: e.fork("a", ""),
    "fork under a long name": lambda e: e.fork("a", "b" * 257),
    "fork of no owner": lambda e: e.fork("a", "b", owner=3),
    "what is held of text": lambda e: e.held("text"),
    "what is held of a list": lambda e: e.held([1], session=["a"]),
    "what is held beyond the context": lambda e: e.held([1] * 44),
    "end of a list": lambda e: e.end_session(["a"]),
    "end of nobody": lambda e: e.end_session(None),
    "tool without a name": lambda e: e.waits("a", Wait(("",))),
    "tool of a list": lambda e: e.waits("a", Wait((["x"],))),
    "long tool": lambda e: e.waits("a", Wait(("t" * 257,))),
    "tools of a list": lambda e: e.waits("a", Wait(["t"])),
    "a wait of text": lambda e: e.waits("a", "t"),
    "expected of text": lambda e: e.waits("a", Wait(("t",), expected_s="3")),
    "kept for a flag": lambda e: e.waits("a", Wait(("t",), keep_s=True)),
    "priority of text": lambda e: e.generate([1], priority="high"),
    "priority of a fraction": lambda e: e.generate([1], priority=0.5),
    "parent of a number": lambda e: e.generate([1], session="a", parent=3),
    "empty parent": lambda e: e.generate([1], session="a", parent=""),
}


@dataclass(eq=False)
class Asked:
    """A request that was accepted, and what its caller has seen of it."""

    prompt: list[int]
    params: SamplingParams
    key: tuple[str, str] | None
    tokens: list[int] = field(default_factory=list)
    ends: list[str | Exception] = field(default_factory=list)
    reader: asyncio.Task[None] | None = None
    mailbox: Mailbox | None = None
    may_be_cancelled: bool = False
    may_be_busy: bool = False
    judged: bool = False

    async def read(self, generation: Generation) -> None:
        try:
            async for delta in generation:
                self.tokens += delta.token_ids
                told = delta.token_ids if self.params.logprobs is not None else ()
                assert tuple(one.token_id for one in delta.logprobs) == told
                if delta.finish_reason is not None:
                    self.ends.append(delta.finish_reason)
        except Exception as error:
            self.ends.append(error)
        assert not generation._mailbox._items, "something came after the end"

    async def over(self) -> None:
        """Wait for the end."""
        assert self.reader is not None
        done, _ = await asyncio.wait({self.reader}, timeout=LIMIT_S)
        assert done, "an answer never came"
        if self.reader.cancelled():
            self.ends = ["dropped"]
        else:
            self.reader.result()


def _even(token: int) -> int:
    """The token of the stub's device, or the first one if :data:`~.grammars.EVEN` forbids it."""
    return token if token % 2 == 0 else 0


class Machine(SessionRules):
    loop: asyncio.AbstractEventLoop

    @initialize(started=st.sampled_from([True, True, False]))
    def make(self, started) -> None:
        self.engine, self.runner = stub_engine()
        self.asked: list[Asked] = []
        self.failures = 0
        self.questions, self.tails = [], []
        self.forgotten = 0  # given up, and perhaps not yet noticed by the engine
        self.may_die = False
        if started:
            self.start()

    # -- callers -----------------------------------------------------------------------------------------------

    @rule(
        prompt=st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=20),
        max_tokens=st.integers(1, 12),
        stop=st.integers(0, VOCABULARY - 1),
        name=st.sampled_from(NAMES),
        owner=st.sampled_from(OWNERS),
        final=st.booleans(),
        grammar=st.sampled_from([None, EVEN, *map(Broken, ("fill", "refuses"))]),
        logprobs=st.sampled_from([None, 2]),
        parent=st.sampled_from(NAMES),
        priority=st.sampled_from([0, 0, 1, -1]),
    )
    def submit(self, prompt, max_tokens, stop, name, owner, final, grammar, logprobs, parent, priority) -> None:
        params = SamplingParams(
            max_tokens=max_tokens, ignore_eos=True, stop_token_ids=(stop,), grammar=grammar, logprobs=logprobs
        )
        self._submit(Asked(prompt, params, None if name is None else (owner, name)), final, parent, priority)

    @rule(which=st.integers(0, 99))
    def next_turn(self, which) -> None:
        turns = [a for a in self.asked if a.key and a.ends and len(a.prompt) + len(a.tokens) < 30]
        if turns:
            last = turns[which % len(turns)]
            prompt = [*last.prompt, *last.tokens, 1, 2]
            self._submit(Asked(prompt, SamplingParams(max_tokens=6, ignore_eos=True), last.key), final=False)

    @rule(which=st.integers(0, 99))
    def take_the_name_of_another_owners_session(self, which) -> None:
        if named := [a for a in self.asked if a.key and not a.ends]:
            owner, name = named[which % len(named)].key
            self._submit(Asked([1], ONE, (OWNERS[owner == OWNERS[0]], name)), final=False)

    @rule()
    def ask_under_names_such_as_the_engine_might_give(self) -> None:
        for key in (None, ("", "#1"), ("", "#2"), ("", "#3")):
            self._submit(Asked([1], ONE, key), final=False)

    def _submit(self, asked: Asked, final: bool, parent: str | None = None, priority: int = 0) -> bool:
        """Ask; whether it was accepted."""
        open_ = [a for a in self.asked if not a.ends]
        asked.may_be_busy = asked.key is not None and any(a.key == asked.key for a in open_)
        owner, name = asked.key or ("", None)

        async def ask() -> None:
            generation = self.engine.generate(
                asked.prompt,
                asked.params,
                session=name,
                owner=owner,
                final=final,
                parent=parent,
                priority=priority,
            )
            asked.mailbox = generation._mailbox
            asked.reader = asyncio.create_task(asked.read(generation))

        serving = self.engine.live
        unseen = self.forgotten + sum(not tail.done() for tail in self.tails)  # which may be of any owner
        try:
            self._call(ask())
        except EngineDead:
            assert not serving or self.may_die
        except Overloaded:
            own = unseen or any((a.key or ("",))[0] == owner for a in open_)
            kept = STUB.max_queued // RESERVE if owner and own else 0
            assert len(open_) + unseen >= STUB.max_queued - kept
        else:
            assert serving, "accepted by an engine that does not serve"
            self.asked.append(asked)
            return True
        return False

    @rule(odd=st.sampled_from(sorted(ODD)))
    def ask_something_odd(self, odd) -> None:
        async def ask() -> None:
            try:
                ODD[odd](self.engine)
            except RequestError:
                return
            raise AssertionError(f"accepted: {odd}")

        self._call(ask())

    @rule(which=st.integers(0, 99))
    def give_up(self, which) -> None:
        if open_ := [a for a in self.asked if not a.ends]:
            self._give_up(open_[which % len(open_)])

    @rule()
    def give_up_what_would_take_long(self) -> None:
        self.runner.go.set()
        asked = Asked([7], SamplingParams(max_tokens=43, ignore_eos=True), None)
        if self._submit(asked, final=False):
            self._give_up(asked)

    def _give_up(self, asked: Asked) -> None:
        asked.may_be_cancelled = True
        self.forgotten += 1
        self.loop.call_soon_threadsafe(asked.reader.cancel)
        self._call(asked.over())
        if not self.may_die and self.runner.go.is_set() and self.engine.live:
            for _ in range(2):  # the first answers in the turn that takes the cancellation in
                self.engine.check(LIMIT_S)
            assert asked.mailbox not in self.engine._life._open, "given up, and still there"

    @rule(name=st.sampled_from(NAMES[1:]), owner=st.sampled_from(OWNERS))
    def end_session(self, name, owner) -> None:
        for asked in self.asked:
            asked.may_be_cancelled |= asked.key == (owner, name) and not asked.ends
        self.engine.end_session(name, owner=owner)

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

        self.forgotten += len(seeds)
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

    @rule(error=st.sampled_from([ZeroDivisionError, SystemExit, MemoryError]), asking=st.booleans())
    def break_the_loop(self, error, asking) -> None:
        if asking:
            self._submit(Asked([1], SamplingParams(max_tokens=40, ignore_eos=True), None), final=False)
        self.may_die = True
        was_live = self.engine.live
        break_loop(self.engine, error("the test"))
        if was_live and self.runner.go.is_set():
            died = threading.Event()
            self.engine.watch(died.set)
            assert self.engine.state is State.DEAD or died.wait(LIMIT_S), "it is broken, and says that it serves"

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
        self.start()  # which is refused
        self.make(started=True)

    @rule()
    def settle(self) -> None:
        self.runner.go.set()
        self._settle()
        if (
            self.failures
            and not self.may_die
            and not self.runner.failing
            and self._submit(Asked([1], ONE, None), False)
        ):
            self._settle()
            self.failures = 0  # one that succeeds ends a row of failures

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
            if not asked.judged:
                self._call(asked.over())
                self._judge(asked)
                asked.judged = True
        self._judge_questions()
        self.asked = [a for a in self.asked if a.key]  # their sessions may go on
        if self.engine.live:
            with contextlib.suppress(*((TimeoutError, EngineDead) if self.may_die else ())):
                for _ in range(2):  # the first answers within the turn that takes the last cancellations in
                    self.engine.check(1.0 if self.may_die else LIMIT_S)
            assert self.may_die or self.engine.in_progress == 0
            self.forgotten *= self.may_die

    def _judge(self, asked: Asked) -> None:
        params, choose = asked.params, int if asked.params.grammar is None else _even
        expected = complete(asked.prompt, params.max_tokens, frozenset(params.stop_token_ids), choose)
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
                assert self.failures or isinstance(params.grammar, Broken)
            case EngineDead():
                assert self.may_die
            case other:
                raise AssertionError(f"an answer that nobody knows: {other!r}")

    def _call(self, work):
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(2 * LIMIT_S)

    def teardown(self) -> None:
        if hasattr(self, "engine"):
            self.runner.go.set()
            self._settle()
            self.engine.shutdown(0)
            self.may_die = True
            self._settle()
