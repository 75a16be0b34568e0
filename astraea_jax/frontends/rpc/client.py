"""A client for a serving process; agents run against it as they do against an engine in the same process."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Any

import grpc

from astraea_jax.engine.generation import Delta, Usage
from astraea_jax.engine.output import Output
from astraea_jax.engine.sampling import SamplingParams
from astraea_jax.errors import EngineDead, Overloaded, RequestError
from astraea_jax.frontends.rpc import wire
from astraea_jax.frontends.rpc.metadata import SALT, read_usage, write_sampling
from astraea_jax.models.tokenizer import Tokenizer

ERRORS: dict[grpc.StatusCode, type[Exception]] = {
    grpc.StatusCode.INVALID_ARGUMENT: RequestError,
    grpc.StatusCode.RESOURCE_EXHAUSTED: Overloaded,
    grpc.StatusCode.UNAVAILABLE: EngineDead,
}


class Client:
    """Talks to an ``Orchestrator`` at ``address`` (``host:port``); an async context manager.

    Args:
        address: of the server.
        tokenizer: of the model served there; prompts travel as tokens, and text is made here.
    """

    def __init__(self, address: str, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        self._channel = grpc.aio.insecure_channel(address)
        self._decode = self._channel.unary_stream(
            f"/{wire.ORCHESTRATOR}/Decode",
            request_serializer=wire.DecodeRequest.SerializeToString,
            response_deserializer=wire.DecodeResponse.FromString,
        )
        self._health = self._unary(
            f"{wire.ORCHESTRATOR}/HealthCheck", wire.HealthCheckRequest, wire.HealthCheckResponse
        )
        self._end = self._unary(f"{wire.SESSIONS}/End", wire.EndRequest, wire.EndResponse)
        self._tool = self._unary(f"{wire.SESSIONS}/ToolCalled", wire.ToolCalledRequest, wire.ToolCalledResponse)
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
        await asyncio.gather(*self._telling)
        await self._channel.close()

    async def is_live(self) -> bool:
        """What the server's ``HealthCheck`` says."""
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
        """As :meth:`astraea_jax.engine.engine.Engine.generate`, but what the server refuses is raised while iterating.

        Raises:
            RequestError: ``stop_token_ids`` are given; the protocol cannot carry them.
        """
        params = params or SamplingParams()
        if params.stop_token_ids:
            raise RequestError("stop_token_ids cannot be sent over this protocol; use stop strings")
        metadata = write_sampling(params)
        if session is not None:
            metadata += [("x-session-id", session), ("x-session-final", str(final).lower())]
        if salt:
            metadata.append((SALT, salt))
        request = wire.DecodeRequest(max_tokens=params.max_tokens, has_bos=True)
        request.token_content.token_ids.extend(prompt)
        eos = frozenset() if params.ignore_eos else self.tokenizer.eos_ids
        call = self._decode(request, metadata=metadata, wait_for_ready=False)
        return RemoteGeneration(call, Output(self.tokenizer.stream(), params, eos))

    def end_session(self, session: str) -> None:
        """Tell the server, without waiting, that a program has ended."""
        self._tell(self._end, wire.EndRequest(session=session))

    def tool_called(self, session: str, tool: str) -> None:
        """Tell the server, without waiting, which tool a program waits for."""
        self._tell(self._tool, wire.ToolCalledRequest(session=session, tool=tool))

    async def counts(self) -> dict[str, int]:
        """As :meth:`astraea_jax.engine.engine.Engine.counts`."""
        return {count.name: count.value for count in (await self._stats(wire.StatsRequest())).counts}

    def _tell(self, method: Any, request: Any) -> None:
        task = asyncio.get_running_loop().create_task(self._told(method, request))
        self._telling.add(task)
        task.add_done_callback(self._telling.discard)

    @staticmethod
    async def _told(method: Any, request: Any) -> None:
        try:
            await method(request)
        except grpc.aio.AioRpcError as error:
            if error.code() not in (grpc.StatusCode.UNIMPLEMENTED, grpc.StatusCode.UNAVAILABLE):
                raise  # a plain JetStream server has no sessions, and one that is gone has none left


class RemoteGeneration:
    """A request that runs on the server: an async iterator of Deltas, like ``Generation``."""

    def __init__(self, call: Any, output: Output):
        self.usage: Usage | None = None
        """Complete after the last Delta, if the server sends it."""
        self._call = call
        self._output = output

    def cancel(self) -> None:
        self._call.cancel()

    async def __aiter__(self) -> AsyncIterator[Delta]:
        reason: str | None = None
        try:
            async for response in self._call:
                sample = response.stream_content.samples[0]
                if sample.token_ids and not self._output.stopped:
                    text = "".join([self._output.push(token) for token in sample.token_ids])
                    yield Delta(text, tuple(sample.token_ids))
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
        yield Delta(self._output.flush(), (), reason or "stop")
