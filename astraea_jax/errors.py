"""Errors of the front doors, one class per answer that a client gets."""

from __future__ import annotations


class RequestError(ValueError):
    """The request itself is at fault; the message names the field and what it may be. Nothing was queued."""


class Overloaded(RuntimeError):
    """The engine's bounded queue or session table is full; try again later."""


class EngineDead(RuntimeError):
    """The engine does not serve: not started, shut down, or its loop has failed (the message says which)."""


class StepFailed(RuntimeError):
    """A step of the engine has failed, or gave no token; the engine goes on, and the request may be sent again."""


class Unauthorized(PermissionError):
    """The caller's key is missing, unknown, or not enough for what is asked; the message says which."""


class StartupError(RuntimeError):
    """The configuration cannot be served on this machine; the message says what would fit."""


def shown(value: object) -> str:
    """Return a value as an error message shows it, whatever it is."""
    try:
        text = repr(value)
    except Exception:  # an integer of too many digits, or anybody's __repr__
        text = f"a {type(value).__name__}"
    return text if len(text) <= 60 else f"{text[:60]}…"


class Fault(str):
    """Text of an error that says what has failed inside, for callers in this process; front doors tell :attr:`told`.

    Args:
        what: has failed.
        error: the exception that says why. Its text may hold anything, so only its class leaves the process.
    """

    told: str
    """The text for clients."""

    def __new__(cls, what: str, error: BaseException | None) -> Fault:
        text = super().__new__(cls, f"{what}: {error!r}")
        text.told = f"{what}: {error if isinstance(error, EngineDead) else type(error).__name__}"
        return text


def told(error: BaseException) -> str:
    """Return what the clients of a front door are told of an error that has an answer of its own."""
    text = error.args[0] if error.args else ""
    return text.told if isinstance(text, Fault) else str(error)
