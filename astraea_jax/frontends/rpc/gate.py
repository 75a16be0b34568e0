"""The gate that every call comes through: who may call, and how long and how many calls may stand in it.

gRPC waits for ever for the message of a call, and counts calls of all clients together. Here a call has to say what it
wants within some seconds. Calls that have said nothing yet, and calls that last by nature (who watches the health, who
reads the reflection), may be so many; the next one takes the place of the oldest one of the connection that has most.
So nobody is shut out by anybody's idle calls, least of all whoever asks for the health. Whatever a call asks for is
bounded where it is done: requests in the engine's queue, texts in the pool that tokenises them.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import grpc
from grpc_health.v1 import health

from astraea_jax.errors import EngineDead, Overloaded, RequestError
from astraea_jax.frontends.http.tenants import Keys, Tenant
from astraea_jax.frontends.rpc import wire
from astraea_jax.frontends.rpc.metadata import read_tenant
from astraea_jax.frontends.rpc.status import TooSlow, abort

OPEN = (f"/{health.SERVICE_NAME}/", f"/{wire.ORCHESTRATOR}/HealthCheck")
"""Beginnings of the methods that need no key."""
LASTING = (f"/{health.SERVICE_NAME}/Watch", "/grpc.reflection.")
"""Beginnings of the methods whose calls last as long as the client wants."""

CALLER: ContextVar[Tenant] = ContextVar("CALLER")
"""The tenant whose call the present task answers; unset where none is needed."""


@dataclass(frozen=True)
class CallLimits:
    """Bounds on calls that do nothing."""

    silent: int = 2048
    """Calls that have sent no message yet."""
    silent_s: float = 10.0
    """Seconds in which a call has to send its message."""
    lasting: int = 512
    """Calls that watch the health or read the reflection."""


class Room:
    """Calls of one kind, of which there is a bounded number.

    Args:
        most: when there are so many, the next one takes the place of the oldest of the connection that has most.
    """

    def __init__(self, most: int):
        self._most = most
        self._calls: dict[str, dict[asyncio.Task[Any], None]] = {}
        """Connection -> its calls, the oldest first."""
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
        crowd = max(self._calls, key=lambda connection: len(self._calls[connection]))
        oldest = next(iter(self._calls[crowd]))
        self._sent_away.add(oldest)
        self._leave(crowd, oldest)
        oldest.cancel()

    def _leave(self, connection: str, task: asyncio.Task[Any]) -> None:
        calls = self._calls.get(connection, {})
        if task in calls:
            del calls[task]
            self._count -= 1
            if not calls:
                del self._calls[connection]


class Gate(grpc.aio.ServerInterceptor):  # type: ignore[misc] # grpc has no types
    """Lets calls in. Requests are read and parsed here, and errors become statuses, of every service alike.

    Args:
        keys: of those who may call.
        limits: on calls that do nothing.
    """

    def __init__(self, keys: Keys, limits: CallLimits):
        self._keys, self._limits = keys, limits
        self._silent, self._lasting = Room(limits.silent), Room(limits.lasting)
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
            with self._status_of_errors() as ended:
                self._enter(method, context)
                return await handler.unary_unary(await self._message(handler, context), context)
            await abort(context, ended[0])

        return answer

    def _streaming(self, method: str, handler: Any) -> Any:
        async def answer(_: Any, context: grpc.aio.ServicerContext) -> None:
            with self._status_of_errors() as ended:
                self._enter(method, context)
                message = await self._message(handler, context)
                if not method.startswith(LASTING):
                    await self._write_all(handler.unary_stream(message, context), context)
                    return
                with self._lasting.place(context.peer()):
                    responses = (
                        handler.stream_stream(self._messages(message, handler, context), context)
                        if handler.request_streaming
                        else handler.unary_stream(message, context)
                    )
                    await self._write_all(responses, context)
                return
            await abort(context, ended[0])

        return answer

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

    def _enter(self, method: str, context: grpc.aio.ServicerContext) -> None:
        if not method.startswith(OPEN):
            CALLER.set(read_tenant(tuple(context.invocation_metadata() or ()), context.peer(), self._keys))

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
        return _parsed(handler.request_deserializer, data)

    async def _messages(self, first: Any, handler: Any, context: grpc.aio.ServicerContext) -> AsyncIterator[Any]:
        yield first
        while (data := await context.read()) is not grpc.aio.EOF:
            yield _parsed(handler.request_deserializer, data)

    @staticmethod
    async def _write_all(responses: AsyncIterator[Any], context: grpc.aio.ServicerContext) -> None:
        async for response in responses:
            await context.write(response)


def _parsed(parse: Callable[[bytes], Any], data: bytes) -> Any:
    try:
        return parse(data)
    except Exception:  # protobuf's classes of errors differ between its implementations
        message = getattr(parse, "__self__", None)
        name = message.DESCRIPTOR.full_name if message is not None else "message"
        raise RequestError(f"the request is not a well-formed {name}") from None
