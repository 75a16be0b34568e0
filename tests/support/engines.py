"""An engine under a test's control: standing still where the test wants it, and at rest."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

from astraea_jax.engine import Engine


@contextmanager
def held(engine: Engine, steps: int) -> Iterator[Callable[[int], None]]:
    """The engine commits so many steps, then stands still until the block is left; ``more(n)`` lets n more pass. So
    what must happen while a segment runs does, however slow the machine.
    """
    read, allowed = engine._runner.read, threading.Semaphore(steps)

    def wait(step):
        allowed.acquire()
        return read(step)

    engine._runner.read = wait
    try:
        yield allowed.release
    finally:
        engine._runner.read = read
        allowed.release()


async def posted(engine: Engine) -> None:
    """Until an event waits for an engine that is held."""
    while not engine._events:
        await asyncio.sleep(0.002)


async def settled(engine: Engine, *, programs: bool = False) -> None:
    """Until no request is left and nothing moves, with ``programs`` no program either; and a turn of the loop more."""
    while (stats := engine.stats()).running or stats.waiting or (programs and stats.programs) or _moving(engine):
        await asyncio.sleep(0.005)
    loop = asyncio.get_running_loop()
    for _ in range(2):
        turned = loop.create_future()
        engine._post(partial(loop.call_soon_threadsafe, turned.set_result, None))
        await turned


def _moving(engine: Engine) -> bool:
    return engine._store is not None and engine._store.busy
