"""The HTTP front door as command-line flags."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from absl import flags

from astraea_jax.agents import formats
from astraea_jax.agents.tools import Tool
from astraea_jax.engine.grammar import GrammarCompiler
from astraea_jax.engine.interface import Serving
from astraea_jax.errors import StartupError
from astraea_jax.frontends.http.app import make_app
from astraea_jax.frontends.http.connections import ConnectionLimits
from astraea_jax.frontends.http.door import Door
from astraea_jax.frontends.http.guard import Bounds
from astraea_jax.frontends.http.hosts import AllowedHosts, host_name, is_loopback
from astraea_jax.frontends.http.server import Server
from astraea_jax.frontends.http.tenants import Keys
from astraea_jax.frontends.http.waiting import Limits
from astraea_jax.frontends.operating import Operator
from astraea_jax.frontends.programs import Programs
from astraea_jax.frontends.tls import Tls
from astraea_jax.models.config import CheckpointError
from astraea_jax.models.config_file import read_json

SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
"""Fields of ``generation_config.json`` that are defaults for clients."""


def http_flags() -> Callable[..., Server]:
    """Define the flags; return a function that makes a server of their values.

    The function takes an engine, the name and the folder of its model (None: random weights); and by keyword the keys,
    what is there for the operator, what encrypts, the tools that the server calls itself, what compiles grammars, and
    what begins programs.
    """
    flags.DEFINE_integer("http_port", 8000, "Port of HTTP; 0 takes a free one, named in a line.", 0, 65535)
    flags.DEFINE_multi_string(
        "served_model_name", [], "A name that clients may give the model, besides its own. May come several times."
    )
    flags.DEFINE_enum(
        "call_format", None, list(formats.NAMES), "How the model writes tool calls; by default as its template shows."
    )
    flags.DEFINE_integer("max_body_bytes", Bounds.body_bytes, "Bytes of an HTTP request's body.", 1024)
    flags.DEFINE_float(
        "max_wait_s", Limits.wait_s, "Seconds until a request's first token; beyond that it gets 429.", 0.001, 1e6
    )
    flags.DEFINE_integer(
        "max_connections", None, "HTTP connections of one address; by default half of what open files allow.", 1
    )
    flags.DEFINE_list(
        "allowed_hosts",
        None,
        "Names, parted by commas, by which HTTP requests may call the server, besides its address; * for any. By "
        "default a server on loopback without --api_key answers to names of loopback only, and any other to all.",
    )
    _show("http_port", "served_model_name", "call_format", "max_body_bytes", "max_wait_s", "max_connections")
    _show("allowed_hosts")

    def server(
        engine: Serving,
        model: str,
        folder: Path | None,
        *,
        keys: Keys,
        operator: Operator,
        tls: Tls | None,
        tools: Sequence[Tool],
        grammars: GrammarCompiler,
        programs: Programs,
    ) -> Server:
        chosen = flags.FLAGS
        door = Door(
            engine,
            formats.choose(engine.tokenizer, chosen.call_format),
            [*chosen.served_model_name, model],
            Limits(wait_s=chosen.max_wait_s),
            sampling_defaults(folder) if folder else None,
            tools,
            grammars,
            programs,
        )
        hosts = allowed_hosts(chosen.allowed_hosts, chosen.host, keys)
        app = make_app(door, keys, Bounds(body_bytes=chosen.max_body_bytes), operator, hosts)
        limits = ConnectionLimits(per_address=chosen.max_connections)
        return Server(app, door, chosen.host, chosen.http_port, limits, tls)

    return server


def key_flags() -> Callable[[], Keys]:
    """Define the flags of keys, which hold for both doors; return a function that makes :class:`Keys` of them."""
    flags.DEFINE_multi_string("api_key", [], "A key that calls need, or @FILE with one on each line; by default none.")
    flags.DEFINE_multi_string("admin_key", [], "A key, or @FILE, that also opens what concerns all tenants.")
    _show("api_key", "admin_key")
    return lambda: Keys.of(flags.FLAGS.api_key, flags.FLAGS.admin_key)


def tls_flags() -> Callable[[], Tls | None]:
    """Define the flags of encryption, which hold for both doors; return a function that makes :class:`Tls` of them.

    The function raises StartupError if the files cannot serve.
    """
    flags.DEFINE_string("tls_cert", None, "Certificate (chain) in PEM format; with --tls_key both doors are encrypted.")
    flags.DEFINE_string("tls_key", None, "Private key of --tls_cert, in PEM format, without a password.")
    flags.DEFINE_string("tls_client_ca", None, "Authority in PEM format; clients need a certificate that it signed.")
    _show("tls_cert", "tls_key", "tls_client_ca")

    def tls() -> Tls | None:
        certificate, key, ca = (flags.FLAGS[name].value for name in ("tls_cert", "tls_key", "tls_client_ca"))
        if certificate and key:
            return Tls(Path(certificate), Path(key), Path(ca) if ca else None)
        if certificate or key or ca:
            raise StartupError("TLS needs both --tls_cert and --tls_key")
        return None

    return tls


def warning(host: str, keys: Keys) -> str | None:
    """Return what an operator must know who listens on ``host`` with these keys, if there is something."""
    if keys.required or is_loopback(host):
        return None
    return f"warning: {host} can be reached from other machines and no --api_key is set: everybody there can use it"


def allowed_hosts(given: Sequence[str] | None, host: str, keys: Keys) -> AllowedHosts:
    """Return the names by which requests may be addressed to a server that listens on ``host``.

    Raises:
        StartupError: one that is given cannot be a name.
    """
    if given is None and (keys.required or not is_loopback(host)):
        return AllowedHosts()
    try:
        return AllowedHosts([host_name(name) for name in given or ()])
    except ValueError as error:
        raise StartupError(f"--allowed_hosts: {error}; give names without http://, such as gpu.example") from None


def sampling_defaults(folder: Path) -> dict[str, Any]:
    """Sampling that a model's ``generation_config.json`` recommends; greedy if it says so.

    Raises:
        StartupError: the file is damaged.
    """
    try:
        given = read_json(folder / "generation_config.json", missing={})
    except CheckpointError as error:
        raise StartupError(str(error)) from error
    defaults = {name: given[name] for name in SAMPLING if isinstance(given.get(name), int | float)}
    return defaults if given.get("do_sample") is not False else {"temperature": 0.0}


def _show(*names: str) -> None:
    """Let ``--help`` show these flags, as if the program itself had defined them."""
    for name in names:
        flags.FLAGS.register_key_flag_for_module(sys.argv[0], flags.FLAGS[name])
