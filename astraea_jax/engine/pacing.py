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
LONGEST_S = 0.05
"""Seconds that a message waits at most, less than people notice."""


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
            now = time.monotonic()
            spent = time.thread_time() - self._spent
            wait_s = min(spent / self._share, self._longest_s) - (now - self._began)
            if wait_s <= 0:
                self._take(now)
                reader.wake()
                return
            asyncio.get_running_loop().call_later(wait_s, self._turn)
        self._waiting.append(reader)

    def _turn(self) -> None:
        woken, self._waiting = self._waiting, []
        self._take(time.monotonic())
        for reader in woken:
            reader.wake()

    def _take(self, now: float) -> None:
        self._began, self._spent = now, time.thread_time()
