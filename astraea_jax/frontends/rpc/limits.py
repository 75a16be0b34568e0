"""Bounds on calls: how many may do nothing, and how long they wait for their clients."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing, contextmanager
from dataclasses import dataclass
from typing import Any

import grpc

from astraea_jax.errors import Overloaded
from astraea_jax.frontends.rpc.status import TooSlow


@dataclass(frozen=True)
class CallLimits:
    """Bounds on calls that do nothing, and on how long they wait for their clients."""

    silent: int = 2048
    """Calls that have sent no message yet."""
    silent_s: float = 10.0
    """Seconds in which a call has to send its message."""
    lasting: int = 512
    """Calls that watch the health or read the reflection."""
    write_s: float = 60.0
    """Seconds in which a client has to take what is written to it."""


class Room:
    """Calls of one kind, of which there is a bounded number.

    Args:
        most: when there are so many, the next one takes the place of the oldest of the connection that has most, among
            those of the address that has most.
    """

    def __init__(self, most: int):
        self._most = most
        self._calls: dict[str, dict[asyncio.Task[Any], None]] = {}
        """Connection -> its calls, the oldest first."""
        self._of_address: Counter[str] = Counter()
        self._count = 0
        self._sent_away: set[asyncio.Task[Any]] = set()

    @contextmanager
    def place(self, connection: str) -> Iterator[None]:
        """Hold a place for the present task.

        Raises:
            Overloaded: another call has taken it.
        """
        task = asyncio.current_task()
        assert task is not None
        if self._count >= self._most:
            self._send_away()
        self._calls.setdefault(connection, {})[task] = None
        self._of_address[address_of(connection)] += 1
        self._count += 1
        try:
            yield
        except asyncio.CancelledError:
            if task in self._sent_away:
                raise Overloaded("too many calls stand idle, and another one has taken this one's place") from None
            raise
        finally:
            self._sent_away.discard(task)
            self._leave(connection, task)

    def _send_away(self) -> None:
        crowd = max(self._calls, key=lambda one: (self._of_address[address_of(one)], len(self._calls[one])))
        oldest = next(iter(self._calls[crowd]))
        self._sent_away.add(oldest)
        self._leave(crowd, oldest)
        oldest.cancel()

    def _leave(self, connection: str, task: asyncio.Task[Any]) -> None:
        calls = self._calls.get(connection, {})
        if task in calls:
            del calls[task]
            self._count -= 1
            self._of_address[address := address_of(connection)] -= 1
            if not self._of_address[address]:
                del self._of_address[address]
            if not calls:
                del self._calls[connection]


class Writes:
    """Writes to clients, and ends calls whose clients do not take what is written.

    One timer serves all calls, since one for each message would cost more than the message's own work.

    Args:
        longest_s: seconds that a client may take.
    """

    def __init__(self, longest_s: float):
        self._longest_s = longest_s
        self._began: dict[asyncio.Task[Any], float] = {}
        """Tasks that write -> since when, the oldest first."""
        self._stopped: set[asyncio.Task[Any]] = set()
        self._looks = False

    async def all(self, responses: AsyncGenerator[Any], context: grpc.aio.ServicerContext) -> None:
        """Write everything.

        Raises:
            TooSlow: the client has not taken one in time.
        """
        task, loop = asyncio.current_task(), asyncio.get_running_loop()
        assert task is not None
        try:
            async with aclosing(responses):
                async for response in responses:
                    self._began[task] = loop.time()
                    if not self._looks:
                        self._looks = True
                        loop.call_later(self._longest_s, self._look, loop)
                    await context.write(response)
                    del self._began[task]
        except asyncio.CancelledError:
            if task in self._stopped:
                raise TooSlow(f"the client has taken nothing within {self._longest_s:g} s") from None
            raise
        finally:
            self._began.pop(task, None)
            self._stopped.discard(task)

    def _look(self, loop: asyncio.AbstractEventLoop) -> None:
        self._looks = False
        for task, began in [*self._began.items()]:
            if (left := began + self._longest_s - loop.time()) > 0:
                self._looks = True
                loop.call_later(left, self._look, loop)
                return
            self._stopped.add(task)
            task.cancel()
            del self._began[task]


def address_of(peer: str) -> str:
    """The address of a connection that gRPC calls ``ipv4:127.0.0.1:50000``."""
    return peer.rpartition(":")[0]
