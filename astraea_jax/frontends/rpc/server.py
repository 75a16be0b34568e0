"""Serves an engine over gRPC: JetStream's ``Orchestrator``, standard health and reflection, and ``astraea.Sessions``.

The last has what JetStream lacks: the tools that sessions wait for, their end, and the engine's counts.

A Decode answers as JetStream does: one sample per message, text only to a request in text, the end-of-sequence token
among the tokens, an empty sample after a stop by length, and a beginning-of-sequence token unless ``has_bos`` is set
or the prompt begins with one. Where JetStream truncates, ignores or dies, the request gets one clear status:

    INVALID_ARGUMENT     no or malformed content, ``max_tokens`` below 1, more than one sample, a prompt beyond the
                         context or the vocabulary, sampling or a name that cannot be; the message says which
    NOT_FOUND            an adapter, as none are served
    RESOURCE_EXHAUSTED   too many requests; ``grpc-retry-pushback-ms`` says when to try again
    ABORTED              a step of the engine has failed; the request may be sent again
    UNAVAILABLE          compiling, shutting down, or failed
    CANCELLED            the session was ended while the request ran
    INTERNAL             a fault of ours; the server's log says which

A session belongs to the tenant that opens it: to the cache salt that its requests carry, or without one to the
connection. Nobody else can resume it, end it or say what it waits for; the same name means another session to them. A
client that comes back over another connection, without a salt, begins anew; its tokens are still found by their prefix.
Sessions of a connection that has closed expire like all that are not resumed.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable
from functools import partial
from typing import Any

import grpc
from google.protobuf.message import DecodeError
from grpc_health.v1 import health, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from astraea_jax.engine.encoding import encode_prompt
from astraea_jax.engine.generation import Delta, Generation
from astraea_jax.engine.interface import Serving
from astraea_jax.engine.pacing import Pace
from astraea_jax.errors import EngineDead, Overloaded, RequestError, StepFailed
from astraea_jax.frontends.rpc import wire
from astraea_jax.frontends.rpc.health import Health, Status
from astraea_jax.frontends.rpc.metadata import read_sampling, read_session, read_tenant, write_usage

log = logging.getLogger(__name__)

OPTIONS = [
    ("grpc.max_receive_message_length", 4 * 2**20),
    ("grpc.max_metadata_size", 2**16),  # what SamplingParams allows in stop strings has room
    ("grpc.absolute_max_metadata_size", 2**16),
    ("grpc.so_reuseport", 0),  # a second server on the port is an error
    ("grpc.keepalive_time_ms", 60_000),  # a client that has vanished from the network is found, its requests cancelled
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 10_000),  # clients may ping while they wait in the queue
]
MAX_DETAILS = 1024
"""Characters of a status message; gRPC drops what does not fit into its trailers, status and all."""
RETRY_AFTER_MS = "1000"
HANG_UP_S = 0.5
"""Seconds that clients get to hang up when the server stops; their connections are cut then."""


class UnknownAdapter(LookupError):
    """A LoRA adapter that is not served."""


class Cancelled(RuntimeError):
    """A session was ended while its request ran."""


class Server:
    """Serves an engine. :meth:`start` and :meth:`stop` run in the event loop that answers.

    Args:
        engine: serves the requests; until it has started they get ``UNAVAILABLE``.
        host: address to listen on; the default is reachable from this machine only.
        port: 0 takes a free one.
    """

    def __init__(self, engine: Serving, host: str = "127.0.0.1", port: int = 0):
        self._engine = engine
        self._address = f"{host}:{port}"
        self._health = Health(engine)
        self._draining = self._cutting = False
        self._pace = Pace()
        self._decoding: dict[grpc.aio.ServicerContext, asyncio.Task[Any] | None] = {}
        self._finishing: frozenset[grpc.aio.ServicerContext] = frozenset()
        """Requests that were running when the end began."""
        self._cut = 0
        """Those of them whose engine died meanwhile."""
        limit = engine.config.data_parallel * (engine.config.max_queued + engine.config.max_seqs)
        self._server = grpc.aio.server(
            maximum_concurrent_rpcs=2 * limit,  # beyond it gRPC itself answers RESOURCE_EXHAUSTED
            options=OPTIONS,
        )
        self._server.add_generic_rpc_handlers((_handlers(self),))
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        names = (wire.ORCHESTRATOR, wire.SESSIONS, health.SERVICE_NAME, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, self._server, pool=wire.POOL)

    async def start(self) -> int:
        """Listen, and let health follow the engine from now on; returns the port.

        Raises:
            OSError: the address cannot be used.
        """
        try:
            port = self._server.add_insecure_port(self._address)
        except RuntimeError as error:
            await self._server.stop(None)
            raise OSError(
                f"cannot listen on {self._address}: the port is taken or the host is not this machine; "
                "choose another --port or --host"
            ) from error
        self._health.start()
        await self._server.start()
        return int(port)

    async def stop(self, grace_s: float = 30.0) -> int:
        """Report not serving, refuse new requests, let running ones finish for ``grace_s`` seconds, then hang up.

        The port stays open meanwhile, so that balancers see the state; streams that watch it do not delay the end.
        Returns how many requests were cut off; they get ``UNAVAILABLE``, even if the engine hangs.
        """
        self._draining = True
        self._finishing = frozenset(self._decoding)
        self._health.drain()
        deadline = time.monotonic() + grace_s
        while self._decoding and time.monotonic() < deadline:
            await asyncio.sleep(0.01)
        self._cutting = True
        cut = [task for task in self._decoding.values() if task is not None]
        for task in cut:
            task.cancel()
        self._health.close()
        await self._server.stop(HANG_UP_S)
        return self._cut + len(cut)

    async def decode(self, data: bytes, context: grpc.aio.ServicerContext) -> AsyncIterator[Any]:
        """Stream one request. The end of the call, by cancel or deadline too, cancels the generation."""
        self._decoding[context] = asyncio.current_task()
        context.add_done_callback(lambda _: self._decoding.pop(context, None))
        try:
            request = _parse(wire.DecodeRequest, data)
            generation = await self._generate(request, context)
            context.add_done_callback(lambda _: generation.cancel())
            as_text = request.WhichOneof("content") == "text_content"
            async for delta in generation.paced(self._pace):
                yield _response(delta, as_text)
            if delta.finish_reason == "cancelled":
                raise Cancelled("the session was ended")
            if delta.finish_reason == "length":
                yield _response(Delta("", ()), as_text)  # JetStream ends a length stop with an empty sample
            if generation.usage is not None and delta.finish_reason is not None:
                context.set_trailing_metadata(write_usage(generation.usage, delta.finish_reason))
        except asyncio.CancelledError:
            if not self._cutting:
                raise
            await _abort(context, EngineDead("the server was shut down before the request had ended"))
        except Exception as error:
            self._cut += isinstance(error, EngineDead) and context in self._finishing
            await _abort(context, error)

    async def _generate(self, request: Any, context: grpc.aio.ServicerContext) -> Generation:
        if self._draining:
            raise EngineDead("the server is shutting down; use another one")
        metadata = tuple(context.invocation_metadata() or ())
        params = read_sampling(metadata, request.max_tokens)
        session, final = read_session(metadata)
        salt, owner = read_tenant(metadata, context.peer())
        if request.num_samples not in (0, 1):
            raise RequestError(f"num_samples is {request.num_samples}; one sample per request is served")
        if request.lora_adapter_id:
            raise UnknownAdapter(f"no LoRA adapter {request.lora_adapter_id[:60]!r}: adapters are not served")
        prompt = await self._prompt(request)
        return self._engine.generate(prompt, params, session=session, final=final, salt=salt, owner=owner)

    async def _prompt(self, request: Any) -> list[int]:
        tokenizer = self._engine.tokenizer
        match request.WhichOneof("content"):
            case "token_content":
                ids = list(request.token_content.token_ids)
                bos = [tokenizer.bos_id] if tokenizer.bos_id is not None and not request.has_bos else []
                return ids if ids[:1] == bos else bos + ids
            case "text_content":
                text = request.text_content.text
                return await encode_prompt(len(text), partial(tokenizer.encode, text, add_bos=not request.has_bos))
        raise RequestError("the request has no content; set text_content or token_content")

    def health_check(self, request: Any, owner: str) -> Any:
        """Whether the server accepts requests."""
        return wire.HealthCheckResponse(is_live=self._health.status(wire.ORCHESTRATOR) == Status.SERVING)

    def end(self, request: Any, owner: str) -> Any:
        """End a session of the caller's; other names are ignored."""
        self._engine.end_session(request.session, owner=owner)
        return wire.EndResponse()

    def tool_called(self, request: Any, owner: str) -> Any:
        """Note which tool a session of the caller's waits for."""
        self._engine.tool_called(request.session, request.tool, owner=owner)
        return wire.ToolCalledResponse()

    def stats(self, request: Any, owner: str) -> Any:
        """The engine's counts; they name no session and no tenant."""
        response = wire.StatsResponse()
        for name, value in self._engine.counts().items():
            response.counts.add(name=name, value=value)
        return response


