"""Runs the app with uvicorn, in the event loop of the server."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from functools import partial
from typing import Any

import uvicorn

from astraea_jax.frontends.http.connections import Connection, ConnectionLimits, Connections
from astraea_jax.frontends.http.door import Door
from astraea_jax.frontends.http.guard import Guard
from astraea_jax.frontends.tls import Tls

HANG_UP_S = 1
"""Seconds that clients get to hang up when the server stops; their connections are cut then."""
IDLE_S = 75
"""Seconds that a connection may be idle between two requests."""
BACKLOG = 2048


class Server:
    """Serves an app. :meth:`start` and :meth:`stop` run in the event loop that answers.

    Args:
        app: answers.
        door: the one that the app goes through.
        host: address to listen on; the default is reachable from this machine only.
        port: 0 takes a free one.
        limits: on connections.
        tls: certificate and key; no encryption by default.
    """

    def __init__(
        self,
        app: Guard,
        door: Door,
        host: str = "127.0.0.1",
        port: int = 0,
        limits: ConnectionLimits | None = None,
        tls: Tls | None = None,
    ):
        self._app, self._door = app, door
        self._address = (host, port)
        connection: Any = partial(Connection, Connections(limits or ConnectionLimits()))
        config = uvicorn.Config(
            app,
            http=connection,
            ws="none",
            lifespan="off",
            log_config=None,
            log_level="error",
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_keep_alive=IDLE_S,
            timeout_graceful_shutdown=HANG_UP_S,
            **({} if tls is None else tls.uvicorn_options()),
        )
        self._server = uvicorn.Server(config)
        self._serving: asyncio.Task[None] | None = None

    async def start(self) -> int:
        """Listen; returns the port.

        Raises:
            OSError: the address cannot be used.
        """
        host, port = self._address
        try:
            family = (await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM))[0][0]
            listener = socket.create_server((host, port), family=family, backlog=BACKLOG)
        except (OSError, UnicodeError) as error:
            raise OSError(
                f"cannot listen on {host}:{port}: the port is taken or the host is not this machine; choose another "
                "--http_port or --host"
            ) from error
        bound: int = listener.getsockname()[1]
        self._serving = asyncio.create_task(self._server._serve([listener]))  # serve() would take the signals
        while not self._server.started:
            if self._serving.done():
                self._serving.result()
            await asyncio.sleep(0.001)
        return bound

    async def stop(self, grace_s: float = 30.0) -> int:
        """Report not ready, refuse new requests, let running ones finish for ``grace_s`` seconds, then hang up.

        Returns how many requests were cut off.
        """
        self._door.draining = True
        deadline = time.monotonic() + grace_s
        while self._app.running and time.monotonic() < deadline:
            await asyncio.sleep(0.01)
        cut = [*self._app.running]
        for route in cut:
            route.cancel()
        if self._serving is not None:
            self._server.should_exit = True
            with contextlib.suppress(asyncio.CancelledError):
                await self._serving
        return len(cut)
