"""The standard gRPC health service, which reads the engine's state whenever somebody asks."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from astraea_jax.engine.interface import Serving
from astraea_jax.frontends.rpc import wire

Status = health_pb2.HealthCheckResponse


class Health(health_pb2_grpc.HealthServicer):  # type: ignore[misc] # grpc has no types
    """Health of the server: the services ``""`` and those of :mod:`.wire` as a whole, ``replica-0``, … one by one.

    Args:
        engine: the service reports its state, and every change at once.
    """

    def __init__(self, engine: Serving):
        replicas = {f"replica-{i}": replica for i, replica in enumerate(engine.replicas)}
        self._services = {**dict.fromkeys(("", wire.ORCHESTRATOR, wire.SESSIONS), engine), **replicas}
        self._engine = engine
        self._draining = self._closed = False
        self._changed = asyncio.Event()
        """Set at the next change, and then replaced."""

    def start(self) -> None:
        """Follow the engine; called in the event loop that answers."""
        loop = asyncio.get_running_loop()

        def notify() -> None:
            with contextlib.suppress(RuntimeError):  # the event loop has closed
                loop.call_soon_threadsafe(self._notify)

        self._engine.watch(notify)

    def drain(self) -> None:
        """Report not serving from now on, whatever the engine's state."""
        self._draining = True
        self._notify()

    def close(self) -> None:
        """End the streams of those who watch."""
        self._closed = True
        self._notify()

    def status(self, service: str) -> int:
        """Status of a service: SERVING, NOT_SERVING or SERVICE_UNKNOWN."""
        if service not in self._services:
            return int(Status.SERVICE_UNKNOWN)
        serving = self._services[service].live and not self._draining
        return int(Status.SERVING if serving else Status.NOT_SERVING)

    async def Check(self, request: Any, context: grpc.aio.ServicerContext) -> Any:
        """Answer with the status of one service; ``NOT_FOUND`` if there is none of that name."""
        status = self.status(request.service)
        if status == Status.SERVICE_UNKNOWN:
            await context.abort(
                grpc.StatusCode.NOT_FOUND, f"there is no service of this name: {request.service[:60]!r}"
            )
        return Status(status=status)

    async def List(self, request: Any, context: grpc.aio.ServicerContext) -> Any:
        """Answer with the status of every service."""
        return health_pb2.HealthListResponse(
            statuses={service: Status(status=self.status(service)) for service in self._services}
        )

    async def Watch(self, request: Any, context: grpc.aio.ServicerContext) -> AsyncIterator[Any]:
        """Stream the status of one service, now and whenever it changes, until the server stops."""
        told = None
        while not self._closed:
            changed, status = self._changed, self.status(request.service)
            if status != told:
                yield Status(status=status)
                told = status
            await changed.wait()

    def _notify(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()
