"""Traffic split between versions: an application takes a share of the sessions that come to the one at ``/``.

Every replica of the application reports the share, so proxies learn of a change within seconds, and nothing is started
anew for it. A session's place in the unit interval follows from its name: it stays with its version, in every proxy,
and a share that grows takes sessions from the others and gives none back.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

from astraea_jax.errors import StartupError, shown

MAIN = "default"
"""Name of the application at ``/``, from which the others take; it is Serve's own default."""


@dataclass(frozen=True)
class Split:
    """What an application takes.

    Raises:
        StartupError: it cannot be.
    """

    share: float
    """Of all sessions, from 0 to 1."""
    route_prefix: str
    """Of the application, such as ``/next``."""

    def __post_init__(self) -> None:
        if not isinstance(self.share, int | float) or not 0 <= self.share <= 1:
            raise StartupError(f"split: share is {shown(self.share)}; it must be a number from 0 to 1")
        prefix = self.route_prefix
        if not isinstance(prefix, str) or not prefix.startswith("/") or prefix.endswith("/"):
            raise StartupError(
                f"split: route_prefix is {shown(prefix)}; it must be that of the application, such as '/next'"
            )

    @classmethod
    def of(cls, config: Mapping[str, Any] | None) -> Split | None:
        """Read ``user_config`` of a deployment.

        Raises:
            StartupError: there is something else in it, or a split that cannot be.
        """
        config = config or {}
        given = config.get("split")
        if set(config) - {"split"} or not isinstance(given, Mapping | None):
            raise StartupError(f"user_config is {shown(config)}; it may have split: {{share, route_prefix}}")
        if given is None:
            return None
        if set(given) != {"share", "route_prefix"}:
            raise StartupError(f"split is {shown(given)}; it must have share and route_prefix")
        return cls(given["share"], given["route_prefix"])


class Splits:
    """The splits that a proxy knows, by application."""

    def __init__(self) -> None:
        self._splits: dict[str, Split] = {}

    def put(self, application: str, split: Split | None) -> None:
        """Learn what an application takes; None: nothing."""
        if split is None:
            self._splits.pop(application, None)
        else:
            self._splits[application] = split

    def choose(self, key: str) -> tuple[str, str] | None:
        """Return the application that takes a session, and its prefix; None: it stays where it has come to.

        Args:
            key: name of the session, with its owner in it, or of a request without one.
        """
        if not self._splits:
            return None
        point = int.from_bytes(blake2b(key.encode("utf-8", "surrogatepass"), digest_size=8).digest()) / 2**64
        for application, split in sorted(self._splits.items()):
            point -= split.share
            if point < 0:
                return application, split.route_prefix
        return None

    def application_of(self, key: str) -> str | None:
        """Return the application that a session's calls over gRPC go to; None: there is only one."""
        if not self._splits:
            return None
        chosen = self.choose(key)
        return MAIN if chosen is None else chosen[0]

    def covers(self, path: str) -> bool:
        """Whether a path is that of one of these applications, and so asks for its version."""
        return any((path + "/").startswith(split.route_prefix + "/") for split in self._splits.values())


SPLITS = Splits()
"""Those of this process."""


def learn(application: str, split: Mapping[str, Any] | None) -> None:
    """Learn in this process what an application takes, of what its replicas report."""
    SPLITS.put(application, None if split is None else Split(**split))
