"""The client of a server, with the interface of an engine in this process: agents run against either."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Sequence
from typing import Any

import grpc

from astraea_jax.engine.generation import Delta, TokenLogprob, Usage
from astraea_jax.engine.output import Output
from astraea_jax.engine.sampling import SamplingParams
from astraea_jax.errors import EngineDead, Overloaded, RequestError, StepFailed, Unauthorized
from astraea_jax.frontends.rpc import wire
from astraea_jax.frontends.rpc.metadata import read_usage, write_sampling, write_session
from astraea_jax.models.tokenizer import Tokenizer
from astraea_jax.scheduler.placement import Report
from astraea_jax.scheduler.wait import Wait

log = logging.getLogger(__name__)

ERRORS: dict[grpc.StatusCode, type[Exception]] = {
    grpc.StatusCode.INVALID_ARGUMENT: RequestError,
    grpc.StatusCode.RESOURCE_EXHAUSTED: Overloaded,
    grpc.StatusCode.ABORTED: StepFailed,
    grpc.StatusCode.UNAVAILABLE: EngineDead,
    grpc.StatusCode.UNAUTHENTICATED: Unauthorized,
}
OPTIONS = [("grpc.use_local_subchannel_pool", 1)]
"""A connection of its own for each client, since the server tells tenants apart by connection."""
NOT_TOLD = (grpc.StatusCode.UNIMPLEMENTED, grpc.StatusCode.UNAVAILABLE)
"""A plain JetStream server has no sessions, and one that is gone has none left."""
MAX_TELLS = 1024
"""Calls in flight whose answer is not awaited; beyond that they are dropped."""
TELL_S = 10.0
"""Seconds after which such a call times out."""


class Client:
    """Talks to an ``Orchestrator`` at ``address`` (``host:port``); an async context manager.

    Args:
        address: of the server.
        tokenizer: of the model served there; prompts travel as tokens, and text is made here.
        salt: names the tenant (see :meth:`astraea_jax.engine.engine.Engine.generate`); sessions belong to it. Without
            one they belong to this client's connection.
        key: API key, if the server needs one; sessions belong to it then.
        credentials: of TLS, such as ``grpc.ssl_channel_credentials(...)``; None: the connection is not encrypted.
    """

    def __init__(
        self,
        address: str,
        tokenizer: Tokenizer,
        *,
        salt: str = "",
        key: str | None = None,
        credentials: grpc.ChannelCredentials | None = None,
    ):
        self.tokenizer = tokenizer
        self._salt = salt
        self._closed = False
        self._key = [] if key is None else [("authorization", f"Bearer {key}")]
        self._channel = (
            grpc.aio.insecure_channel(address, options=OPTIONS)
            if credentials is None
            else grpc.aio.secure_channel(address, credentials, options=OPTIONS)
        )
        self._decode = self._channel.unary_stream(
            f"/{wire.ORCHESTRATOR}/Decode",
            request_serializer=wire.DecodeRequest.SerializeToString,
            response_deserializer=wire.DecodeResponse.FromString,
        )
        self._health = self._unary(
            f"{wire.ORCHESTRATOR}/HealthCheck", wire.HealthCheckRequest, wire.HealthCheckResponse
        )
        self._end = self._unary(f"{wire.SESSIONS}/End", wire.EndRequest, wire.EndResponse)
        self._waits = self._unary(f"{wire.SESSIONS}/Waits", wire.WaitsRequest, wire.WaitsResponse)
        self._fork = self._unary(f"{wire.SESSIONS}/Fork", wire.ForkRequest, wire.ForkResponse)
        self._replace_tail = self._unary(
            f"{wire.SESSIONS}/ReplaceTail", wire.ReplaceTailRequest, wire.ReplaceTailResponse
        )
        self._stats = self._unary(f"{wire.SESSIONS}/Stats", wire.StatsRequest, wire.StatsResponse)
        self._telling: set[asyncio.Task[None]] = set()

    def _unary(self, method: str, request: Any, response: Any) -> Any:
        return self._channel.unary_unary(
            f"/{method}",
            request_serializer=request.SerializeToString,
            response_deserializer=response.FromString,
        )

    async def __aenter__(self) -> Client:
        return self

    async def __aexit__(self, *_: object) -> None:
        """Wait for what the server is being told, and close the connection; requests that run are cancelled."""
        self._closed = True
        try:
            await asyncio.gather(*self._telling)
        finally:
            await self._channel.close()

    async def is_live(self) -> bool:
        """Ask the server's ``HealthCheck``."""
        return bool((await self._health(wire.HealthCheckRequest())).is_live)

    def generate(
        self,
        prompt: Sequence[int],
        params: SamplingParams | None = None,
        *,
        session: str | None = None,
        final: bool = False,
        salt: str = "",
    ) -> RemoteGeneration:
        """Do as :meth:`astraea_jax.engine.engine.Engine.generate`, but raise what the server says while iterating.

        Args:
            prompt: token ids.
            params: sampling; greedy by default.
            session: names the program.
            final: the program ends with this request.
            salt: another tenant than the client's own.

        Raises:
            RequestError: ``stop_token_ids`` are given, which the protocol cannot carry, or something else cannot be
                sent.
            EngineDead: the client has been closed.
        """
        params = params or SamplingParams()
        if params.stop_token_ids:
            raise RequestError("stop_token_ids cannot be sent over this protocol; use stop strings")
        if self._closed:
            raise EngineDead("this client is closed")
        metadata = self._key + write_sampling(params) + write_session(session, final, salt or self._salt)
        request = wire.DecodeRequest(max_tokens=params.max_tokens, has_bos=True)
        try:
            request.token_content.token_ids.extend(prompt)
        except (TypeError, ValueError) as error:
            raise RequestError(f"the prompt holds something that is no token id: {error}") from None
        eos = frozenset() if params.ignore_eos else self.tokenizer.eos_ids
        call = self._decode(request, metadata=metadata, wait_for_ready=False)
        return RemoteGeneration(call, Output(self.tokenizer.stream(), params, eos))

    def end_session(self, session: str, *, salt: str = "") -> None:
        """Tell the server, without waiting, that a program has ended."""
        self._tell(self._end, wire.EndRequest(session=session), salt)

    def tool_called(self, session: str, tool: str, *more: str, salt: str = "") -> None:
        """Tell the server, without waiting, which tools a program waits for, called together."""
        self.waits(session, Wait((tool, *more)), salt=salt)

    def waits(self, session: str, wait: Wait, *, salt: str = "") -> None:
        """Tell the server, without waiting, what a program waits for."""
        hints = {"expected_s": wait.expected_s, "keep_s": wait.keep_s}
        given = {name: value for name, value in hints.items() if value is not None}
        self._tell(self._waits, wire.WaitsRequest(session=session, tools=wait.tools, **given), salt)

    async def fork(self, session: str, child: str, *, salt: str = "") -> None:
        """Open a session that begins where another one is, and shares its KV.

        Raises:
            RequestError, Overloaded, EngineDead: as :meth:`astraea_jax.engine.engine.Engine.fork`.
        """
        await self._ask(self._fork, wire.ForkRequest(session=session, child=child), salt)

    async def replace_tail(self, session: str, prompt: Sequence[int], *, salt: str = "") -> bool:
        """Have the next prompt of a waiting session computed in idle time; see ``Engine.replace_tail``.

        Raises:
            RequestError, Overloaded, StepFailed, EngineDead: as there.
        """
        request = wire.ReplaceTailRequest(session=session, token_ids=prompt)
        return bool((await self._ask(self._replace_tail, request, salt)).computed)

    async def counts(self) -> dict[str, int]:
        """Ask for the server's :meth:`astraea_jax.engine.engine.Engine.counts`."""
        stats = await self._stats(wire.StatsRequest(), metadata=self._key)
        return {count.name: count.value for count in stats.counts}

    async def report(self) -> Report:
        """Ask for the server's :meth:`astraea_jax.engine.engine.Engine.report`.

        Raises:
            ReportError: it is not one.
        """
        stats = await self._stats(wire.StatsRequest(), metadata=self._key)
        return Report.from_fields({figure.name: figure.value for figure in stats.report})

    async def _ask(self, method: Any, request: Any, salt: str) -> Any:
        try:
            return await method(request, metadata=self._key + write_session(None, False, salt or self._salt))
        except grpc.aio.AioRpcError as error:
            raise ERRORS.get(error.code(), RuntimeError)(f"{error.details()}") from error

    def _tell(self, method: Any, request: Any, salt: str) -> None:
        metadata = self._key + write_session(None, False, salt or self._salt)
        if self._closed or len(self._telling) >= MAX_TELLS:
            log.warning(
                "the server is not told of %s: %s", type(request).__name__, "closed" if self._closed else "busy"
            )
            return
        task = asyncio.get_running_loop().create_task(self._told(method, request, metadata))
        self._telling.add(task)
        task.add_done_callback(self._telling.discard)

    @staticmethod
    async def _told(method: Any, request: Any, metadata: Any) -> None:
        try:
            await method(request, metadata=metadata, timeout=TELL_S)
        except grpc.aio.AioRpcError as error:
            if error.code() not in NOT_TOLD:
                log.warning("the server could not be told of %s: %s", type(request).__name__, error.details())


