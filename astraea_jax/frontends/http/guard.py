"""Stands before every route: names of the server, keys, sizes and times of requests, and clients that vanish.

A request is read whole, within bounds, before its route begins, so no route ever waits for a client. A client that
vanishes has its route cancelled, in whatever phase; routes need not look.
"""

from __future__ import annotations

import asyncio
import re
import time
import uuid
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI
from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import Message, Receive, Scope, Send

from astraea_jax.errors import EngineDead
from astraea_jax.frontends.http.errors import Failure, TooLarge, TooSlow, failure_of
from astraea_jax.frontends.http.hosts import AllowedHosts
from astraea_jax.frontends.http.tenants import Keys, presented_key
from astraea_jax.frontends.logs import answered

OPEN_PATHS = frozenset({"/health", "/ready", "/status"})
"""Paths that need no key, because they tell nothing of anybody, and are answered whatever the load. So is ``GET /``,
which leads there."""
LAST_EVENT = "last_event"
"""In the state of a request that is answered by a stream: makes the event that tells a failure."""
REQUEST_ID = re.compile(r"[\w.:/+=-]{1,128}")

Shape = Callable[[Failure, str], JSONResponse]
"""Makes the answer to a failure, in the words of an API, of the failure and the request's id."""


@dataclass(frozen=True)
class Bounds:
    """Bounds on one request and its answer."""

    body_bytes: int = 4 * 2**20
    body_s: float = 30.0
    """Seconds in which the whole body has to come."""
    write_s: float = 60.0
    """Seconds in which a client has to take what is written to it."""
    start_s: float = 1.0
    """Seconds until a stream begins although nothing has been written yet; errors until then have their own status."""
    ping_s: float = 10.0
    """Seconds without an event after which a stream tells its client that it is alive."""


class Guard:
    """An ASGI app around the routes'.

    Args:
        app: has the routes.
        keys: of the server.
        shape: finds the shape of errors for a path.
        bounds: on requests.
        hosts: names by which requests may be addressed to the server.
    """

    def __init__(self, app: FastAPI, keys: Keys, shape: Callable[[str], Shape], bounds: Bounds, hosts: AllowedHosts):
        self.app = app
        self._keys, self._shape, self._bounds, self._hosts = keys, shape, bounds, hosts
        self.running: set[asyncio.Task[None]] = set()
        """Requests being answered, but those of :data:`OPEN_PATHS`."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        given = headers.get("x-request-id", "")
        request_id = given if REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = request_id
        answer, began = _Answer(send, request_id, self._bounds.write_s), time.monotonic()
        try:
            address = (scope.get("server") or (None,))[0]
            self._hosts.check(headers.getlist("host"), headers.getlist("origin"), address)
            if not _is_open(scope) and self._keys.required:
                self._keys.tenant(presented_key(headers.get("authorization"), headers.get("x-api-key")), "")
            body = await self._body(headers, receive)
            if body is not None:
                await self._run(scope, body, receive, answer)
        except Exception as error:
            failure = failure_of(error)
            if not answer.begun:
                await self._shape(scope["path"])(failure, request_id)(scope, receive, answer)
            elif isinstance(error, EngineDead) and (last_event := scope["state"].get(LAST_EVENT)):
                await answer({"type": "http.response.body", "body": last_event(failure), "more_body": False})
        finally:
            if not _is_open(scope):
                address = (scope.get("client") or ("unknown",))[0]
                took_s = time.monotonic() - began
                answered("http", scope["method"], scope["path"], answer.status, request_id, address, took_s)

    async def _body(self, headers: Headers, receive: Receive) -> bytes | None:
        """Read the whole body; None: the client has vanished meanwhile."""
        most = self._bounds.body_bytes
        length = headers.get("content-length", "0")
        if length.isdecimal() and int(length[:20]) > most:
            raise TooLarge(f"the body has more than {most} bytes, which is the most that is read")
        body = bytearray()
        try:
            async with asyncio.timeout(self._bounds.body_s):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    body += message.get("body", b"")
                    if len(body) > most:
                        raise TooLarge(f"the body has more than {most} bytes, which is the most that is read")
                    if not message.get("more_body"):
                        return bytes(body)
        except TimeoutError:
            raise TooSlow(f"the body has not come within {self._bounds.body_s:.0f} s") from None

    async def _run(self, scope: Scope, body: bytes, receive: Receive, answer: _Answer) -> None:
        """Run the route until it ends or its client has vanished."""
        gone = asyncio.Event()
        messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def replay() -> Message:
            if messages:
                return messages.pop()
            await gone.wait()
            return {"type": "http.disconnect"}

        route = asyncio.ensure_future(_awaited(self.app(scope, replay, answer)))
        vanishing = asyncio.ensure_future(_awaited(receive()))  # what comes after the body can only be the end
        if not _is_open(scope):
            self.running.add(route)
        try:
            await asyncio.wait({route, vanishing}, return_when=asyncio.FIRST_COMPLETED)
            vanished = not route.done()
        finally:
            self.running.discard(route)
            gone.set()
            for task in (route, vanishing):
                task.cancel()
            await asyncio.wait({route, vanishing})
        if route.cancelled():
            if not vanished:
                raise EngineDead("the server was shut down before the request had ended")
        elif (error := route.exception()) is not None and not vanished:
            raise error


def _is_open(scope: Scope) -> bool:
    return scope["path"] in OPEN_PATHS or (scope["path"], scope["method"]) == ("/", "GET")


class _Answer:
    """Sends an answer with the request's id; a client that does not take it for too long has vanished."""

    def __init__(self, send: Send, request_id: str, write_s: float):
        self._send, self._id, self._write_s = send, request_id.encode(), write_s
        self.begun = False
        self.status = 0
        """0: the client vanished before it had an answer."""

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.begun, self.status = True, message["status"]
            message["headers"] = [*message.get("headers", ()), (b"x-request-id", self._id)]
        async with asyncio.timeout(self._write_s):
            await self._send(message)


async def _awaited(awaitable: Awaitable[Any]) -> Any:
    return await awaitable
