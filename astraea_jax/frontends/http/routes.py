"""The common part of routes: bodies as JSON, and answers as streams of events."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable
from contextlib import aclosing
from functools import partial
from typing import Any, TypeVar

import pydantic_core
from fastapi import Request, Response
from fastapi.routing import APIRoute
from starlette.types import Receive, Scope, Send

from astraea_jax.frontends.http.bodies import read_body
from astraea_jax.frontends.http.errors import Failure, failure_of
from astraea_jax.frontends.http.guard import LAST_EVENT

T = TypeVar("T")

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
    """An answer of server-sent events.

    Args:
        events: their bytes, as they are written. Its first one has come already, so that errors up to there have got
            an answer of their own.
        failed: makes the last event of a failure.
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[bytes], failed: Callable[[Failure], bytes]):
        super().__init__(headers=EVENT_STREAM)
        del self.headers["content-length"]
        self._events, self._failed = events, failed

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope["state"][LAST_EVENT] = self._failed  # for who cancels this
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        try:
            async with aclosing(self._events) as events:  # type: ignore[type-var]
                async for event in events:
                    await send({"type": "http.response.body", "body": event, "more_body": True})
        except TimeoutError:  # the client takes nothing
            raise
        except Exception as error:
            await send({"type": "http.response.body", "body": self._failed(failure_of(error)), "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def json_bytes(data: Any) -> bytes:
    """Return JSON, whatever strings a model has made: half a surrogate pair, too, can be escaped in it."""
    try:
        return pydantic_core.to_json(data)
    except (pydantic_core.PydanticSerializationError, UnicodeEncodeError):
        return json.dumps(data).encode()


def answer(data: Any) -> Response:
    """Make an answer in JSON."""
    return Response(json_bytes(data), media_type="application/json")


def answer_of_choices(data: dict[str, Any], choices: Iterable[Any]) -> Response:
    """Make an answer in JSON with ``choices``, which may be long: each is encoded by itself, and others get on between.

    Encoding holds the interpreter's lock, and choices with log-probabilities may have a hundred megabytes.
    """
    encoded = b",".join(map(json_bytes, choices))
    return Response(json_bytes(data)[:-1] + b',"choices":[' + encoded + b"]}", media_type="application/json")


def event(data: Any) -> bytes:
    """A server-sent event."""
    return b"data: " + json_bytes(data) + b"\n\n"


def named(events: Iterable[dict[str, Any]]) -> bytes:
    """Server-sent events with names: the ``type`` of each."""
    return b"".join(b"event: " + data["type"].encode() + b"\n" + event(data) for data in events)


DONE = b"data: [DONE]\n\n"


async def begun(items: AsyncIterator[T]) -> AsyncIterator[T]:
    """Wait for the first item, so that what goes wrong up to there is raised here; return all of them."""
    first = await anext(items, None)

    async def all_items() -> AsyncIterator[T]:
        async with aclosing(items) as rest:  # type: ignore[type-var]
            if first is not None:
                yield first
                async for item in rest:
                    yield item

    return all_items()
