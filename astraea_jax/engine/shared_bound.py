"""A bound on what waits, which no client can fill alone."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Mapping

RESERVE = 4
"""A fourth of what may wait is kept for clients who have nothing there, or less than their share of all of it."""


class SharedBound:
    """Counts what waits, by client. Not safe between threads.

    Args:
        most: that may wait.
        weights: of clients' shares; who is not named has 1.
    """

    def __init__(self, most: int, weights: Mapping[Hashable, float] | None = None):
        self._most, self._weights = most, weights or {}
        self._of: Counter[str] = Counter()
        self.total = 0
        """The amount that waits, of all clients together."""

    def __getitem__(self, owner: str) -> int:
        """Return the amount that waits of a client."""
        return self._of[owner]

    def has_room(self, owner: str, amount: int) -> bool:
        """Whether so much more of a client may wait: in the last quarter only its first, or what its share allows."""
        after, own = self.total + amount, self._of[owner]
        if after > self._most or not own or after <= self._most - self._most // RESERVE:
            return after <= self._most
        return own + amount <= self._share(owner)

    def refusal(self, owner: str, amount: int, what: str) -> str:
        """Say why so much more of a client has no room; ``what`` names in the plural what waits."""
        own, allowed = self._of[owner], self._most
        if self.total + amount > allowed:
            theirs = f"; tenant {shown(owner)} has {own} of them" if owner else ""
            return f"{self.total} {what} are waiting, of {allowed} allowed in all{theirs}; try again later"
        name, allowed = shown(owner), max(1, math.floor(self._share(owner)))
        return (
            f"tenant {name} has {own} {what} waiting, of {allowed} allowed; {self.total} wait in all; try again later"
        )

    def _share(self, owner: str) -> float:
        """Return the amount that a client may have waiting in any case."""
        weigh = self._weights.get
        weights = 1.0 + sum(weigh(other, 1.0) for other in self._of)  # one more may come
        return self._most * weigh(owner, 1.0) / weights

    def add(self, owner: str, amount: int) -> None:
        """Count more; what is negative waits no longer."""
        self.total += amount
        self._of[owner] += amount
        if not self._of[owner]:
            del self._of[owner]

    def clear(self) -> None:
        """Nothing waits any more."""
        self._of.clear()
        self.total = 0


def shown(owner: str) -> str:
    """Return an owner's name as clients may see it: without its cache salt, a secret that a gateway may have set."""
    return "salt:…" if owner.startswith("salt:") else owner
