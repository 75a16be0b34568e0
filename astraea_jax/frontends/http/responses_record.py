"""Events of a response, kept so that clients can read them again, and go on with those that are still to come."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Any

from astraea_jax.errors import RequestError
from astraea_jax.frontends.http.routes import named


class Record:
    """The latest events of one response, by their sequence numbers.

    Args:
        max_bytes: of them all. When there are more, the older half is forgotten.
    """

    def __init__(self, max_bytes: int):
        self._max_bytes = max_bytes
        self._events: list[bytes] = []
        self._first = 0
        """Sequence number of the first event that is kept."""
        self._ended = False
        self._changed = asyncio.Event()
        self.bytes = 0
        """Of all events that are kept."""

    @property
    def next(self) -> int:
        """Sequence number of the event after the last one."""
        return self._first + len(self._events)

    def add(self, events: Sequence[dict[str, Any]]) -> None:
        """Add the next events."""
        for event in events:
            self._events.append(named([event]))
            self.bytes += len(self._events[-1])
            if self.bytes > self._max_bytes:
                half = len(self._events) // 2
                self.bytes -= sum(map(len, self._events[:half]))
                del self._events[:half]
                self._first += half
        self._tell()

    def end(self) -> None:
        """Take in that no event follows."""
        self._ended = True
        self._tell()

    async def follow(self, after: int = -1) -> AsyncIterator[bytes]:
        """Events behind the sequence number ``after``: those that are kept at once, others when they come.

        Raises:
            RequestError: the first of them is kept no longer.
        """
        while True:
            if after + 1 < self._first:
                raise RequestError(
                    f"starting_after is {after}, but of this response only the events after {self._first - 1} are "
                    "kept; retrieve it without stream"
                )
            changed = self._changed
            if after + 1 < self.next:
                events, after = b"".join(self._events[after + 1 - self._first :]), self.next - 1
                yield events
            elif self._ended:
                return
            else:
                await changed.wait()

    def _tell(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()
