"""The gRPC endpoint: JetStream's ``Orchestrator``, standard health and reflection, and the end of sessions."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from astraea_jax.engine import Engine
from astraea_jax.errors import EngineDead, Overloaded, RequestError
from astraea_jax.generation import Delta, Generation
from astraea_jax.rpc import wire
from astraea_jax.rpc.metadata import read_sampling, read_session, write_usage

log = logging.getLogger(__name__)

MAX_MESSAGE_BYTES = 4 * 2**20
LONG_TEXT = 4096
"""Characters from which a text is tokenised in a thread, so as not to hold up the other streams."""
RETRY_AFTER_MS = "1000"


class UnknownAdapter(LookupError):
    """A LoRA adapter that is not served."""


class Server:
    """Serves an engine. :meth:`start` and :meth:`stop` run in the event loop that answers.

    Args:
        engine: started or about to be; until then requests get ``UNAVAILABLE``.
        host: address to listen on; the default is reachable from this machine only.
        port: 0 takes a free one.
    """

    def __init__(self, engine: Engine, host: str = "127.0.0.1", port: int = 0):
        self._engine = engine
        self._address = f"{host}:{port}"
        self._health = health.aio.HealthServicer()
        limit = engine.config.max_queued + engine.config.max_seqs
        self._server = grpc.aio.server(
            maximum_concurrent_rpcs=2 * limit,  # beyond it gRPC itself answers RESOURCE_EXHAUSTED
            options=[
                ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
                ("grpc.so_reuseport", 0),  # a second server on the port is an error
            ],
        )
        self._server.add_generic_rpc_handlers((_handlers(self),))
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        names = (wire.ORCHESTRATOR, wire.SESSIONS, health.SERVICE_NAME, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, self._server, pool=wire.POOL)

    async def start(self) -> int:
        """Listen; returns the port.

        Raises:
            OSError: the address cannot be used.
        """
        try:
            port = self._server.add_insecure_port(self._address)
        except RuntimeError as error:
            await self._server.stop(None)
            raise OSError(f"cannot listen on {self._address}: {error}; choose another --port") from error
        await self._server.start()
        for name in ("", wire.ORCHESTRATOR):
            await self._health.set(name, health_pb2.HealthCheckResponse.SERVING)
        return int(port)

    async def stop(self, grace_s: float = 30.0) -> None:
        """Report not serving, refuse new requests, let running ones finish for ``grace_s`` seconds."""
        await self._health.enter_graceful_shutdown()
        await self._server.stop(grace_s)

    async def decode(self, request: Any, context: grpc.aio.ServicerContext) -> AsyncIterator[Any]:
        """One segment, streamed. Leaving it, by cancel or deadline too, cancels the generation."""
        try:
            generation = await self._generate(request, context)
        except Exception as error:
            await _abort(context, error)  # raises
            return
        as_text = request.WhichOneof("content") == "text_content"
        last: Delta | None = None
        try:
            async for delta in generation:
                last = delta
                yield _response(delta, as_text)
        except (RequestError, Overloaded, EngineDead, RuntimeError) as error:
            await _abort(context, error)
        finally:
            if last is None or last.finish_reason is None:
                generation.cancel()
        reason = last.finish_reason if last is not None and last.finish_reason else "cancelled"
        if reason == "length":
            yield _response(Delta("", ()), as_text)  # JetStream ends a length stop with an empty sample
        if generation.usage is not None:
            context.set_trailing_metadata(write_usage(generation.usage, reason))

    async def _generate(self, request: Any, context: grpc.aio.ServicerContext) -> Generation:
        metadata = tuple(context.invocation_metadata() or ())
        params = read_sampling(metadata, request.max_tokens)
        session, final = read_session(metadata)
        if request.num_samples > 1:
            raise RequestError(f"num_samples is {request.num_samples}; only one sample per request is served")
        if request.lora_adapter_id:
            raise UnknownAdapter(f"no LoRA adapter {request.lora_adapter_id[:60]!r}: adapters are not served")
        prompt = await self._prompt(request)
        return self._engine.generate(prompt, params, session=session, final=final)

    async def _prompt(self, request: Any) -> list[int]:
        tokenizer = self._engine.tokenizer
        match request.WhichOneof("content"):
            case "token_content":
                ids = list(request.token_content.token_ids)
                bos = [tokenizer.bos_id] if tokenizer.bos_id is not None and not request.has_bos else []
                return ids if ids[:1] == bos else bos + ids
            case "text_content":
                text = request.text_content.text
                if len(text) < LONG_TEXT:
                    return tokenizer.encode(text, add_bos=not request.has_bos)
                return await asyncio.to_thread(tokenizer.encode, text, add_bos=not request.has_bos)
        raise RequestError("the request has no content; set text_content or token_content")

    async def health_check(self, request: Any, context: grpc.aio.ServicerContext) -> Any:
        return wire.HealthCheckResponse(is_live=self._engine.live)

    async def end(self, request: Any, context: grpc.aio.ServicerContext) -> Any:
        self._engine.end_session(request.session)
        return wire.EndResponse()


def _handlers(server: Server) -> grpc.GenericRpcHandler:
    def entry(make: Any, method: Any, request: Any, response: Any) -> grpc.RpcMethodHandler:
        return make(method, request_deserializer=request.FromString, response_serializer=response.SerializeToString)

    unary, stream = grpc.unary_unary_rpc_method_handler, grpc.unary_stream_rpc_method_handler
    methods = {
        f"/{wire.ORCHESTRATOR}/Decode": entry(stream, server.decode, wire.DecodeRequest, wire.DecodeResponse),
        f"/{wire.ORCHESTRATOR}/HealthCheck": entry(
            unary, server.health_check, wire.HealthCheckRequest, wire.HealthCheckResponse
        ),
        f"/{wire.SESSIONS}/End": entry(unary, server.end, wire.EndRequest, wire.EndResponse),
    }

    class Handlers(grpc.GenericRpcHandler):  # type: ignore[misc] # grpc has no types
        def service(self, call: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler | None:
            return methods.get(call.method)

    return Handlers()


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
        case Overloaded():
            status, retry = grpc.StatusCode.RESOURCE_EXHAUSTED, (("grpc-retry-pushback-ms", RETRY_AFTER_MS),)
        case EngineDead():
            status = grpc.StatusCode.UNAVAILABLE
        case _:
            log.error("a request failed", exc_info=error)
            status, error = grpc.StatusCode.INTERNAL, RuntimeError("internal error; the server's log has more")
    await context.abort(status, str(error), retry)
