"""Responses that later requests may continue or quote: a bounded table, apart for each tenant."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from astraea_jax.frontends.http.errors import NotFound
from astraea_jax.frontends.http.responses_record import Record


@dataclass(frozen=True)
class Stored:
    """A response, and the conversation up to its end."""

    response: dict[str, Any]
    messages: Sequence[dict[str, Any]]
    """Without the instructions, which each request gives anew. Those of earlier responses are shared with them."""
    session: str | None
    """Name of the program that the whole chain is."""
    items: Sequence[dict[str, Any]]
    """Input items of the whole conversation. Those of earlier responses come first and are shared with them."""
    known: int
    """How many items come from earlier responses."""
    size: int
    """Bytes of the conversation and the response, about."""
    record: Record | None = None
    """Its events, if it was written in the background."""

    @property
    def own(self) -> list[dict[str, Any]]:
        """The items that have come with this response."""
        return [*self.items[self.known :], *self.response["output"]]

    @property
    def conversation(self) -> list[dict[str, Any]]:
        """Items of the conversation up to the end of the response."""
        return [*self.items, *self.response["output"]]


class ResponseStore:
    """Keeps responses by tenant and id; the least recently used are forgotten first. Any thread may call it.

    Args:
        ttl_s: seconds after which a response is forgotten.
        max_bytes: of all responses together; one tenant may have an eighth of it.
        max_responses: of one tenant.
        now: the clock, in seconds.
    """

    def __init__(
        self,
        ttl_s: float = 3600.0,
        max_bytes: int = 2**28,
        max_responses: int = 1024,
        now: Callable[[], float] = time.monotonic,
    ):
        self._ttl_s, self._max_bytes, self._max_responses, self._now = ttl_s, max_bytes, max_responses, now
        self._kept: OrderedDict[tuple[str, str], tuple[float, Stored]] = OrderedDict()
        """Owner and id -> when it expires, and the response; what expires first comes first."""
        self._bytes = 0
        self._lock = threading.RLock()
        self._tenants: dict[str, _Share] = {}

    def get(self, owner: str, id: str) -> Stored:
        """Return a response of this tenant, which from now on is kept as if it were new.

        Raises:
            NotFound: it has expired, or has never been there.
        """
        with self._lock:
            self._expire()
            if (owner, id) not in self._kept:
                raise NotFound(
                    f"there is no response {id[:80]!r}: it was not stored, was deleted, or has expired (responses are "
                    f"kept for {self._ttl_s:.0f} s at most); send the whole conversation as input instead"
                )
            _, stored = self._kept.pop((owner, id))
            self._kept[owner, id] = self._now() + self._ttl_s, stored
            ids = self._tenants[owner].ids
            ids[id] = ids.pop(id)
            return stored

    def item(self, owner: str, id: str) -> dict[str, Any]:
        """Return an item of a response of this tenant, which from now on is kept as if it were new.

        Raises:
            NotFound: no response has it.
        """
        with self._lock:
            self._expire()
            share = self._tenants.get(owner)
            for response, item in share.items.get(id, {}).items() if share else ():
                self.get(owner, response)
                return item
            raise NotFound(
                f"there is no item {id[:80]!r}: its response was not stored, was deleted, or has expired; send the "
                "item itself instead"
            )

    def put(self, owner: str, id: str, stored: Stored) -> None:
        """Keep a response; what is too large to be kept at all is not."""
        with self._lock:
            self._expire()
            self._forget(owner, id)
            if stored.size > self._max_bytes // 8:
                return
            while (share := self._tenants.get(owner)) is not None and (
                share.bytes + stored.size > self._max_bytes // 8 or len(share.ids) >= self._max_responses
            ):
                self._forget(owner, next(iter(share.ids)))
            while self._bytes + stored.size > self._max_bytes:
                self._forget(*next(iter(self._kept)))
            share = self._tenants.setdefault(owner, _Share())
            share.ids[id] = None
            share.bytes += stored.size
            for item in stored.own:
                share.items.setdefault(item["id"], {})[id] = item
            self._bytes += stored.size
            self._kept[owner, id] = self._now() + self._ttl_s, stored

    def delete(self, owner: str, id: str) -> None:
        """Forget a response.

        Raises:
            NotFound: there is none.
        """
        with self._lock:
            self.get(owner, id)
            self._forget(owner, id)

    def _expire(self) -> None:
        while self._kept and next(iter(self._kept.values()))[0] <= self._now():
            self._forget(*next(iter(self._kept)))

    def _forget(self, owner: str, id: str) -> None:
        if (found := self._kept.pop((owner, id), None)) is None:
            return
        share = self._tenants[owner]
        del share.ids[id]
        share.bytes -= found[1].size
        for item in found[1].own:
            responses = share.items.get(item["id"], {})
            responses.pop(id, None)
            if not responses:
                share.items.pop(item["id"], None)
        self._bytes -= found[1].size
        if not share.ids:
            del self._tenants[owner]


@dataclass
class _Share:
    """The responses of one tenant."""

    ids: dict[str, None] = field(default_factory=dict)
    """In the order in which they expire."""
    bytes: int = 0
    items: dict[str, dict[str, dict[str, Any]]] = field(default_factory=dict)
    """Id of an item -> ids of the responses that have brought it -> the item."""
