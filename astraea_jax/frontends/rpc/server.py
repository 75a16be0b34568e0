"""Serves an engine over gRPC: JetStream's ``Orchestrator``, standard health and reflection, and ``astraea.Sessions``.

The last has what JetStream lacks: what sessions wait for, their forks and ends, and the engine's counts.

A Decode answers as JetStream does: one sample per message, text only to a request in text, the end-of-sequence token
among the tokens, an empty sample after a stop by length, and a beginning-of-sequence token unless ``has_bos`` is set
or the prompt begins with one. Where JetStream truncates, ignores or dies, the request gets one clear status:

    INVALID_ARGUMENT     no or malformed content, ``max_tokens`` below 1, more than one sample, a prompt beyond the
                         context or the vocabulary, sampling or a name that cannot be; the message says which
    UNAUTHENTICATED      the server has keys, and the call brings none of them; health needs none
    DEADLINE_EXCEEDED    the call has sent no message in time, or taken none
    NOT_FOUND            an adapter, as none are served
    RESOURCE_EXHAUSTED   too many requests; ``grpc-retry-pushback-ms`` says when to try again
    ABORTED              a step of the engine has failed; the request may be sent again
    UNAVAILABLE          compiling, shutting down, or failed
    CANCELLED            the session was ended while the request ran
    INTERNAL             a fault of ours; the server's log says which

A session belongs to the tenant that opens it: to the key of its requests, or else to the cache salt that they carry,
or without one to the connection. Nobody else can resume it, end it or say what it waits for; the same name means
another session to them. A client that comes back over another connection, without key or salt, begins anew; its tokens
are still found by their prefix. Sessions of a connection that has closed expire like all that are not resumed.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import replace
from functools import partial
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from astraea_jax.engine.encoding import DOORS, LONG_TEXT
from astraea_jax.engine.generation import Delta, Generation
from astraea_jax.engine.grammar import Grammar, GrammarCompiler
from astraea_jax.engine.interface import Serving
from astraea_jax.engine.pacing import Pace
from astraea_jax.errors import EngineDead, RequestError
from astraea_jax.frontends.http.tenants import Keys, Tenant
from astraea_jax.frontends.programs import End, Programs
from astraea_jax.frontends.rpc import wire
from astraea_jax.frontends.rpc.gate import CALL, Gate
from astraea_jax.frontends.rpc.health import Health, Status
from astraea_jax.frontends.rpc.limits import CallLimits
from astraea_jax.frontends.rpc.metadata import (
    Constraint,
    Metadata,
    read_constraint,
    read_identity,
    read_sampling,
    write_usage,
)
from astraea_jax.frontends.rpc.status import Cancelled, UnknownAdapter
from astraea_jax.frontends.rpc.text_turn import TextTurn
from astraea_jax.frontends.sessions import Sessions
from astraea_jax.frontends.tls import Tls
from astraea_jax.scheduler.wait import Wait

OPTIONS = [
    ("grpc.max_receive_message_length", 4 * 2**20),
    ("grpc.max_metadata_size", 2**16),  # what SamplingParams allows in stop strings has room
    ("grpc.absolute_max_metadata_size", 2**16),
    ("grpc.so_reuseport", 0),  # a second server on the port is an error
    ("grpc.keepalive_time_ms", 60_000),  # a client that has vanished from the network is found, its requests cancelled
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 10_000),  # clients may ping while they wait in the queue
    ("grpc.server_handshake_timeout_ms", 10_000),
    (
        "grpc.server.max_pending_requests",
        2**16,
    ),  # from 1,000 on gRPC drops calls of anybody at random; the gate does not
    ("grpc.server.max_pending_requests_hard_limit", 2**17),
]
HANG_UP_S = 0.5
"""Seconds that clients get to hang up when the server stops; their connections are cut then."""


class Server:
    """Serves an engine. :meth:`start` and :meth:`stop` run in the event loop that answers.

    Args:
        engine: serves the requests; until it has started they get ``UNAVAILABLE``.
        host: address to listen on; the default is reachable from this machine only.
        port: 0 takes a free one.
        keys: of those who may call; everybody by default. A key's tenant owns its sessions.
        tls: certificate and key; no encryption by default.
        limits: on calls that do nothing, and on how long they wait for their clients.
        grammars: compiles what requests constrain their text by; one of its own by default.
        programs: names the programs of requests in text and continues them; shared with other doors of the engine.
    """

    def __init__(
        self,
        engine: Serving,
        host: str = "127.0.0.1",
        port: int = 0,
        *,
        keys: Keys | None = None,
        tls: Tls | None = None,
        limits: CallLimits | None = None,
        grammars: GrammarCompiler | None = None,
        programs: Programs | None = None,
    ):
        self._engine = engine
        self._address = f"{host}:{port}"
        self._health = Health(engine)
        self._draining = False
        self._pace = Pace()
        self._decoding: dict[grpc.aio.ServicerContext, asyncio.Task[Any] | None] = {}
        self._finishing: frozenset[grpc.aio.ServicerContext] = frozenset()
        """Requests that were running when the end began."""
        self._cut = 0
        """Those of them whose engine died meanwhile."""
        self._tls = tls
        self._programs = programs or Programs(engine)
        self._sessions = Sessions(self._programs)
        self._grammars = grammars or GrammarCompiler(engine.tokenizer)
        self._gate = Gate(keys or Keys(), limits or CallLimits())
        c = engine.config
        streams = 2 * c.data_parallel * (c.max_queued + c.max_seqs)  # the queue refuses before, and says why
        idle_ms = min(2**31 - 1, round(1000 * c.session_ttl_s))  # a connection's sessions have expired by then
        options = [("grpc.max_concurrent_streams", streams), ("grpc.max_connection_idle_ms", idle_ms)]
        self._server = grpc.aio.server(interceptors=(self._gate,), options=OPTIONS + options)
        for service, methods in _handlers(self).items():
            self._server.add_registered_method_handlers(service, methods)  # each waits in a queue of its own
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        names = (wire.ORCHESTRATOR, wire.SESSIONS, health.SERVICE_NAME, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, self._server, pool=wire.POOL)

    async def start(self) -> int:
        """Listen, and let health follow the engine from now on; returns the port.

        Raises:
            OSError: the address cannot be used.
        """
        try:
            port = (
                self._server.add_insecure_port(self._address)
                if self._tls is None
                else self._server.add_secure_port(self._address, self._tls.grpc_credentials())
            )
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
        self._gate.cutting = True
        cut = [task for task in self._decoding.values() if task is not None]
        for task in cut:
            task.cancel()
        self._health.close()
        await self._server.stop(HANG_UP_S)
        return self._cut + len(cut)

    async def decode(self, request: Any, context: grpc.aio.ServicerContext) -> AsyncGenerator[Any]:
        """Stream one request. The end of the call, by cancel or deadline too, cancels the generation."""
        self._decoding[context] = asyncio.current_task()
        turn = None
        try:
            generation, turn = await self._generate(request, tuple(context.invocation_metadata() or ()))
            as_text = request.WhichOneof("content") == "text_content"
            async with aclosing(generation):
                async for delta in generation.paced(self._pace):
                    if turn is not None:
                        turn.add(delta)
                    yield _response(delta, as_text)
            if delta.finish_reason == "cancelled":
                raise Cancelled("the session was ended")
            if delta.finish_reason == "length":
                yield _response(Delta("", ()), as_text)  # JetStream ends a length stop with an empty sample
            if generation.usage is not None and delta.finish_reason is not None:
                CALL.get().usage = generation.usage
                context.set_trailing_metadata(write_usage(generation.usage, delta.finish_reason))
        except EngineDead:
            self._cut += context in self._finishing
            raise
        finally:
            del self._decoding[context]
            if turn is not None:
                turn.end()

    async def _generate(self, request: Any, metadata: Metadata) -> tuple[Generation, TextTurn | None]:
        if self._draining:
            raise EngineDead("the server is shutting down; use another one")
        tenant = CALL.get().tenant
        assert tenant is not None  # Decode is not open
        params = read_sampling(metadata, request.max_tokens)
        constraint = read_constraint(metadata)
        identity = read_identity(metadata)
        if request.num_samples not in (0, 1):
            raise RequestError(f"num_samples is {request.num_samples}; one sample per request is served")
        if request.lora_adapter_id:
            raise UnknownAdapter(f"no LoRA adapter {request.lora_adapter_id[:60]!r}: adapters are not served")
        kind = request.WhichOneof("content")
        if kind is None:
            raise RequestError("the request has no content; set text_content or token_content")
        if constraint is not None:
            params = replace(params, grammar=await self._grammar(constraint, tenant.owner))
        if kind == "token_content":
            generation = self._engine.generate(
                self._tokens(request),
                params,
                session=identity.session,
                final=identity.final,
                salt=tenant.salt,
                owner=tenant.owner,
                parent=identity.parent,
            )
            return generation, None
        opening = await self._programs.open_text(
            tenant,
            identity.session,
            request.text_content.text,
            add_bos=not request.has_bos,
            parent=identity.parent,
        )
        try:
            generation, program = self._programs.generate(opening, params, final=identity.final)
        except BaseException:
            self._programs.end(opening, None, End("error"))
            raise
        return generation, TextTurn(self._programs, opening, program, identity.final)

    def _tokens(self, request: Any) -> list[int]:
        """The tokens of a request. What cannot fit is refused before anything is done with it."""
        tokenizer, context = self._engine.tokenizer, self._engine.layout.max_context
        if (size := len(request.token_content.token_ids)) >= context:
            raise RequestError(f"the prompt has {size} tokens, which leave no room in the context of {context}")
        ids = list(request.token_content.token_ids)
        bos = [tokenizer.bos_id] if tokenizer.bos_id is not None and not request.has_bos else []
        return ids if ids[:1] == bos else bos + ids

    async def _grammar(self, constraint: Constraint, owner: str) -> Grammar:
        compilers = {
            "json-schema": self._grammars.json_schema,
            "regex": self._grammars.regex,
            "lark": self._grammars.lark,
        }
        work = partial(compilers[constraint.kind], constraint.source)
        return await DOORS.run(owner, max(LONG_TEXT, len(constraint.source)), work)  # never in the event loop

    def health_check(self, request: Any, owner: str) -> Any:
        """Whether the server accepts requests."""
        return wire.HealthCheckResponse(is_live=self._health.status(wire.ORCHESTRATOR) == Status.SERVING)

    async def end(self, request: Any, tenant: Tenant) -> Any:
        """End a session of the caller's; other names are ignored."""
        self._programs.end_session(tenant, request.session)
        return wire.EndResponse()

    def tool_called(self, request: Any, owner: str) -> Any:
        """Note which tool a session of the caller's waits for."""
        self._engine.waits(request.session, Wait((request.tool,)), owner=owner)
        return wire.ToolCalledResponse()

    def waits(self, request: Any, owner: str) -> Any:
        """Note what a session of the caller's waits for; times of 0 are none."""
        wait = Wait(tuple(request.tools), request.expected_s or None, request.keep_s or None)
        self._engine.waits(request.session, wait, owner=owner)
        return wire.WaitsResponse()

    async def fork(self, request: Any, tenant: Tenant) -> Any:
        """Open a session that begins where one of the caller's is."""
        await self._sessions.fork(tenant, request.session, request.child)
        return wire.ForkResponse()

    async def replace_tail(self, request: Any, tenant: Tenant) -> Any:
        """Have the next prompt of a session of the caller's computed in idle time."""
        ids = list(request.token_ids)
        _, computed = await self._sessions.replace_tail(tenant, request.session, 0, None, ids)
        return wire.ReplaceTailResponse(computed=computed)

    def stats(self, request: Any, owner: str) -> Any:
        """The engine's counts; they name no session and no tenant."""
        response = wire.StatsResponse()
        for name, value in self._engine.counts().items():
            response.counts.add(name=name, value=value)
        return response


