"""What callers can say and ask about the sessions of an engine, as rules of its state machine (engine_states.py)."""

from __future__ import annotations

import asyncio
import concurrent.futures
from typing import Any

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule
from support.device import VOCABULARY
from support.engines import WAIT_S

from astraea_jax.engine.engine import Engine
from astraea_jax.errors import EngineDead, Overloaded, RequestError, StepFailed
from astraea_jax.scheduler.wait import Wait

LIMIT_S = WAIT_S
"""An answer that takes longer is taken for one that never comes."""

NAMES = (None, "a", "b", "#1", "#2", "#3")
OWNERS = ("", "x")
SECONDS = (None, 0, 3.5, -1, 10**400, -(10**400), 1e300, float("inf"), float("nan"))
"""Hints of clients, absurd ones among them."""


class SessionRules(RuleBasedStateMachine):
    """Forks, tails replaced, and questions; each is answered once, whatever happens to the engine."""

    loop: asyncio.AbstractEventLoop
    engine: Engine
    questions: list[concurrent.futures.Future[Any]]
    tails: list[concurrent.futures.Future[Any]]
    failures: int
    forgotten: int
    may_die: bool

    @rule(
        name=st.sampled_from(NAMES[1:]),
        owner=st.sampled_from(OWNERS),
        tools=st.sampled_from([("look",), ("x" * 256,), ("look", "look", "see"), ("look",) * 1000, ()]),
        expected_s=st.sampled_from(SECONDS),
        keep_s=st.sampled_from(SECONDS),
    )
    def wait(self, name, owner, tools, expected_s, keep_s) -> None:
        self.engine.waits(name, Wait(tools, expected_s, keep_s), owner=owner)

    @rule(parent=st.sampled_from(NAMES[1:]), child=st.sampled_from([*NAMES[1:], "c"]), owner=st.sampled_from(OWNERS))
    def fork(self, parent, child, owner) -> None:
        self._ask(lambda: self.engine.fork(parent, child, owner=owner))

    @rule(prompt=st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=20), name=st.sampled_from(NAMES))
    def ask_what_is_held(self, prompt, name) -> None:
        self._ask(lambda: self.engine.held(prompt, session=name))

    def _ask(self, ask) -> None:
        try:
            self.questions.append(ask())
        except EngineDead:
            assert not self.engine.live or self.may_die

    @rule(
        prompt=st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=30),
        name=st.sampled_from(NAMES[1:]),
        owner=st.sampled_from(OWNERS),
        gives_up=st.booleans(),
    )
    def replace_tail(self, prompt, name, owner, gives_up) -> None:
        tail = asyncio.run_coroutine_threadsafe(self.engine.replace_tail(name, prompt, owner=owner), self.loop)
        self._call(asyncio.sleep(0))  # it is posted now
        self.forgotten += gives_up
        if gives_up:
            tail.cancel()
        self.tails.append(tail)

    def _judge_questions(self) -> None:
        """Whatever was asked about sessions is answered, whether or not there are any."""
        _, waiting = concurrent.futures.wait(self.questions + self.tails, LIMIT_S)
        assert not waiting, "an answer never came"
        for answer in self.questions + self.tails:
            match None if answer.cancelled() else answer.exception():
                case None | RequestError() | Overloaded():
                    pass
                case EngineDead():
                    assert self.may_die or answer in self.tails
                case StepFailed():
                    assert self.failures
                    assert answer in self.tails
                case other:
                    raise AssertionError(f"an answer that nobody knows: {other!r}")
        self.questions, self.tails = [], []
