"""Reads of a call beside its body: the caller, the tenant, and the session."""

from __future__ import annotations

from fastapi import Request

from astraea_jax.errors import RequestError, Unauthorized
from astraea_jax.frontends.http.door import Door
from astraea_jax.frontends.http.tenants import Tenant, presented_key

SESSION_HEADERS = ("x-session-id", "x-dynamo-session-id", "x-claude-code-session-id", "thread-id", "session-id")
"""Headers by which clients already name a session; the first that is there and not empty counts."""
FINAL_HEADERS = ("x-session-final", "x-dynamo-session-final")
SALT_HEADER = "x-cache-salt"


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


def session_of(request: Request, session: str | None = None) -> tuple[str | None, bool]:
    """Return the name of a call's session, and whether its program ends with it.

    Args:
        request: the call.
        session: the name in its body, which counts more than a header's.

    Raises:
        RequestError: a header is not what it may be.
    """
    named = session or next((value for name in SESSION_HEADERS if (value := request.headers.get(name))), None)
    final = next((value for name in FINAL_HEADERS if (value := request.headers.get(name))), "false").lower()
    if final not in ("true", "false"):
        raise RequestError(f"header {FINAL_HEADERS[0]} is {final[:60]!r}; it must be true or false")
    return named, final == "true"