def _unary(message: Any, answer: Callable[[Any, str], Any], response: Any) -> grpc.RpcMethodHandler:
    """Handle a method with one response, which ``answer`` makes of the request and the owner of its sessions."""

    async def handle(request: Any, context: grpc.aio.ServicerContext) -> Any:
        tenant = CALL.get().tenant
        return answer(request, "" if tenant is None else tenant.owner)

    return grpc.unary_unary_rpc_method_handler(handle, message.FromString, response.SerializeToString)


def _awaited(message: Any, answer: Callable[[Any, Tenant], Awaitable[Any]], response: Any) -> grpc.RpcMethodHandler:
    """Handle a method with one response, which ``answer`` waits for; the request is its tenant's."""

    async def handle(request: Any, context: grpc.aio.ServicerContext) -> Any:
        tenant = CALL.get().tenant
        assert tenant is not None  # this is not open
        return await answer(request, tenant)

    return grpc.unary_unary_rpc_method_handler(handle, message.FromString, response.SerializeToString)


def _handlers(server: Server) -> dict[str, dict[str, grpc.RpcMethodHandler]]:
    """Service -> method -> its handler."""
    decode = grpc.unary_stream_rpc_method_handler(
        server.decode, wire.DecodeRequest.FromString, wire.DecodeResponse.SerializeToString
    )
    return {
        wire.ORCHESTRATOR: {
            "Decode": decode,
            "HealthCheck": _unary(wire.HealthCheckRequest, server.health_check, wire.HealthCheckResponse),
        },
        wire.SESSIONS: {
            "End": _awaited(wire.EndRequest, server.end, wire.EndResponse),
            "ToolCalled": _unary(wire.ToolCalledRequest, server.tool_called, wire.ToolCalledResponse),
            "Waits": _unary(wire.WaitsRequest, server.waits, wire.WaitsResponse),
            "Fork": _awaited(wire.ForkRequest, server.fork, wire.ForkResponse),
            "ReplaceTail": _awaited(wire.ReplaceTailRequest, server.replace_tail, wire.ReplaceTailResponse),
            "Stats": _unary(wire.StatsRequest, server.stats, wire.StatsResponse),
        },
    }


def _response(delta: Delta, as_text: bool) -> Any:
    """Every message has one sample, which JetStream's clients rely on. Token requests get tokens only."""
    response = wire.DecodeResponse()
    sample = response.stream_content.samples.add(text=delta.text if as_text else "", token_ids=delta.token_ids)
    for token, logprob, top in delta.logprobs:
        entry = sample.logprobs.add(token_id=token, logprob=logprob)
        for other, of_other in top:
            entry.top.add(token_id=other, logprob=of_other)
    return response
