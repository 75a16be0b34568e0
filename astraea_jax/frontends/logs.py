"""Logs of the process: text or JSON, requests by their ids, and never a prompt or an answer."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

import absl.logging
from absl import flags

from astraea_jax.engine.generation import Usage

ACCESS = logging.getLogger("astraea_jax.access")
"""One record for every request that a door has answered; off until :func:`configure` says otherwise."""
ACCESS.setLevel(logging.CRITICAL)
_OWN = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


class JsonFormatter(logging.Formatter):
    """Writes a record as one line of JSON; fields given as ``extra`` stand beside the message."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        line |= {name: value for name, value in vars(record).items() if name not in _OWN}
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def log_flags() -> Callable[[logging.Handler], None]:
    """Define the flags; return a function that sets up a handler as they say."""
    flags.DEFINE_enum("log_format", "text", ["text", "json"], "How log records are written.")
    flags.DEFINE_bool("access_log", False, "Log every request that was answered, without prompts and answers.")
    for name in ("log_format", "access_log"):
        flags.FLAGS.register_key_flag_for_module(sys.argv[0], flags.FLAGS[name])

    def set_up(handler: logging.Handler) -> None:
        detailed = absl.logging.get_verbosity() >= absl.logging.DEBUG
        configure(handler, as_json=flags.FLAGS.log_format == "json", access=flags.FLAGS.access_log, detailed=detailed)

    return set_up


def configure(handler: logging.Handler, *, as_json: bool, access: bool, detailed: bool = False) -> None:
    """Let a handler write JSON, or what it writes by itself; with or without the access log, which may be detailed."""
    if as_json:
        handler.setFormatter(JsonFormatter())
    shown = logging.DEBUG if detailed else logging.INFO
    ACCESS.setLevel(shown if access else logging.CRITICAL)


def answered(
    door: str,
    method: str,
    path: str,
    status: int | str,
    request_id: str,
    client: str,
    took_s: float,
    usage: Usage | None = None,
) -> None:
    """Log a request that a door has answered.

    Args:
        door: ``"http"`` or ``"grpc"``.
        method: of HTTP; of gRPC the kind of call.
        path: without a query; what a client has made up is cut and made printable.
        status: of HTTP or gRPC.
        request_id: by which the client knows it.
        client: its address.
        took_s: until the answer was sent whole.
        usage: tokens and times of the request to the model, if it is known here.
    """
    if not ACCESS.isEnabledFor(logging.INFO):
        return
    shown = path[:200].encode("ascii", "backslashreplace").decode()
    shown = "".join(letter if letter.isprintable() else "?" for letter in shown)
    tokens = "" if usage is None else f", {usage.prompt_tokens} + {usage.output_tokens} tokens"
    ACCESS.info(
        "%s %s %s %s in %.3f s, request %s of %s%s",
        *(door, method, shown, status, took_s, request_id, client, tokens),
        extra={
            "door": door,
            "method": method,
            "path": shown,
            "status": status,
            "seconds": round(took_s, 6),
            "request_id": request_id,
            "client": client,
            **({} if usage is None else asdict(usage)),
        },
    )


def resumed(report: Mapping[str, Any]) -> None:
    """Log how a turn went on, at debug level: what was reused, why not more, and how its wait came out."""
    ACCESS.debug("turn %s", json.dumps(report, default=str), extra={"turn": report})
