"""Reads of a call what all APIs share: the caller, the tenant, and the program that it belongs to."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypedDict

from fastapi import Request

from astraea_jax.errors import RequestError, Unauthorized
from astraea_jax.frontends.hints import Hints, read_hints
from astraea_jax.frontends.http.agent_fields import AgentFields
from astraea_jax.frontends.http.door import Door
from astraea_jax.frontends.http.tenants import Tenant, presented_key
from astraea_jax.frontends.identity import identify

SALT_HEADER = "x-cache-salt"
REPORT_HEADER = "x-astraea-report"
"""``true`` asks for an account of what was reused, in the usage of the answer."""


class ProgramFields(TypedDict):
    """Fields of :class:`.turns.Request` that say which program a request belongs to, and what is known of it."""

    session: str | None
    parent: str | None
    final: bool
    hints: Hints
    report: bool


def door_of(request: Request) -> Door:
    """Return the door that the app goes through to its engine."""
    door: Door = request.app.state.door
    return door


def tenant_of(request: Request, salt: str | None = None) -> Tenant:
    """Return the tenant of a call.

    Args:
        request: the call.
        salt: the cache salt in its body, which counts less than that of its header, which a gateway sets.

    Raises:
        Unauthorized, RequestError: see :meth:`Keys.tenant`.
    """
    headers = request.headers
    key = presented_key(headers.get("authorization"), headers.get("x-api-key"))
    address = request.client.host if request.client else "unknown"
    tenant: Tenant = request.app.state.keys.tenant(key, address, headers.get(SALT_HEADER) or salt or "")
    return tenant


def administrator(request: Request) -> Tenant:
    """Return the tenant of a call that an administrator makes; a dependency of routes that are open to nobody else.

    Raises:
        Unauthorized: the key is not an administrator's.
    """
    tenant = tenant_of(request)
    if not tenant.admin:
        raise Unauthorized("this needs the admin key")
    return tenant


def program_of(
    request: Request, body: AgentFields, *, user_id: str | None = None, ttls: Iterable[str] = ()
) -> ProgramFields:
    """Return what a call says about its program.

    Args:
        request: the call.
        body: its body.
        user_id: Anthropic's ``metadata.user_id``.
        ttls: lifetimes at parts of the prompt, in Anthropic's API.

    Raises:
        RequestError: a header is not what it may be.
    """
    identity = identify(
        request.headers,
        session_id=body.session_id,
        parent_session_id=body.parent_session_id,
        prompt_cache_key=body.prompt_cache_key,
        user_id=user_id,
    )
    asked = request.headers.get(REPORT_HEADER, "false").lower()
    if asked not in ("true", "false", "1", "0"):
        raise RequestError(f"header {REPORT_HEADER} is {asked[:60]!r}; it must be true or false")
    return ProgramFields(
        session=identity.session,
        parent=identity.parent,
        final=identity.final,
        hints=read_hints(body, ttls),
        report=body.astraea_report or asked in ("true", "1"),
    )
