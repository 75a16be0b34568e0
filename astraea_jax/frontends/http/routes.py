"""The common part of routes: bodies as JSON, and answers as streams of events."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Mapping
from contextlib import suppress
from functools import partial
from typing import Any

import pydantic_core
from fastapi import Request, Response
from fastapi.routing import APIRoute
from starlette.types import Receive, Scope, Send

from astraea_jax.frontends.http.bodies import read_body
from astraea_jax.frontends.http.errors import Failure, failure_of
from astraea_jax.frontends.http.guard import LAST_EVENT, Bounds

EVENT_STREAM = {"cache-control": "no-cache", "x-accel-buffering": "no"}
"""Headers that keep proxies from holding events back."""


class _JsonRequest(Request):
    """A request whose body has been read already."""

    value: Any

    async def json(self) -> Any:
        return self.value


class JsonRoute(APIRoute):
    """A route whose body is JSON; make routers with ``APIRouter(route_class=JsonRoute)``."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Handle requests."""
        handle = super().get_route_handler()

        async def read(request: Request) -> Response:
            request = _JsonRequest(request.scope, request.receive)
            if self.body_field is not None:  # FastAPI passes on what is an instance of its model already
                request.value = await read_body(request, partial(self.body_field.validate, loc=("body",)))
            return await handle(request)

        return read


class EventStream(Response):
    """An answer of server-sent events; make it with :func:`stream`.

    Args:
        start: events that come at once.
        first: the first of ``events``, when it has come; None: there are none.
        events: the others, as they are written.
        failed: makes the last event of a failure.
        ping: sent whenever nothing else has been for ``ping_s`` seconds.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        start: bytes,
        first: asyncio.Future[bytes | None],
        events: AsyncIterator[bytes],
        failed: Callable[[Failure], bytes],
        ping: bytes,
        ping_s: float,
    ):
        super().__init__(headers=EVENT_STREAM)
        del self.headers["content-length"]
        self._start, self._first, self._events = start, first, events
        self._failed, self._ping, self._ping_s = failed, ping, ping_s
        self._sent_at = 0.0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope["state"][LAST_EVENT] = self._failed  # for who cancels this
        pinging = asyncio.create_task(self._keep_alive(send))
        try:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            await self._send(send, self._start)
            if (event := await self._first) is not None:
                await self._send(send, event)
                async for event in self._events:
                    await self._send(send, event)
        except TimeoutError:  # the client takes nothing
            raise
        except Exception as error:
            await self._send(send, self._failed(failure_of(error)))
        finally:
            pinging.cancel()
            await _give_up(self._first, self._events)
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _send(self, send: Send, event: bytes) -> None:
        self._sent_at = asyncio.get_running_loop().time()
        if event:
            await send({"type": "http.response.body", "body": event, "more_body": True})

    async def _keep_alive(self, send: Send) -> None:
        """Send pings. A client that does not take them does not take events either, where it is looked after."""
        now = asyncio.get_running_loop().time
        self._sent_at = now()
        with suppress(TimeoutError):
            while True:
                await asyncio.sleep(self._sent_at + self._ping_s - now())
                if now() >= self._sent_at + self._ping_s:
                    await self._send(send, self._ping)


async def stream(
    request: Request,
    events: AsyncIterator[bytes],
    failed: Callable[[Failure], bytes],
    *,
    start: bytes = b"",
    ping: bytes = b": ping\n\n",
) -> EventStream:
    """Make an answer of server-sent events.

    It waits for the first event, but not for long, so that a long prompt does not look like a dead server: what goes
    wrong in that time is raised here and gets an answer of its own.

    Args:
        request: what is answered.
        events: their bytes.
        failed: makes the last event of a failure.
        start: events that need not wait for the first of ``events``.
        ping: an event, or a comment, that says nothing.
    """
    bounds: Bounds = request.app.state.bounds
    first = asyncio.ensure_future(anext(events, None))
    try:
        await asyncio.wait({first}, timeout=bounds.start_s)
        if first.done():
            first.result()
    except BaseException:
        await _give_up(first, events)
        raise
    return EventStream(start, first, events, failed, ping, bounds.ping_s)


async def _give_up(first: asyncio.Future[bytes | None], events: AsyncIterator[bytes]) -> None:
    if not first.done():  # waiting for what is done takes a turn of the event loop, in which others come first
        first.cancel()
        await asyncio.wait({first})
    if not first.cancelled():
        first.exception()  # has been seen, or is of no more interest
    await events.aclose()  # type: ignore[attr-defined]


def json_bytes(data: Any) -> bytes:
    """Return JSON, whatever strings a model has made: half a surrogate pair, too, can be escaped in it."""
    try:
        return pydantic_core.to_json(data)
    except (pydantic_core.PydanticSerializationError, UnicodeEncodeError):
        return json.dumps(data).encode()


def answer(data: Any, headers: Mapping[str, str] | None = None) -> Response:
    """Make an answer in JSON."""
    return Response(json_bytes(data), media_type="application/json", headers=headers)


def answer_of_choices(data: dict[str, Any], choices: Iterable[Any], headers: Mapping[str, str]) -> Response:
    """Make an answer in JSON with ``choices``, which may be long: each is encoded by itself, and others get on between.

    Encoding holds the interpreter's lock, and choices with log-probabilities may have a hundred megabytes.
    """
    encoded = b",".join(map(json_bytes, choices))
    content = json_bytes(data)[:-1] + b',"choices":[' + encoded + b"]}"
    return Response(content, media_type="application/json", headers=headers)


def event(data: Any) -> bytes:
    """A server-sent event."""
    return b"data: " + json_bytes(data) + b"\n\n"


def named(events: Iterable[dict[str, Any]]) -> bytes:
    """Server-sent events with names: the ``type`` of each."""
    return b"".join(b"event: " + data["type"].encode() + b"\n" + event(data) for data in events)


DONE = b"data: [DONE]\n\n"
