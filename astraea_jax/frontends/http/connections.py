"""Connections: how many there may be, and how long the head of a request may be and take."""

from __future__ import annotations

import asyncio
import resource
import socket
from collections import Counter
from dataclasses import dataclass
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

TOO_LARGE = b"the request line and the headers are too large"


def _most_connections() -> int:
    """Return how many connections leave a fourth of this process's open files to others, having asked for many."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 65_536 if hard == resource.RLIM_INFINITY else min(hard, 65_536)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        soft = wanted
    return wanted * 3 // 4 if soft == resource.RLIM_INFINITY else soft * 3 // 4


@dataclass(frozen=True)
class ConnectionLimits:
    """Bounds on connections and on the heads of requests."""

    connections: int | None = None
    """None: three fourths of the files that this process may open."""
    per_address: int | None = None
    """None: half of ``connections``, so that one client cannot shut out others."""
    head_bytes: int = 32_768
    """Request line and headers."""
    head_s: float = 15.0
    """Seconds in which the head of a request has to come, from its first byte or the connection's beginning."""


class Connections:
    """Counts the connections of one server.

    Args:
        limits: on them.
    """

    def __init__(self, limits: ConnectionLimits):
        self.limits = limits
        self._most = limits.connections or _most_connections()
        self._per_address = limits.per_address or max(1, self._most // 2)
        self._open: Counter[str] = Counter()  # address -> connections
        self._all = 0

    def enter(self, address: str) -> bool:
        """Count one more; False: there are too many."""
        if self._open[address] >= self._per_address or self._all >= self._most:
            return False
        self._open[address] += 1
        self._all += 1
        return True

    def leave(self, address: str) -> None:
        """Count one less."""
        self._all -= 1
        self._open[address] -= 1
        if not self._open[address]:
            del self._open[address]


class Connection(HttpToolsProtocol):
    """A connection of uvicorn's that keeps the limits.

    Args:
        connections: counts it.
        uvicorn: what uvicorn makes its connections of.
    """

    def __init__(self, connections: Connections, **uvicorn: Any):
        super().__init__(**uvicorn)
        self._all, self._limits = connections, connections.limits
        self._address: str | None = None  # set while it is counted
        self._timer: asyncio.TimerHandle | None = None
        self._in_head = False
        self._received = 0  # bytes since the present head began, for headers that are not complete
        self._head = 0  # bytes of the present head's complete parts

    def connection_made(self, transport: Any) -> None:
        """Refuse it if there are too many; send at once what is written otherwise.

        Without ``TCP_NODELAY``, the body of an answer waits for the client to acknowledge its head, 40 ms, and so does
        each event of a stream for the one before.
        """
        super().connection_made(transport)
        transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        address = self.client[0] if self.client else "unknown"
        if self._all.enter(address):
            self._address = address
            self._await_head()
        else:
            self._refuse(503, b"too many connections")

    def connection_lost(self, exc: Exception | None) -> None:
        """Count it no longer."""
        super().connection_lost(exc)
        self._stop_timer()
        if self._address is not None:
            self._all.leave(self._address)

    def data_received(self, data: bytes) -> None:
        """Take what has come."""
        if self.transport.is_closing():
            return
        super().data_received(data)
        if self._in_head:
            self._received += len(data)
            if self._received > self._limits.head_bytes:
                self._refuse(431, TOO_LARGE)

    def on_message_begin(self) -> None:
        """Begin a head."""
        super().on_message_begin()
        self._head, self._received, self._in_head = 0, 0, True
        self._await_head()

    def on_url(self, url: bytes) -> None:
        """Take a part of the request line."""
        self._count(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        """Take a header."""
        self._count(len(name) + len(value) + 4)
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """End a head."""
        self._in_head = False
        self._stop_timer()
        super().on_headers_complete()

    def _count(self, size: int) -> None:
        self._head += size
        if self._head > self._limits.head_bytes:
            self._refuse(431, TOO_LARGE)
            raise ValueError("the headers are too large")  # ends the parsing; uvicorn's own answer comes too late

    def _await_head(self) -> None:
        self._stop_timer()
        self._timer = self.loop.call_later(self._limits.head_s, self._refuse, 408, b"the request has not come in time")

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _refuse(self, status: int, reason: bytes) -> None:
        """Answer without a route, and hang up."""
        self._stop_timer()
        if not self.transport.is_closing():
            self.transport.write(
                b"HTTP/1.1 %d refused\r\ncontent-type: text/plain\r\ncontent-length: %d\r\nconnection: close\r\n"
                b"retry-after: 1\r\n\r\n%s" % (status, len(reason), reason)
            )
            self.transport.close()
