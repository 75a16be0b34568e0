"""Names under which a server may be called, so that no stranger's web page reaches it through a browser.

A server on loopback without keys trusts whoever is on its machine, and a browser there runs pages of strangers. Such a
page may give its own name the address 127.0.0.1 (DNS rebinding), and is then free to call the server and to read what
it answers; but the browser tells that name, in ``Host``. A page that calls the server from its own place is told by
``Origin``. Jupyter and Ollama refuse both in this way.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from astraea_jax.frontends.http.errors import HostRefused

ANY = "*"
_HOST = re.compile(r"(?:\[(?P<v6>[^\[\]]*)\]|(?P<name>[^\[\]:]*))(?::\d{0,5})?")
_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://(?P<host>[^/?#@]+)", re.IGNORECASE)


@dataclass(frozen=True)
class AllowedHosts:
    """Decides whether a request may come by the name that it is addressed to."""

    names: Sequence[str] | None = None
    """Allowed besides those of loopback and the address that a connection has come to; ``*`` allows all. None: nothing
    is checked."""

    def check(self, hosts: Iterable[str], origins: Iterable[str], address: str | None) -> None:
        """Refuse a request of a stranger's page. Clients that are no browsers may leave out both headers.

        Args:
            hosts: its ``Host`` headers.
            origins: its ``Origin`` headers.
            address: own address of its connection.

        Raises:
            HostRefused: it is not meant for this server.
        """
        if self.names is None or ANY in self.names:
            return
        for host in hosts:
            if not self._allows(_name(host), address):
                raise HostRefused(f"the server is not called {host[:100]!r}; --allowed_hosts allows a further name")
        for origin in origins:
            found = _ORIGIN.fullmatch(origin)
            if not self._allows(_name(found["host"]) if found else None, address):
                raise HostRefused(
                    f"pages of {origin[:100]!r} may not use the server; --allowed_hosts allows a further name"
                )

    def _allows(self, name: str | None, address: str | None) -> bool:
        if name is None:
            return False
        return name in (self.names or ()) or is_loopback(name) or (address is not None and _same(name, address))


def is_loopback(name: str) -> bool:
    """Whether a name or an address always means this machine."""
    ip = _address(name)
    if ip is None:
        return name == "localhost" or name.endswith(".localhost")  # RFC 6761: nobody can own such a name
    return ip.is_loopback


def host_name(text: str) -> str:
    """Return a name for :class:`AllowedHosts`, of what an operator has written: in lower case, without a port.

    Raises:
        ValueError: it is none.
    """
    if text == ANY:
        return text
    if not (name := text.lower() if _address(text) else _name(text)):
        raise ValueError(f"{text!r} is no name of a host")
    return name


def _name(host: str) -> str | None:
    """Name in a ``Host`` header; None: it is none."""
    found = _HOST.fullmatch(host.strip())
    if not found:
        return None
    name = found["v6"] if found["name"] is None else found["name"]
    return name.lower().removesuffix(".")


def _address(name: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        ip = ipaddress.ip_address(name)
    except ValueError:
        return None
    return getattr(ip, "ipv4_mapped", None) or ip


def _same(name: str, address: str) -> bool:
    ip = _address(name)
    return ip is not None and ip == _address(address)
