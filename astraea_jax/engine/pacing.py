"""Paces what streams are told, so that telling it does not slow down the engine that makes it.

Every message to a client costs time in the server's process, whose interpreter the serving loop needs as well. With
a message per token, 64 streams of a small model would take a third of it. So messages wait, no longer than needed to
keep the event loop's share small, and a stream is told together what has come meanwhile. A few streams, or a model
whose steps are long, wait for nothing.
"""

from __future__ import annotations

import asyncio
import time
from typing import Protocol

SHARE = 0.05
"""Share of the time that the event loop may spend before messages wait."""
LONGEST_S = 0.1
"""Seconds that a message waits at most, about what people notice."""
TICK_S = 0.001
"""Seconds by which a turn may come early."""


class Reader(Protocol):
    """Waits for its turn."""

    def wake(self) -> None: ...


class Pace:
    """The turns in which the streams of one event loop are told what has come; all that wait share the next one.

    Args:
        share: of the time that may be spent in the event loop.
        longest_s: seconds between two turns at most.
    """

    def __init__(self, share: float = SHARE, longest_s: float = LONGEST_S):
        self._share, self._longest_s = share, longest_s
        self._began = self._spent = 0.0
        """Time of the latest turn, and processor time of the event loop's thread until then."""
        self._waiting: list[Reader] = []

    def wake(self, reader: Reader) -> None:
        """Wake a reader at the next turn, which may be now; called in the event loop."""
        if not self._waiting:
            wait_s = self._wait_s()
            if wait_s <= 0:
                self._take(time.monotonic())
                reader.wake()
                return
            asyncio.get_running_loop().call_later(wait_s, self._turn)
        self._waiting.append(reader)

    def _wait_s(self) -> float:
        """Seconds until the next turn; they grow while what the latest one costs is still being spent."""
        spent = time.thread_time() - self._spent
        return min(spent / self._share, self._longest_s) - (time.monotonic() - self._began)

    def _turn(self) -> None:
        wait_s = self._wait_s()
        if wait_s > TICK_S:
            asyncio.get_running_loop().call_later(wait_s, self._turn)
            return
        woken, self._waiting = self._waiting, []
        self._take(time.monotonic())
        for reader in woken:
            reader.wake()

    def _take(self, now: float) -> None:
        self._began, self._spent = now, time.thread_time()
