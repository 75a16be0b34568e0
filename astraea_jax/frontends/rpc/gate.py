"""The gate that every call comes through: who may call, and how long and how many calls may stand in it.

gRPC waits for ever for the message of a call, and counts calls of all clients together. Here a call has to say what it
wants within some seconds. Calls that have said nothing yet, and calls that last by nature (who watches the health, who
reads the reflection), may be so many; the next one takes the place of the oldest one of the connection that has most.
So nobody is shut out by anybody's idle calls, least of all whoever asks for the health. Whatever a call asks for is
bounded where it is done: requests in the engine's queue, texts in the pool that tokenises them.

A client that stops reading stops its call, too: gRPC holds back what is written to it, without limit of time. Such a
call ends with a status, which the client finds when it reads again.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import grpc
from grpc_health.v1 import health

from astraea_jax.engine.generation import Usage
from astraea_jax.errors import EngineDead, RequestError
from astraea_jax.frontends.http.tenants import Keys, Tenant
from astraea_jax.frontends.logs import answered
from astraea_jax.frontends.rpc import wire
from astraea_jax.frontends.rpc.limits import CallLimits, Room, Writes, address_of
from astraea_jax.frontends.rpc.metadata import read_request_id, read_tenant
from astraea_jax.frontends.rpc.status import TooSlow, abort, status_of

OPEN = (f"/{health.SERVICE_NAME}/", f"/{wire.ORCHESTRATOR}/HealthCheck")
"""Beginnings of the methods that need no key."""
LASTING = (f"/{health.SERVICE_NAME}/Watch", "/grpc.reflection.")
"""Beginnings of the methods whose calls last as long as the client wants."""

HANG_UP_S = 1.0
"""Seconds that the status of a call may take to leave; it waits for clients that do not read."""


@dataclass
class Call:
    """What is known of a call while it is answered."""

    tenant: Tenant | None = None
    """Whose it is; None where nobody needs to say so."""
    usage: Usage | None = None
    """Of its request, for the log."""


CALL: ContextVar[Call] = ContextVar("CALL")
"""The call that the present task answers."""


class Gate(grpc.aio.ServerInterceptor):  # type: ignore[misc] # grpc has no types
    """Lets calls in. Requests are read and parsed here, and errors become statuses, of every service alike.

    Args:
        keys: of those who may call.
        limits: on calls that do nothing.
    """

    def __init__(self, keys: Keys, limits: CallLimits):
        self._keys, self._limits = keys, limits
        self._silent, self._lasting = Room(limits.silent), Room(limits.lasting)
        self._writes = Writes(limits.write_s)
        self.cutting = False
        """Set when the server hangs up: calls that are cancelled from now on were cut off."""

    async def intercept_service(self, continuation: Any, details: grpc.HandlerCallDetails) -> Any:
        """Wrap the handler of a method; it reads its message itself, or else gRPC would wait for it without limit."""
        handler = await continuation(details)
        if handler is None:
            return None
        streams = handler.response_streaming
        answer = self._streaming(details.method, handler) if streams else self._single(details.method, handler)
        wrap = grpc.stream_stream_rpc_method_handler if streams else grpc.stream_unary_rpc_method_handler
        return wrap(answer, response_serializer=handler.response_serializer)

    def _single(self, method: str, handler: Any) -> Any:
        async def answer(_: Any, context: grpc.aio.ServicerContext) -> Any:
            async def respond() -> Any:
                return await handler.unary_unary(await self._message(handler, context), context)

            return await self._answer(method, context, respond)

        return answer

    def _streaming(self, method: str, handler: Any) -> Any:
        async def answer(_: Any, context: grpc.aio.ServicerContext) -> None:
            async def respond() -> None:
                message = await self._message(handler, context)
                if not method.startswith(LASTING):
                    await self._writes.all(handler.unary_stream(message, context), context)
                    return
                with self._lasting.place(context.peer()):
                    responses = (
                        handler.stream_stream(self._messages(message, handler, context), context)
                        if handler.request_streaming
                        else handler.unary_stream(message, context)
                    )
                    await self._writes.all(responses, context)

            await self._answer(method, context, respond)

        return answer

    async def _answer(
        self, method: str, context: grpc.aio.ServicerContext, respond: Callable[[], Awaitable[Any]]
    ) -> Any:
        """Answer a call; an error becomes its status."""
        call, began, status = Call(), time.monotonic(), "CANCELLED"
        CALL.set(call)
        metadata, peer = tuple(context.invocation_metadata() or ()), context.peer()
        is_open = method.startswith(OPEN)
        try:
            with self._status_of_errors() as ended:
                if not is_open:
                    call.tenant = read_tenant(metadata, peer, self._keys)
                response = await respond()
                status = "OK"
                return response
            status = status_of(ended[0])[0].name
            await self._end(context, ended[0])
        finally:
            if not is_open:
                took_s = time.monotonic() - began
                answered(
                    "grpc", "call", method, status, read_request_id(metadata), address_of(peer), took_s, call.usage
                )

    @contextmanager
    def _status_of_errors(self) -> Iterator[list[Exception]]:
        """Collect the error that the block ends with, if one does that is to become a status."""
        ended: list[Exception] = []
        try:
            yield ended
        except asyncio.CancelledError:
            if not self.cutting:
                raise
            ended.append(EngineDead("the server was shut down before the request had ended"))
        except grpc.aio.AbortError:  # has its status
            raise
        except Exception as error:
            ended.append(error)

    @staticmethod
    async def _end(context: grpc.aio.ServicerContext, error: Exception) -> None:
        """End a call with the status of an error, without waiting for a client that does not read."""
        with suppress(TimeoutError):
            async with asyncio.timeout(HANG_UP_S):
                await abort(context, error)
        raise asyncio.CancelledError  # the status leaves when the client reads again

    async def _message(self, handler: Any, context: grpc.aio.ServicerContext) -> Any:
        """The first message of a call.

        Raises:
            TooSlow, Overloaded: it has not come in time, or before too many others stood idle.
            RequestError: there is none, or it is malformed.
        """
        with self._silent.place(context.peer()):
            try:
                async with asyncio.timeout(self._limits.silent_s):
                    data = await context.read()
            except TimeoutError:
                raise TooSlow(f"the call has sent no message within {self._limits.silent_s:g} s") from None
        if data is grpc.aio.EOF:
            raise RequestError("the call has ended without a message; send one")
        return parsed(handler.request_deserializer, data)

    async def _messages(self, first: Any, handler: Any, context: grpc.aio.ServicerContext) -> AsyncIterator[Any]:
        yield first
        while (data := await context.read()) is not grpc.aio.EOF:
            yield parsed(handler.request_deserializer, data)


def parsed(parse: Callable[[bytes], Any], data: bytes) -> Any:
    """Return the message of a call.

    Raises:
        RequestError: it is malformed.
    """
    try:
        return parse(data)
    except Exception:  # protobuf's classes of errors differ between its implementations
        message = getattr(parse, "__self__", None)
        name = message.DESCRIPTOR.full_name if message is not None else "message"
        raise RequestError(f"the request is not a well-formed {name}") from None
