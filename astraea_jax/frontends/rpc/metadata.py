"""What travels beside the messages, in gRPC metadata: sampling, the session, and how a request went.

JetStream's messages have no fields for these; its servers ignore the keys, and its clients need not send them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from astraea_jax.engine.generation import Usage
from astraea_jax.engine.sampling import SamplingParams
from astraea_jax.errors import RequestError

Metadata = Sequence[tuple[str, str | bytes]]

SESSION_KEYS = ("x-session-id", "x-dynamo-session-id", "x-claude-code-session-id", "thread-id", "session-id")
"""Names under which clients already send a session; the first that is there counts."""
FINAL_KEYS = ("x-session-final", "x-dynamo-session-final")
MAX_SESSION = 256
SALT = "x-cache-salt"

SAMPLING = {"temperature": float, "top_p": float, "top_k": int, "min_p": float, "seed": int}
STOPS = ("x-stop", "x-stop-bin")
FINISH = "x-finish-reason"


def key_of(field: str) -> str:
    """Metadata key of a field: ``top_p`` -> ``x-top-p``."""
    return f"x-{field.replace('_', '-')}"


NUMBERS_AND_FLAGS = {*map(key_of, SAMPLING), "x-ignore-eos"}


def read_sampling(metadata: Metadata, max_tokens: int) -> SamplingParams:
    """Sampling parameters of a request. Stop strings may come several times, as ``x-stop-bin`` if not ASCII.

    Raises:
        RequestError: a value cannot be read or is out of bounds; names its key.
    """
    values = {key: _text(key, value) for key, value in metadata if key in NUMBERS_AND_FLAGS}
    given: dict[str, Any] = {}
    for field, kind in SAMPLING.items():
        text = values.get(key_of(field))
        if text is None:
            continue
        try:
            given[field] = kind(text)
        except ValueError:
            raise RequestError(f"metadata {key_of(field)} is {text[:60]!r}; it must be a number") from None
    stops = tuple(_text(key, value) for key, value in metadata if key in STOPS)
    return SamplingParams(max_tokens=max_tokens, stop=stops, ignore_eos=_flag(values, "x-ignore-eos"), **given)


def write_sampling(params: SamplingParams) -> list[tuple[str, str | bytes]]:
    """The metadata that :func:`read_sampling` reads."""
    given = {field: value for field in SAMPLING if (value := getattr(params, field)) is not None}
    pairs: list[tuple[str, str | bytes]] = [(key_of(field), repr(value)) for field, value in given.items()]
    stops = [("x-stop-bin", stop.encode()) for stop in params.stop]
    return [*pairs, *stops, ("x-ignore-eos", str(params.ignore_eos).lower())]


def read_session(metadata: Metadata) -> tuple[str | None, bool]:
    """The program a request belongs to, if it says so, and whether it ends with this request.

    Raises:
        RequestError: the session's name is too long, or the flag neither true nor false.
    """
    values = {key: _text(key, value) for key, value in metadata if key in SESSION_KEYS + FINAL_KEYS}
    session = next((values[key] for key in SESSION_KEYS if values.get(key)), None)
    if session is not None and len(session) > MAX_SESSION:
        raise RequestError(f"the session's name has {len(session)} characters; at most {MAX_SESSION} are allowed")
    return session, any(_flag(values, key) for key in FINAL_KEYS)


def read_salt(metadata: Metadata) -> str:
    """Programs share KV of equal beginnings with those of equal salt only."""
    return next((_text(key, value) for key, value in metadata if key == SALT), "")


def write_usage(usage: Usage, finish_reason: str) -> list[tuple[str, str]]:
    """Trailing metadata: every field of :class:`Usage`, times in seconds, and the finish reason."""
    return [(FINISH, finish_reason)] + [(key_of(k), repr(v)) for k, v in dataclasses.asdict(usage).items()]


def read_usage(metadata: Iterable[tuple[str, str | bytes]]) -> tuple[Usage | None, str | None]:
    """Usage and finish reason from trailing metadata; None from a server that does not send them."""
    values = {key: value for key, value in metadata if isinstance(value, str)}
    kinds: dict[str, Any] = {f.name: float if f.name.endswith("_s") else int for f in dataclasses.fields(Usage)}
    try:
        usage = Usage(**{name: kind(values[key_of(name)]) for name, kind in kinds.items()})
    except (KeyError, ValueError):
        usage = None
    return usage, values.get(FINISH)


def _text(key: str, value: str | bytes) -> str:
    if isinstance(value, str):
        return value
    try:
        return value.decode()
    except UnicodeDecodeError:
        raise RequestError(f"metadata {key} is not UTF-8") from None


def _flag(values: Mapping[str, str], key: str) -> bool:
    text = values.get(key, "false").lower()
    if text not in ("true", "false"):
        raise RequestError(f"metadata {key} is {text[:60]!r}; it must be true or false")
    return text == "true"
