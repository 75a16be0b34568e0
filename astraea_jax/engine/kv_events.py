"""What the scheduler's log of cached blocks tells, on its way from the loop's thread to whoever publishes it."""

from __future__ import annotations

import queue
import threading
from typing import NamedTuple

from astraea_jax.scheduler.kv_log import KVLog, Record

MAX_QUEUED = 65_536
"""Blocks that are told and not yet taken, at most: some 20 MB, or as many as an H100 caches in a minute or more."""


class Told(NamedTuple):
    """What has happened in one turn of the loop."""

    records: list[Record]
    missed: int
    """Turns before it that nobody will hear of. After any, the first record is :class:`~.kv_log.Cleared`."""


class KVEvents:
    """A bounded queue of what is told.

    If nobody takes it, whole turns are dropped, and the loop never waits. When what is left has been taken, everything
    that is cached then is told anew, as it is at the beginning.

    Args:
        log: of the scheduler; only the loop's thread touches it. None: there is none, so nothing is ever told.
    """

    def __init__(self, log: KVLog | None):
        self.dropped = 0
        """Turns that nobody has heard of."""
        self._log = log
        self._queue: queue.SimpleQueue[tuple[Told, int]] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._queued = 0  # blocks
        self._behind, self._missed = True, 0

    def collect(self) -> None:
        """Take in what has happened in a turn; called by the loop's thread at its end."""
        if self._log is None:
            return
        if self._behind and not self._queued:
            self._log.retell()
            self._behind = False
        records = self._log.take()
        if not records:
            return
        size = sum(map(len, records))
        if self._behind or (self._queued and self._queued + size > MAX_QUEUED):
            self._behind = True
            self._missed += 1
            self.dropped += 1
            return
        with self._lock:
            self._queued += size
        self._queue.put((Told(records, self._missed), size))
        self._missed = 0

    def get(self, timeout_s: float) -> Told | None:
        """Take what was told first; None: nothing is told within the time. One thread calls it."""
        try:
            told, size = self._queue.get(timeout=timeout_s)
        except queue.Empty:
            return None
        with self._lock:
            self._queued -= size
        return told
