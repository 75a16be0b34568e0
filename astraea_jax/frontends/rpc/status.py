"""The gRPC status that each kind of error stands for."""

from __future__ import annotations

import logging

import grpc

from astraea_jax.errors import EngineDead, Overloaded, RequestError, StepFailed, Unauthorized, told

log = logging.getLogger(__name__)

MAX_DETAILS = 1024
"""Characters of a status message; gRPC drops what does not fit into its trailers, status and all."""
FAULT = "internal error; the server's log has more"
"""What clients are told of a fault of ours."""
RETRY_AFTER_MS = 1000
"""Milliseconds after which a client that was refused may come back, unless something better is known."""


RETRY = (("grpc-retry-pushback-ms", str(RETRY_AFTER_MS)),)


class UnknownAdapter(LookupError):
    """A LoRA adapter that is not served."""


class Cancelled(RuntimeError):
    """A session was ended while its request ran."""


class TooSlow(TimeoutError):
    """The client has not said in time what it wants, or not taken in time what it asked for."""


def status_of(error: Exception) -> tuple[grpc.StatusCode, tuple[tuple[str, str], ...]]:
    """The status that an error stands for, and the trailing metadata beside it."""
    match error:
        case RequestError():
            return grpc.StatusCode.INVALID_ARGUMENT, ()
        case Unauthorized():
            return grpc.StatusCode.UNAUTHENTICATED, ()
        case UnknownAdapter():
            return grpc.StatusCode.NOT_FOUND, ()
        case Cancelled():
            return grpc.StatusCode.CANCELLED, ()
        case TooSlow():
            return grpc.StatusCode.DEADLINE_EXCEEDED, ()
        case Overloaded():
            after_ms = round(1000 * getattr(error, "retry_after_s", RETRY_AFTER_MS / 1000))
            return grpc.StatusCode.RESOURCE_EXHAUSTED, (("grpc-retry-pushback-ms", str(after_ms)),)
        case StepFailed():
            return grpc.StatusCode.ABORTED, RETRY
        case EngineDead():  # another replica, or one that is started in its place, computes it again
            return grpc.StatusCode.UNAVAILABLE, RETRY
    return grpc.StatusCode.INTERNAL, ()


async def abort(context: grpc.aio.ServicerContext, error: Exception) -> None:
    """End the call with the status an error stands for. What is not meant for clients goes to the log only."""
    status, trailing = status_of(error)
    if status is grpc.StatusCode.INTERNAL:
        log.error("a request failed", exc_info=error)
        error = RuntimeError(FAULT)
    await context.abort(status, told(error)[:MAX_DETAILS], trailing)
