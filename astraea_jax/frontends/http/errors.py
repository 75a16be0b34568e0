"""Answers to what goes wrong: one :class:`Failure` for each kind of exception, in whatever shape an API gives it."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

from astraea_jax.errors import EngineDead, Overloaded, RequestError, StepFailed, Unauthorized, told
from astraea_jax.models.config import CheckpointError

log = logging.getLogger(__name__)

RETRY_AFTER_S = 1
"""Seconds after which a client that was refused may come back, unless something better is known."""
MAX_MESSAGE = 1024
SEND_AGAIN = "; send the whole request again, which another replica may take"
"""Said of an engine that has ended, since in the middle of a stream no header says it."""


class NotFound(LookupError):
    """There is no such model, response or route; the message names it."""


class ThreadsUnserved(RequestError):
    """A conversation is to be kept by the server; its client must send all of it."""


class TooLarge(ValueError):
    """The request is larger than is read at all; the message says how large it may be."""


class NotJson(ValueError):
    """The body is said to be something else than JSON."""


class HostRefused(ValueError):
    """The request is addressed to another server, or comes from a stranger's web page."""


class TooSlow(TimeoutError):
    """The client has not sent its whole request in time."""


class SessionEnded(RuntimeError):
    """A session was ended while its request ran."""


@dataclass(frozen=True)
class Failure:
    """An answer to a client whose request has failed. Every API puts it into its own shape."""

    status: int
    """HTTP status."""
    type: str
    """Kind of error, in OpenAI's words."""
    message: str
    """For people; never the text of an exception that was not made for clients."""
    code: str | None = None
    """The cause, for programs."""
    param: str | None = None
    """The field at fault, if it is known."""
    retry_after_s: int | None = None

    @property
    def headers(self) -> dict[str, str]:
        """Headers that belong to the answer."""
        headers = {} if self.retry_after_s is None else {"retry-after": str(self.retry_after_s)}
        return headers | ({"www-authenticate": "Bearer"} if self.status == 401 else {})

    def openai(self) -> dict[str, Any]:
        """Body in OpenAI's shape."""
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}


def anthropic_status(status: int) -> int:
    """Return the status by which Anthropic's clients know a failure: its ``overloaded_error`` comes with 529.

    What a client asks too much of has 429 there as well.
    """
    return 529 if status == 503 else status


_ANSWERS: tuple[tuple[type[Exception] | tuple[type[Exception], ...], int, str, str], ...] = (
    (ThreadsUnserved, 400, "invalid_request_error", "thread_unsupported_request"),
    ((RequestError, CheckpointError), 400, "invalid_request_error", "invalid_value"),
    (Unauthorized, 401, "authentication_error", "invalid_api_key"),
    (HostRefused, 403, "permission_error", "host_not_allowed"),
    (NotFound, 404, "not_found_error", "not_found"),
    (TooSlow, 408, "timeout_error", "request_timeout"),
    (SessionEnded, 409, "invalid_request_error", "session_ended"),
    (TooLarge, 413, "invalid_request_error", "request_too_large"),
    (NotJson, 415, "invalid_request_error", "unsupported_media_type"),
    (Overloaded, 429, "rate_limit_error", "overloaded"),
    (StepFailed, 503, "server_error", "step_failed"),
    (EngineDead, 503, "server_error", "not_serving"),
)
"""Exceptions whose text is made for clients: status, type and code of the answer. (The engine's checks are among them;
:class:`CheckpointError` is that a model has no chat template.)"""


def failure_of(error: BaseException) -> Failure:
    """Return what a client is told about an exception; what was not made for clients goes to the log only."""
    text = told(error)[:MAX_MESSAGE] + (SEND_AGAIN if isinstance(error, EngineDead) else "")
    for kinds, status, kind, code in _ANSWERS:
        if isinstance(error, kinds):
            return Failure(status, kind, text, code, retry_after_s=RETRY_AFTER_S if status in (429, 503) else None)
    match error:
        case RequestValidationError():
            return _invalid(error)
        case HTTPException(status_code=404):
            return Failure(404, "not_found_error", "there is no such route", "not_found")
        case HTTPException(status_code=status):  # of the framework: a method that is not allowed, unreadable JSON
            return Failure(status, "invalid_request_error", str(error.detail)[:MAX_MESSAGE])
    log.error("a request failed", exc_info=error)
    return Failure(500, "server_error", "internal error; the server's log has more", "internal_error")


def _invalid(error: RequestValidationError) -> Failure:
    """The first field that a schema refuses. What the client has sent is not repeated."""
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"] if part != "body")[:200]
    told = str(first["msg"]).removeprefix("Value error, ")
    message = f"{where}: {told}" if where else told
    return Failure(400, "invalid_request_error", message[:MAX_MESSAGE], str(first["type"]), where or None)
