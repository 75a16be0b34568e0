"""The gRPC status that each kind of error stands for."""

from __future__ import annotations

import logging

import grpc

from astraea_jax.errors import EngineDead, Overloaded, RequestError, StepFailed, Unauthorized, told

log = logging.getLogger(__name__)

MAX_DETAILS = 1024
"""Characters of a status message; gRPC drops what does not fit into its trailers, status and all."""
RETRY_AFTER_MS = 1000
"""Milliseconds after which a client that was refused may come back, unless something better is known."""


class UnknownAdapter(LookupError):
    """A LoRA adapter that is not served."""


class Cancelled(RuntimeError):
    """A session was ended while its request ran."""


class TooSlow(TimeoutError):
    """The client has not said in time what it wants."""


async def abort(context: grpc.aio.ServicerContext, error: Exception) -> None:
    """End the call with the status an error stands for. What is not meant for clients goes to the log only."""
    retry: tuple[tuple[str, str], ...] = ()
    match error:
        case RequestError():
            status = grpc.StatusCode.INVALID_ARGUMENT
        case Unauthorized():
            status = grpc.StatusCode.UNAUTHENTICATED
        case UnknownAdapter():
            status = grpc.StatusCode.NOT_FOUND
        case Cancelled():
            status = grpc.StatusCode.CANCELLED
        case TooSlow():
            status = grpc.StatusCode.DEADLINE_EXCEEDED
        case Overloaded():
            after_ms = round(1000 * getattr(error, "retry_after_s", RETRY_AFTER_MS / 1000))
            status, retry = grpc.StatusCode.RESOURCE_EXHAUSTED, (("grpc-retry-pushback-ms", str(after_ms)),)
        case StepFailed():
            status = grpc.StatusCode.ABORTED
        case EngineDead():
            status = grpc.StatusCode.UNAVAILABLE
        case _:
            log.error("a request failed", exc_info=error)
            status, error = grpc.StatusCode.INTERNAL, RuntimeError("internal error; the server's log has more")
    await context.abort(status, told(error)[:MAX_DETAILS], retry)
