"""Names under which replicas and routers speak of sessions: digests, so reports are small, and have no key or address.

Sessions of equal names and different owners have nothing in common, here as everywhere. A proxy knows who a caller is
to a server that has keys, and to one without; which of the two it is, replicas report.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import blake2b

from astraea_jax.frontends.http.tenants import MAX_SALT, owner_by_key, owner_without_key, presented_key

SALT = "x-cache-salt"
"""Header, and key of metadata. A salt in the body counts less, and no proxy reads that."""


@dataclass(frozen=True)
class Caller:
    """The owner of the sessions that a request names, as a server with keys and one without would call it."""

    by_key: str | None
    """Owner where callers have keys; None: it has come without one."""
    without_key: str
    """Owner where they have none."""

    def owner(self, keyed: bool) -> str:
        """Return the owner, as :class:`~..http.tenants.Keys` names it.

        (Where only administrators have keys, they are taken for callers without one.)
        """
        return self.by_key if keyed and self.by_key is not None else self.without_key


NOBODY = Caller(None, "")
"""The caller of a request that no proxy of ours has seen."""


def caller_of(headers: Mapping[str, str], address: str) -> Caller:
    """Return the caller of a request.

    Args:
        headers: of HTTP, or metadata of gRPC; keys in small letters.
        address: of the client.
    """
    key = presented_key(headers.get("authorization"), headers.get("x-api-key"))
    salt = (headers.get(SALT) or "")[: MAX_SALT + 1]  # a longer one is refused, but not before it is remembered here
    without_key = owner_without_key(address, salt)
    return Caller(None if key is None else owner_by_key(key), without_key)


def name_of(owner: str, session: str) -> str:
    """Return the name of a session between replicas and routers: 16 hex digits."""
    key = blake2b(_bytes(owner), digest_size=32).digest()
    return blake2b(_bytes(session), digest_size=8, key=key).hexdigest()


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")
