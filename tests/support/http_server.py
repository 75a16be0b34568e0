"""An HTTP server on a free port, in the test's own event loop."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

import httpx

from astraea_jax.agents import formats
from astraea_jax.agents.tools import Tool
from astraea_jax.engine.interface import Serving
from astraea_jax.frontends.http.app import make_app
from astraea_jax.frontends.http.connections import ConnectionLimits
from astraea_jax.frontends.http.door import Door
from astraea_jax.frontends.http.guard import Bounds, Guard
from astraea_jax.frontends.http.hosts import AllowedHosts
from astraea_jax.frontends.http.server import Server
from astraea_jax.frontends.http.tenants import Keys
from astraea_jax.frontends.http.waiting import Limits

MODEL = "tiny"


@dataclass(frozen=True)
class HttpServer:
    server: Server
    app: Guard
    door: Door
    port: int
    url: str
    client: httpx.AsyncClient


@asynccontextmanager
async def serving(
    engine: Serving,
    *,
    keys: Keys | None = None,
    bounds: Bounds | None = None,
    limits: Limits | None = None,
    connections: ConnectionLimits | None = None,
    tools: Sequence[Tool] = (),
    hosts: AllowedHosts | None = None,
) -> AsyncIterator[HttpServer]:
    """A server of the engine, and a client of it."""
    door = Door(engine, formats.choose(engine.tokenizer), [MODEL], limits, tools=tools)
    app = make_app(door, keys, bounds, hosts=hosts)
    server = Server(app, door, limits=connections)
    port = await server.start()
    url = f"http://127.0.0.1:{port}"
    try:
        async with httpx.AsyncClient(base_url=url, timeout=120) as client:
            yield HttpServer(server, app, door, port, url, client)
    finally:
        await server.stop(0)
