"""Reads and writes the gRPC metadata beside JetStream's messages: sampling, session, tenant, and how a request went.

JetStream's messages have no fields for these; its servers ignore the keys, and its clients need not send them. A key
that counts once and comes twice with different values is refused: what one hop has set, the next cannot replace.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from astraea_jax.engine.generation import Usage
from astraea_jax.engine.sampling import MAX_BIASES, SamplingParams
from astraea_jax.errors import RequestError
from astraea_jax.frontends.http.guard import REQUEST_ID
from astraea_jax.frontends.http.tenants import Keys, Tenant, presented_key
from astraea_jax.frontends.identity import FINAL, NAMINGS, Identity, identify
from astraea_jax.frontends.identity import KEYS as KEYS_OF_SESSIONS
from astraea_jax.scheduler.wait import Resumed, WaitOutcome

Metadata = Sequence[tuple[str, str | bytes]]

SALT = "x-cache-salt"
KEYS = ("authorization", "x-api-key")
"""``Bearer`` and an API key, or the key alone."""

SAMPLING = {
    "temperature": float,
    "top_p": float,
    "top_k": int,
    "min_p": float,
    "seed": int,
    "presence_penalty": float,
    "frequency_penalty": float,
    "repetition_penalty": float,
    "min_tokens": int,
    "logprobs": int,
}
STOPS = ("x-stop", "x-stop-bin")
BIAS = "x-logit-bias"
"""``token:bias`` pairs with commas between them."""
CONSTRAINTS = {"x-json-schema": "json-schema", "x-regex": "regex", "x-grammar": "lark"}
"""Keys of what the text must look like, each with ``-bin`` behind it if it is not ASCII -> kind."""
FINISH = "x-finish-reason"


@dataclass(frozen=True)
class Constraint:
    """A form that the text of a request must have, not compiled yet."""

    kind: str
    """``"json-schema"``, ``"regex"`` or ``"lark"``."""
    source: str


def key_of(field: str) -> str:
    """Metadata key of a field: ``top_p`` -> ``x-top-p``."""
    return f"x-{field.replace('_', '-')}"


NUMBERS_AND_FLAGS = {*map(key_of, SAMPLING), "x-ignore-eos"}


def read_sampling(metadata: Metadata, max_tokens: int) -> SamplingParams:
    """Sampling parameters of a request. Stop strings may come several times, as ``x-stop-bin`` if not ASCII.

    Raises:
        RequestError: a value cannot be read or is out of bounds; names its key.
    """
    values = _single_values(metadata, {*NUMBERS_AND_FLAGS, BIAS})
    given: dict[str, Any] = {}
    for field, kind in SAMPLING.items():
        text = values.get(key_of(field))
        if text is None:
            continue
        try:
            given[field] = kind(text)
        except ValueError:
            raise RequestError(f"metadata {key_of(field)} is {text[:60]!r}; it must be a number") from None
    if BIAS in values:
        given["logit_bias"] = _biases(values[BIAS])
    stops = tuple(_text(key, value) for key, value in metadata if key in STOPS)
    return SamplingParams(max_tokens=max_tokens, stop=stops, ignore_eos=_flag(values, "x-ignore-eos"), **given)


def write_sampling(params: SamplingParams) -> list[tuple[str, str | bytes]]:
    """The metadata that :func:`read_sampling` reads: what differs from the defaults.

    Raises:
        RequestError: a grammar has been compiled, and cannot be sent any more.
    """
    if params.grammar is not None:
        raise RequestError("a compiled grammar cannot be sent over this protocol; send its source as metadata")
    default = SamplingParams()
    pairs: list[tuple[str, str | bytes]] = [
        (key_of(field), repr(value))
        for field in SAMPLING
        if (value := getattr(params, field)) != getattr(default, field)
    ]
    if params.logit_bias:
        pairs.append((BIAS, ",".join(f"{token}:{bias!r}" for token, bias in params.logit_bias)))
    pairs += [("x-stop-bin", stop.encode()) for stop in params.stop]
    return [*pairs, ("x-ignore-eos", "true")] if params.ignore_eos else pairs


def read_constraint(metadata: Metadata) -> Constraint | None:
    """Read the form that the text of a request must have, if it asks for one.

    Raises:
        RequestError: there are two constraints, or one that is no text.
    """
    keys = {f"{key}{ending}": kind for key, kind in CONSTRAINTS.items() for ending in ("", "-bin")}
    values = _single_values(metadata, keys)
    if len(values) > 1:
        raise RequestError(f"metadata has {' and '.join(sorted(values))}, of which only one may constrain a text")
    return next((Constraint(keys[key], source) for key, source in values.items()), None)


def read_identity(metadata: Metadata) -> Identity:
    """The program a request belongs to, as :mod:`~astraea_jax.frontends.identity` has it.

    Raises:
        RequestError: a key comes twice, a name is too long, or the flag is neither true nor false.
    """
    return identify(_single_values([(key.replace("_", "-"), value) for key, value in metadata], KEYS_OF_SESSIONS))


def write_session(session: str | None, final: bool, salt: str) -> list[tuple[str, str | bytes]]:
    """The metadata that :func:`read_identity` and :func:`read_tenant` read.

    Raises:
        RequestError: a name cannot travel as metadata.
    """
    pairs = [] if session is None else [(NAMINGS[0].session, session), (FINAL[0], str(final).lower())]
    if salt:
        pairs.append((SALT, salt))
    for key, value in pairs:
        if not (value.isascii() and value.isprintable() and value == value.strip()):
            raise RequestError(f"{key} is {value[:60]!r}; it must be printable ASCII without spaces around it")
    return [*pairs]


def read_tenant(metadata: Metadata, peer: str, keys: Keys) -> Tenant:
    """The tenant of a call: that of its key, if the server has keys; else its cache salt, or its connection ``peer``.

    Raises:
        Unauthorized: a key is needed, and the one that came is missing or unknown.
        RequestError: there are two salts or keys, or a salt that is too long.
    """
    values = _single_values(metadata, (SALT, *KEYS))
    return keys.tenant(presented_key(*(values.get(key) for key in KEYS)), peer, values.get(SALT, ""))


def read_request_id(metadata: Metadata) -> str:
    """The id that a client has given its call as ``x-request-id``, for the log; ``"-"`` if there is none."""
    given = next((value for key, value in metadata if key == "x-request-id"), "")
    return given if isinstance(given, str) and REQUEST_ID.fullmatch(given) else "-"


def write_usage(usage: Usage, finish_reason: str) -> list[tuple[str, str]]:
    """Trailing metadata: every field of :class:`Usage`, times in seconds, and the finish reason.

    Fields of its parts are named after both: ``x-wait-actual-s``.
    """
    pairs = [(FINISH, finish_reason)]
    for name, value in dataclasses.asdict(usage).items():
        flat = {f"{name}_{inner}": of for inner, of in value.items()} if isinstance(value, dict) else {name: value}
        pairs += [(key_of(key), str(of)) for key, of in flat.items() if of is not None]
    return pairs


def read_usage(metadata: Iterable[tuple[str, str | bytes]]) -> tuple[Usage | None, str | None]:
    """Usage and finish reason from trailing metadata; None from a server that does not send them."""
    values = {key: value for key, value in metadata if isinstance(value, str)}
    try:
        wait = WaitOutcome(**_fields(WaitOutcome, values, "wait_")) if key_of("wait_actual_s") in values else None
        resumed = Resumed(**_fields(Resumed, values, "resumed_"))
        usage = Usage(**_fields(Usage, values), wait=wait, resumed=resumed)
    except (TypeError, ValueError):
        usage = None
    return usage, values.get(FINISH)


def _fields(of: type[Any], values: Mapping[str, str], prefix: str = "") -> dict[str, Any]:
    """Fields of a dataclass, as far as they have come: seconds, texts and counts."""
    found: dict[str, Any] = {}
    for name, kind in typing.get_type_hints(of).items():
        value = values.get(key_of(prefix + name))
        if value is not None:
            found[name] = value if kind in (str, str | None) else kind(value)
    return found


def _single_values(metadata: Metadata, keys: Collection[str]) -> dict[str, str]:
    values: dict[str, str] = {}
    for key, value in metadata:
        if key in keys and values.setdefault(key, text := _text(key, value)) != text:
            raise RequestError(f"metadata {key} is given twice with different values")
    return values


def _text(key: str, value: str | bytes) -> str:
    if isinstance(value, str):
        return value
    try:
        return value.decode()
    except UnicodeDecodeError:
        raise RequestError(f"metadata {key} is not UTF-8") from None


def _biases(text: str) -> list[tuple[int, float]]:
    pairs = text.split(",")[: MAX_BIASES + 1]  # one too many is refused together with the others
    try:
        return [(int(token), float(bias)) for token, bias in (pair.split(":") for pair in pairs)]
    except ValueError:
        raise RequestError(
            f"metadata {BIAS} is {text[:60]!r}; it must be token:bias pairs, such as 15:-2.5,7:1"
        ) from None


def _flag(values: Mapping[str, str], key: str) -> bool:
    text = values.get(key, "false").lower()
    if text not in ("true", "false"):
        raise RequestError(f"metadata {key} is {text[:60]!r}; it must be true or false")
    return text == "true"
