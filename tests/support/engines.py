"""An engine under a test's control: standing still where the test wants it, broken, and at rest."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, TypeVar

from astraea_jax.engine.engine import Engine
from astraea_jax.engine.events import Check
from astraea_jax.engine.interface import Serving
from astraea_jax.scheduler.wait import Wait

T = TypeVar("T")
WAIT_S = 120.0
"""No wait of a test takes as long, unless it hangs."""


async def until(happened: Callable[[], object]) -> None:
    """Wait until something has happened in another thread."""
    limit = time.monotonic() + WAIT_S
    while not happened():
        assert time.monotonic() < limit, "it never happens"
        await asyncio.sleep(0.002)


class Held:
    """Controls an engine that stands still after some steps."""

    def __init__(self, steps: int):
        self._allowed, self._still = threading.Semaphore(steps), threading.Event()

    def more(self, steps: int) -> None:
        """Let so many more steps pass."""
        self._still.clear()
        self._allowed.release(steps)

    @property
    def stands_still(self) -> bool:
        """Whether the engine stands still now."""
        return self._still.is_set()

    async def still(self) -> None:
        """Wait until it stands still, after which it takes no event."""
        await until(self._still.is_set)

    def wait(self) -> None:
        """Called by the engine before every commit."""
        if not self._allowed.acquire(blocking=False):
            self._still.set()
            self._allowed.acquire()


@contextmanager
def held(engine: Engine, steps: int) -> Iterator[Held]:
    """Let the engine commit so many steps, then stand still until the block is left. So what must happen while a
    request runs does, however slow the machine.
    """
    read, state = engine._runner.read, Held(steps)

    def wait(step):
        state.wait()
        return read(step)

    engine._runner.read = wait
    try:
        yield state
    finally:
        engine._runner.read = read
        state.more(1)


@contextmanager
def gathering(engine: Serving) -> Iterator[None]:
    """Let idle engines take no event until the block is left, and then all of them before their next plan. So what is
    asked within the block is planned together, however slow the caller is.
    """
    leave = threading.Event()

    def stand(stands: threading.Event, _: Future[None]) -> None:
        stands.set()
        leave.wait()

    with ExitStack() as stack:
        stack.callback(leave.set)
        for replica in engine.replicas:
            stands, asked = threading.Event(), Future[None]()
            asked.add_done_callback(partial(stand, stands))  # called in the loop's thread
            replica._post(Check(asked))
            assert stands.wait(WAIT_S)
        yield


async def together(engine: Serving, *work: Coroutine[Any, Any, T]) -> list[T]:
    """Return what all of these come to; what each asks of the engine before it waits is planned together."""
    with gathering(engine):
        tasks = [asyncio.create_task(one) for one in work]
        await asyncio.sleep(0)  # each runs until it waits
    return await asyncio.gather(*tasks)


async def posted(engine: Engine) -> None:
    """Wait until an event waits for an engine that stands still."""
    await until(engine._loop.events.qsize)


def break_loop(engine: Engine, error: BaseException) -> None:
    """Let the engine's next plan raise ``error``: a fault of its own, outside of any step."""

    def plan(now: float) -> None:
        raise error

    engine._scheduler.plan = plan
    engine.waits("nobody", Wait(("nothing",)))  # so that an idle loop plans


def end_all_sessions(engine: Engine) -> None:
    """End the sessions that earlier tests have left in an engine which several tests use."""
    limit = time.monotonic() + WAIT_S
    while left := engine.look(1_000).result(WAIT_S):
        assert time.monotonic() < limit, f"requests of another test never end: {left}"
        for program in left:
            if isinstance(program.key, tuple):
                owner, session = program.key
                engine.end_session(session, owner=owner)


async def settled(engine: Serving, *, programs: bool = False) -> None:
    """Wait until no request is left and nothing moves, with ``programs`` no program either; check all accounts."""
    await until(lambda: not (engine.in_progress or (programs and engine.stats().programs) or _moving(engine)))
    for replica in engine.replicas:
        for _ in range(2):
            await asyncio.to_thread(replica.check)


def _moving(engine: Serving) -> bool:
    return any(replica._store is not None and replica._store.busy for replica in engine.replicas)
