"""The methods of ``Orchestrator`` and ``astraea.Sessions``, whatever server they are called through.

What they answer, and with which status, stands at :mod:`.server`.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import replace
from functools import partial
from typing import Any

import grpc

from astraea_jax.engine.encoding import DOORS, LONG_TEXT
from astraea_jax.engine.generation import Delta, Generation
from astraea_jax.engine.grammar import Grammar, GrammarCompiler
from astraea_jax.engine.interface import Serving
from astraea_jax.engine.pacing import Pace
from astraea_jax.errors import EngineDead, RequestError
from astraea_jax.frontends.http.tenants import Tenant
from astraea_jax.frontends.programs import End, Programs
from astraea_jax.frontends.rpc import wire
from astraea_jax.frontends.rpc.gate import CALL
from astraea_jax.frontends.rpc.health import Health, Status
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
from astraea_jax.scheduler.wait import Wait


class Servicer:
    """Answers calls. Its methods run in one event loop, in which :data:`.gate.CALL` says whose call it is.

    Args:
        engine: serves the requests; until it has started they get ``UNAVAILABLE``.
        grammars: compiles what requests constrain their text by; one of its own by default.
        programs: names the programs of requests in text and continues them; shared with other doors of the engine.
    """

    def __init__(self, engine: Serving, grammars: GrammarCompiler | None = None, programs: Programs | None = None):
        self._engine = engine
        self.health = Health(engine)
        self.draining = False
        """Set when the end begins: new requests are refused."""
        self.decoding: dict[grpc.aio.ServicerContext, asyncio.Task[Any] | None] = {}
        """Running requests, and the tasks that answer them."""
        self.finishing: frozenset[grpc.aio.ServicerContext] = frozenset()
        """Requests that were running when the end began."""
        self.cut = 0
        """Those of them whose engine died meanwhile."""
        self._pace = Pace()
        self._programs = programs or Programs(engine)
        self._sessions = Sessions(self._programs)
        self._grammars = grammars or GrammarCompiler(engine.tokenizer)

    async def decode(self, request: Any, context: grpc.aio.ServicerContext) -> AsyncGenerator[Any]:
        """Stream one request. The end of the call, by cancel or deadline too, cancels the generation."""
        self.decoding[context] = asyncio.current_task()
        turn = None
        try:
            generation, turn = await self._generate(request, tuple(context.invocation_metadata() or ()))
            as_text = request.WhichOneof("content") == "text_content"
            async with aclosing(generation):
                async for delta in generation.paced(self._pace):
                    if turn is not None:
                        turn.add(delta)
                    if generation.usage is not None and delta.finish_reason not in (None, "cancelled"):
                        CALL.get().usage = generation.usage
                        context.set_trailing_metadata(write_usage(generation.usage, delta.finish_reason))
                    yield _response(delta, as_text)
            if delta.finish_reason == "cancelled":
                raise Cancelled("the session was ended")
            if delta.finish_reason == "length":
                yield _response(Delta("", ()), as_text)  # JetStream ends a length stop with an empty sample
        except EngineDead:
            self.cut += context in self.finishing
            raise
        finally:
            del self.decoding[context]
            if turn is not None:
                turn.end()

    async def _generate(self, request: Any, metadata: Metadata) -> tuple[Generation, TextTurn | None]:
        if self.draining:
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
        return wire.HealthCheckResponse(is_live=self.health.status(wire.ORCHESTRATOR) == Status.SERVING)

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
        """The engine's counts, and the report of its load; they name no session and no tenant."""
        response = wire.StatsResponse()
        for name, value in self._engine.counts().items():
            response.counts.add(name=name, value=value)
        for name, figure in self._engine.report().fields().items():
            response.report.add(name=name, value=figure)
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


def handlers(servicer: Servicer) -> dict[str, dict[str, grpc.RpcMethodHandler]]:
    """Service -> method -> its handler, in a context whose :data:`.gate.CALL` is set."""
    decode = grpc.unary_stream_rpc_method_handler(
        servicer.decode, wire.DecodeRequest.FromString, wire.DecodeResponse.SerializeToString
    )
    return {
        wire.ORCHESTRATOR: {
            "Decode": decode,
            "HealthCheck": _unary(wire.HealthCheckRequest, servicer.health_check, wire.HealthCheckResponse),
        },
        wire.SESSIONS: {
            "End": _awaited(wire.EndRequest, servicer.end, wire.EndResponse),
            "ToolCalled": _unary(wire.ToolCalledRequest, servicer.tool_called, wire.ToolCalledResponse),
            "Waits": _unary(wire.WaitsRequest, servicer.waits, wire.WaitsResponse),
            "Fork": _awaited(wire.ForkRequest, servicer.fork, wire.ForkResponse),
            "ReplaceTail": _awaited(wire.ReplaceTailRequest, servicer.replace_tail, wire.ReplaceTailResponse),
            "Stats": _unary(wire.StatsRequest, servicer.stats, wire.StatsResponse),
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
