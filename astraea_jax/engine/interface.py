"""Interfaces of whatever generates text: an engine, several replicas of it, or the client of a server."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Future
from typing import Protocol

from astraea_jax.engine.config import EngineConfig
from astraea_jax.engine.engine import Engine
from astraea_jax.engine.generation import Delta, Generation, Observer, Usage
from astraea_jax.engine.layout import Layout
from astraea_jax.engine.lifecycle import State
from astraea_jax.engine.sampling import SamplingParams
from astraea_jax.models.config import ModelConfig
from astraea_jax.models.tokenizer import Tokenizer
from astraea_jax.scheduler.config import SchedulerStats
from astraea_jax.scheduler.handover import HandOver
from astraea_jax.scheduler.placement import Report
from astraea_jax.scheduler.view import Held
from astraea_jax.scheduler.wait import Wait


class Stream(Protocol):
    """A request that runs: an async iterator of deltas."""

    @property
    def usage(self) -> Usage | None:
        """Known after the last delta; None before, and from a server that does not report it."""

    def __aiter__(self) -> AsyncIterator[Delta]: ...

    def cancel(self) -> None:
        """Stop it and free what it holds."""


class Model(Protocol):
    """The interface that an agent needs; its methods are documented at :class:`~astraea_jax.engine.engine.Engine`."""

    tokenizer: Tokenizer

    def generate(
        self,
        prompt: Sequence[int],
        params: SamplingParams | None = None,
        *,
        session: str | None = None,
        final: bool = False,
        salt: str = "",
    ) -> Stream: ...
    def tool_called(self, session: str, tool: str, *more: str) -> None: ...
    def end_session(self, session: str) -> None: ...


class Serving(Protocol):
    """The interface that a front door needs: one engine or several replicas, documented at the same place."""

    tokenizer: Tokenizer
    config: EngineConfig
    model_config: ModelConfig
    layout: Layout

    @property
    def state(self) -> State: ...
    @property
    def live(self) -> bool: ...
    @property
    def in_progress(self) -> int: ...
    @property
    def replicas(self) -> Sequence[Engine]: ...

    def start(self, progress: Callable[[int, int], None] = ...) -> None: ...
    def shutdown(self, grace_s: float = ...) -> int: ...
    def watch(self, changed: Callable[[], object]) -> None: ...
    def observe(self, ended: Observer) -> None: ...
    def generate(
        self,
        prompt: Sequence[int],
        params: SamplingParams | None = None,
        *,
        session: str | None = None,
        final: bool = False,
        salt: str = "",
        owner: str = "",
        parent: str | None = None,
        priority: int = 0,
    ) -> Generation: ...
    def waits(self, session: str, wait: Wait, *, owner: str = "") -> None: ...
    def tool_called(self, session: str, tool: str, *more: str, owner: str = "") -> None: ...
    def fork(self, session: str, child: str, *, owner: str = "") -> Future[None]: ...
    async def replace_tail(self, session: str, prompt: Sequence[int], *, owner: str = "", salt: str = "") -> bool: ...
    def held(
        self, prompt: Sequence[int], *, salt: str = "", session: str | None = None, owner: str = ""
    ) -> Future[Held]: ...
    def end_session(self, session: str, *, owner: str = "") -> None: ...
    def drain(self) -> None: ...
    def hand_over(self) -> Future[list[HandOver]]: ...
    def take_over(self, handed: HandOver) -> Future[None]: ...
    def report(self) -> Report: ...
    def stats(self) -> SchedulerStats: ...
    def counts(self) -> dict[str, int]: ...
