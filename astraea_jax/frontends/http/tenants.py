"""API keys, and the tenant that each of them stands for. Both front doors use them.

A *tenant* owns sessions and a share of the queue, and shares cached prompts with nobody who has another salt. With
keys, a tenant is a key, whatever connection or salt it comes with. Without keys everybody may call; a tenant is then
a cache salt, or else the address that the door names.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from astraea_jax.engine.events import MAX_NAME
from astraea_jax.errors import RequestError, StartupError, Unauthorized

MAX_SALT = 128
"""Characters of a cache salt that a client chooses; it becomes a part of names, whose length is bounded."""
LEAST_KEY = 8
"""Characters of the shortest key that is taken: a shorter one can be guessed."""


@dataclass(frozen=True)
class Tenant:
    """The party that a request belongs to."""

    owner: str
    """Owner of its sessions, as ``Engine.generate`` takes it."""
    salt: str
    """Cache salt, as ``Engine.generate`` takes it."""
    admin: bool = False
    """Whether it may see and do what concerns all tenants."""


class Keys:
    """The keys of a server. None at all: everybody may call, and nobody is an administrator.

    Args:
        api: keys of tenants.
        admin: keys that open the administrator's routes, and all others.

    Raises:
        StartupError: a key is too short, or is given as both.
    """

    def __init__(self, api: Sequence[str] = (), admin: Sequence[str] = ()):
        if any(len(key) < LEAST_KEY for key in (*api, *admin)):
            raise StartupError(f"an API key is shorter than {LEAST_KEY} characters; choose a long random one")
        if set(api) & set(admin):
            raise StartupError("a key is given as API key and as admin key; they must differ")
        self._known = [(_digest(key), False) for key in api] + [(_digest(key), True) for key in admin]
        self._required, self.administered = bool(api), bool(admin)

    @classmethod
    def of(cls, api: Sequence[str], admin: Sequence[str]) -> Keys:
        """Make them of flags' values, of which one that begins with ``@`` names a file with a key on each line.

        Raises:
            StartupError: a file cannot be read, or a key cannot be one.
        """
        return cls(_read(api), _read(admin))

    @property
    def required(self) -> bool:
        """Whether callers need a key."""
        return self._required

    def tenant(self, presented: str | None, address: str, salt: str = "") -> Tenant:
        """Return the tenant of a call.

        Args:
            presented: the key that came with it, if any.
            address: of the caller; names the tenant if neither a key nor a salt does.
            salt: the cache salt that came with it, if any. It parts the cache of a key further, never joins two.

        Raises:
            Unauthorized: the key is missing or unknown.
            RequestError: the salt is too long.
        """
        if len(salt) > MAX_SALT:
            raise RequestError(f"the cache salt has {len(salt)} characters; at most {MAX_SALT} are allowed")
        digest = _digest(presented or "")
        found: tuple[bytes, bool] | None = None
        for known in self._known:  # all of them, so that the time tells nothing
            if hmac.compare_digest(known[0], digest):
                found = known
        if found is not None:
            name = owner_by_key(presented or "")
            return Tenant(name, f"{name}:{salt}", admin=found[1])
        if self._required:
            raise Unauthorized("the API key is unknown" if presented else "an API key is needed: Authorization: Bearer")
        return Tenant(owner_without_key(address, salt), salt)


def owner_by_key(key: str) -> str:
    """Return the owner that a key stands for."""
    return f"key:{_digest(key).hex()[:32]}"


def owner_without_key(address: str, salt: str) -> str:
    """Return the owner of a caller without a key: that of its cache salt, or else its address."""
    return f"salt:{salt}" if salt else f"peer:{address}"[:MAX_NAME]


def presented_key(authorization: str | None, api_key: str | None) -> str | None:
    """Return the key of a call: that of ``Authorization: Bearer …``, or else that of ``x-api-key``."""
    scheme, _, key = (authorization or "").partition(" ")
    if scheme.lower() == "bearer" and key.strip():
        return key.strip()
    return api_key or None


def _read(given: Sequence[str]) -> list[str]:
    keys: list[str] = []
    for value in given:
        if not value.startswith("@"):
            keys.append(value)
            continue
        try:
            lines = Path(value[1:]).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise StartupError(f"the file of API keys {value[1:]} cannot be read: {error}") from None
        keys += [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    return keys


def _digest(key: str) -> bytes:
    """Digest of a key: of equal length whatever the key is, so that a comparison tells nothing about it."""
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()