class RemoteGeneration:
    """A request that runs on the server: an async iterator of Deltas, like ``Generation``.

    Whoever stops iterating, or lets go of it, cancels it.
    """

    def __init__(self, call: Any, output: Output):
        self.usage: Usage | None = None
        """Complete after the last Delta, if the server sends it."""
        self._call = call
        self._output = output

    def cancel(self) -> None:
        """Stop it; does nothing once it has ended."""
        self._call.cancel()

    async def __aiter__(self) -> AsyncIterator[Delta]:
        reason: str | None = None
        try:
            while (response := await self._call.read()) is not grpc.aio.EOF:  # cheaper than iterating
                [sample] = response.stream_content.samples
                if sample.token_ids and not self._output.stopped:
                    text = "".join([self._output.push(token) for token in sample.token_ids])
                    yield Delta(text, tuple(sample.token_ids), logprobs=tuple(map(_logprob, sample.logprobs)))
            self.usage, reason = read_usage(await self._call.trailing_metadata() or ())
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if not self._call.cancelled() or (task is not None and task.cancelling()):
                raise  # the caller is to stop, not only this request
            reason = "cancelled"
        except grpc.aio.AioRpcError as error:
            if error.code() != grpc.StatusCode.CANCELLED:
                raise ERRORS.get(error.code(), RuntimeError)(f"{error.details()}") from error
            reason = "cancelled"
        finally:
            self._call.cancel()
        yield Delta(self._output.flush(), (), reason or "stop")


def _logprob(entry: Any) -> TokenLogprob:
    return TokenLogprob(entry.token_id, entry.logprob, tuple((other.token_id, other.logprob) for other in entry.top))
