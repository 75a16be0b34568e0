"""Our gRPC services for Serve's proxies: the functions that its option ``grpc_servicer_functions`` names.

A proxy passes the bytes of requests on without reading them, to the method of the same name of a replica. What it looks
for in the metadata is added here: a session under Serve's own key, and an id. And where a replica has died, the client
gets ``UNAVAILABLE``, as from a server of ours, and not Serve's ``INTERNAL``.
"""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from functools import partial
from typing import Any

import grpc

from astraea_jax.errors import RequestError
from astraea_jax.frontends.http.errors import SEND_AGAIN
from astraea_jax.frontends.identity import Identity
from astraea_jax.frontends.ray_serve.names import caller_of, name_of
from astraea_jax.frontends.ray_serve.proxies import BYTES_PER_TOKEN, GONE, REQUESTS, Asked
from astraea_jax.frontends.ray_serve.split import SPLITS
from astraea_jax.frontends.rpc import wire
from astraea_jax.frontends.rpc.metadata import read_identity, read_request_id
from astraea_jax.frontends.rpc.status import FAULT, RETRY

SESSION, REQUEST_ID, APPLICATION = "session_id", "request_id", "application"
"""Keys of metadata that Serve reads."""
MAY_COME_AGAIN = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.ABORTED)


def add_orchestrator(servicer: Any, server: Any) -> None:
    """Add JetStream's ``Orchestrator``.

    Args:
        servicer: a stand-in; the server calls replicas.
        server: of a proxy.
    """
    _add(wire.ORCHESTRATOR, ("Decode",), ("HealthCheck",), server)


def add_sessions(servicer: Any, server: Any) -> None:
    """Add ``astraea.Sessions``; see :func:`add_orchestrator`."""
    _add(wire.SESSIONS, (), wire.SESSION_METHODS, server)


def _add(service: str, streaming: Sequence[str], single: Sequence[str], server: Any) -> None:
    # without a deserializer the server hands over bytes; what is called instead of the functions, Serve puts there
    methods = {name: grpc.unary_stream_rpc_method_handler(None) for name in streaming}
    methods |= {name: grpc.unary_unary_rpc_method_handler(None) for name in single}
    make = server.service_handler_factory
    server.service_handler_factory = partial(_handler, make)
    try:
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, methods),))
        server.add_registered_method_handlers(service, methods)
    finally:
        server.service_handler_factory = make


def _handler(make: Callable[..., Any], *, service_method: str, streaming_type: Any) -> Any:
    """Make a handler as Serve does, in a context that has what Serve looks for."""
    inner = make(service_method=service_method, streaming_type=streaming_type)

    async def single(request: bytes, context: Any) -> Any:
        answer = await inner(request, _Named(context, service_method, request))
        _explain(context)
        return answer

    async def stream(request: bytes, context: Any) -> AsyncIterator[Any]:
        async for response in inner(request, _Named(context, service_method, request)):
            yield response
        _explain(context)

    return {"unary_unary": single, "unary_stream": stream}.get(streaming_type.value, inner)


class _Named:
    """The context of a call, with metadata that Serve understands.

    Args:
        context: gRPC's.
        method: full name.
        request: its bytes.
    """

    def __init__(self, context: Any, method: str, request: bytes):
        self._context = context
        given = tuple(context.invocation_metadata() or ())
        keys = {key for key, _ in given}
        request_id = dict(given).get(REQUEST_ID) or read_request_id(given)
        if request_id == "-":
            request_id = uuid.uuid4().hex
        identity = _identity(given, method, request)
        caller = caller_of(dict(given), context.peer())
        session = identity.session
        application = SPLITS.application_of(name_of(caller.owner(True), session) if session else str(request_id))
        more = {REQUEST_ID: request_id, SESSION: identity.session, APPLICATION: application}
        self._metadata = (*given, *((key, value) for key, value in more.items() if value and key not in keys))
        REQUESTS.put(str(request_id), Asked(len(request) // BYTES_PER_TOKEN, identity.parent, caller))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._context, name)

    def invocation_metadata(self) -> tuple[tuple[str, Any], ...]:
        """Metadata of the client, and ours."""
        return self._metadata


def _identity(metadata: tuple[tuple[str, Any], ...], method: str, request: bytes) -> Identity:
    """The session of a call: by its metadata, or else by the message of a call about a session."""
    try:
        identity = read_identity(metadata)
    except RequestError:  # the replica says what is wrong with it
        return Identity()
    _, service, name = method.split("/")
    if identity.session is None and service == wire.SESSIONS:
        try:
            message = getattr(wire, f"{name}Request").FromString(request)
        except Exception:  # the replica says so; protobuf's classes of errors differ between its implementations
            return identity
        return Identity(getattr(message, "session", None) or None)
    return identity


def _explain(context: Any) -> None:
    """Tell a client whose replica has died that it may come again. Our own faults have a text of their own."""
    if _code(context) is grpc.StatusCode.INTERNAL and context.details() != FAULT:
        context.set_code(grpc.StatusCode.UNAVAILABLE)
        context.set_details(GONE + SEND_AGAIN)
    if _code(context) in MAY_COME_AGAIN:
        context.set_trailing_metadata(RETRY)


def _code(context: Any) -> grpc.StatusCode | None:
    """Return the status of a call, which gRPC keeps as a number."""
    code = context.code()
    return next((status for status in grpc.StatusCode if code in (status, status.value[0])), None)
