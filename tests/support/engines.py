"""An engine under a test's control: standing still where the test wants it, and at rest."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

from astraea_jax.engine.engine import Engine

WAIT_S = 120.0
"""No wait of a test takes as long, unless it hangs."""


async def until(happened: Callable[[], object]) -> None:
    """Wait until something has happened in another thread."""
    limit = time.monotonic() + WAIT_S
    while not happened():
        assert time.monotonic() < limit, "it never happens"
        await asyncio.sleep(0.002)


class Held:
    """Of an engine that stands still after some steps."""

    def __init__(self, steps: int):
        self._allowed, self._still = threading.Semaphore(steps), threading.Event()

    def more(self, steps: int) -> None:
        """Let so many more steps pass."""
        self._still.clear()
        self._allowed.release(steps)

    async def still(self) -> None:
        """Until it stands still, after which it takes no event."""
        await until(self._still.is_set)

    def wait(self) -> None:
        """Called by the engine before every commit."""
        if not self._allowed.acquire(blocking=False):
            self._still.set()
            self._allowed.acquire()


@contextmanager
def held(engine: Engine, steps: int) -> Iterator[Held]:
    """The engine commits so many steps, then stands still until the block is left. So what must happen while a request
    runs does, however slow the machine.
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


async def posted(engine: Engine) -> None:
    """Until an event waits for an engine that stands still."""
    await until(lambda: engine._events)


async def settled(engine: Engine, *, programs: bool = False) -> None:
    """Until no request is left and nothing moves, with ``programs`` no program either; and a turn of the loop more."""
    await until(lambda: not (engine.in_progress or (programs and engine.stats().programs) or _moving(engine)))
    loop = asyncio.get_running_loop()
    for _ in range(2):
        turned = loop.create_future()
        engine._post(partial(loop.call_soon_threadsafe, turned.set_result, None))
        await turned


def _moving(engine: Engine) -> bool:
    return engine._store is not None and engine._store.busy
