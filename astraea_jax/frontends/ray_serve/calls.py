"""gRPC calls that Serve's proxy has taken: their bytes and metadata come here, and are answered by our servicer.

The proxy answers with the code and the details that are set in Serve's context of a call. Its trailers leave with a
message only, so a call that fails has none; the proxy adds what clients need (:mod:`.services`).
"""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing, contextmanager
from typing import Any

import grpc

from astraea_jax.errors import told
from astraea_jax.frontends.http.tenants import Keys
from astraea_jax.frontends.logs import answered
from astraea_jax.frontends.rpc.gate import CALL, OPEN, Call, parsed
from astraea_jax.frontends.rpc.limits import address_of
from astraea_jax.frontends.rpc.metadata import read_request_id, read_tenant
from astraea_jax.frontends.rpc.servicer import Servicer, handlers
from astraea_jax.frontends.rpc.status import FAULT, MAX_DETAILS, status_of

log = logging.getLogger(__name__)


class CallFailed(RuntimeError):
    """A call has ended with the status that its context has. It crosses processes, so it has nothing but a text."""


class Calls:
    """Answers calls.

    Args:
        servicer: has the methods.
        keys: of those who may call.
    """

    def __init__(self, servicer: Servicer, keys: Keys):
        self._keys = keys
        self._handlers = {
            name: (f"/{service}/{name}", handler)
            for service, methods in handlers(servicer).items()
            for name, handler in methods.items()
        }

    async def single(self, name: str, data: bytes, context: Any) -> Any:
        """Answer a call of one response.

        Args:
            name: of the method.
            data: the request.
            context: Serve's, with the metadata.

        Raises:
            CallFailed: the status is in the context.
        """
        method, handler = self._handlers[name]
        with self._status(method, context):
            return await handler.unary_unary(parsed(handler.request_deserializer, data), context)

    async def stream(self, name: str, data: bytes, context: Any) -> AsyncIterator[Any]:
        """Answer a call of many responses; see :meth:`single`."""
        method, handler = self._handlers[name]
        with self._status(method, context):
            responses = handler.unary_stream(parsed(handler.request_deserializer, data), context)
            async with aclosing(responses):
                async for response in responses:
                    yield response

    @contextmanager
    def _status(self, method: str, context: Any) -> Iterator[None]:
        """Set the status of what goes wrong inside, and write the call down."""
        call, began, status = Call(), time.monotonic(), "CANCELLED"
        CALL.set(call)
        metadata = tuple(context.invocation_metadata())
        try:
            if not method.startswith(OPEN):
                call.tenant = read_tenant(metadata, context.peer(), self._keys)
            yield
            status = "OK"
        except Exception as error:
            code, _ = status_of(error)
            status, details = code.name, told(error)[:MAX_DETAILS]
            if code is grpc.StatusCode.INTERNAL:
                log.exception("a request failed")
                details = FAULT
            context.set_code(code)
            context.set_details(details)
            raise CallFailed(details) from None
        finally:
            took_s, peer = time.monotonic() - began, address_of(context.peer())
            answered("grpc", "call", method, status, read_request_id(metadata), peer, took_s, call.usage)
