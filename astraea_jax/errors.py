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