def _unary(message: Any, answer: Callable[[Any, str], Any], response: Any) -> grpc.RpcMethodHandler:
    """Handle a method with one response, which ``answer`` makes of the request and its caller's name as an owner."""

    async def handle(data: bytes, context: grpc.aio.ServicerContext) -> Any:
        try:
            _, owner = read_tenant(tuple(context.invocation_metadata() or ()), context.peer())
            return answer(_parse(message, data), owner)
        except Exception as error:
            await _abort(context, error)

    return grpc.unary_unary_rpc_method_handler(handle, response_serializer=response.SerializeToString)


def _handlers(server: Server) -> grpc.GenericRpcHandler:
    """Handle requests as bytes: where gRPC parses them, malformed ones get ``UNKNOWN`` and a traceback."""
    methods = {
        f"/{wire.ORCHESTRATOR}/Decode": grpc.unary_stream_rpc_method_handler(
            server.decode, response_serializer=wire.DecodeResponse.SerializeToString
        ),
        f"/{wire.ORCHESTRATOR}/HealthCheck": _unary(
            wire.HealthCheckRequest, server.health_check, wire.HealthCheckResponse
        ),
        f"/{wire.SESSIONS}/End": _unary(wire.EndRequest, server.end, wire.EndResponse),
        f"/{wire.SESSIONS}/ToolCalled": _unary(wire.ToolCalledRequest, server.tool_called, wire.ToolCalledResponse),
        f"/{wire.SESSIONS}/Stats": _unary(wire.StatsRequest, server.stats, wire.StatsResponse),
    }

    class Handlers(grpc.GenericRpcHandler):  # type: ignore[misc] # grpc has no types
        def service(self, call: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler | None:
            return methods.get(call.method)

    return Handlers()


def _parse(message: Any, data: bytes) -> Any:
    try:
        return message.FromString(data)
    except DecodeError:
        raise RequestError(f"the request is not a well-formed {message.DESCRIPTOR.full_name}") from None


def _response(delta: Delta, as_text: bool) -> Any:
    """Every message has one sample, which JetStream's clients rely on. Token requests get tokens only."""
    response = wire.DecodeResponse()
    response.stream_content.samples.add(text=delta.text if as_text else "", token_ids=delta.token_ids)
    return response


async def _abort(context: grpc.aio.ServicerContext, error: Exception) -> None:
    """End the call with the status an error stands for. What is not meant for clients goes to the log only."""
    retry: tuple[tuple[str, str], ...] = ()
    match error:
        case RequestError():
            status = grpc.StatusCode.INVALID_ARGUMENT
        case UnknownAdapter():
            status = grpc.StatusCode.NOT_FOUND
        case Cancelled():
            status = grpc.StatusCode.CANCELLED
        case Overloaded():
            status, retry = grpc.StatusCode.RESOURCE_EXHAUSTED, (("grpc-retry-pushback-ms", RETRY_AFTER_MS),)
        case StepFailed():
            status = grpc.StatusCode.ABORTED
        case EngineDead():
            status = grpc.StatusCode.UNAVAILABLE
        case _:
            log.error("a request failed", exc_info=error)
            status, error = grpc.StatusCode.INTERNAL, RuntimeError("internal error; the server's log has more")
    await context.abort(status, str(error)[:MAX_DETAILS], retry)
