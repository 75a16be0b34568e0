"""Rules of placement of other systems, to compare with: each with its source, and as near to it as a router can be.

What a system learns from its cache index, we take from the program's home: the tokens that are computed there.
"""

from __future__ import annotations

import random
from bisect import bisect_right
from collections.abc import Mapping
from zlib import crc32

import numpy as np

from .placement import GUESSED_PREFILL_S, Fleet, Rule, Segment, missing, place


def least_busy(segment: Segment, fleet: Fleet, allowed: np.ndarray) -> int:
    """Send every request to the replica with the fewest in progress, wherever its program has been."""
    return _least(fleet.requests, allowed)


def least_busy_home(segment: Segment, fleet: Fleet, allowed: np.ndarray) -> int:
    """Join the shortest queue once, and stay there for ever."""
    home = segment.home
    return home if home is not None and allowed[home] else least_busy(segment, fleet, allowed)


class PowerOfTwo:
    """The shorter queue of two random replicas (Mitzenmacher 2001), the default of Ray Serve; blind to programs."""

    def __init__(self, seed: int = 0):
        self._rng = random.Random(seed)

    def __call__(self, segment: Segment, fleet: Fleet, allowed: np.ndarray) -> int:
        indices = np.flatnonzero(allowed).tolist()
        two = self._rng.sample(indices, min(2, len(indices)))
        return min(two, key=lambda index: (fleet.requests[index], index))


class ConsistentHash:
    """A ring of hashes of programs (Karger et al. 1997), as Ray Serve's ConsistentHashRouter: affinity without load."""

    POINTS = 100
    """Points of a replica on the ring, as many as Ray Serve gives it."""

    def __init__(self) -> None:
        self._ring: list[tuple[int, int]] = []
        self._size = 0

    def __call__(self, segment: Segment, fleet: Fleet, allowed: np.ndarray) -> int:
        if len(allowed) != self._size:
            self._size = len(allowed)
            points = ((i, n) for i in range(self._size) for n in range(self.POINTS))
            self._ring = sorted((crc32(f"{i} {n}".encode()), i) for i, n in points)
        start = bisect_right(self._ring, (segment.key, self._size))
        around = (self._ring[(start + i) % len(self._ring)][1] for i in range(len(self._ring)))
        return next(index for index in around if allowed[index])


class StickyUntilSaturated:
    """llm-d's default since August 2026: cache-warm replicas unless they are saturated, then the least token load.

    Replicas that have at least ``AFFINITY`` of the prompt are warm. Only they are considered, unless the prefill
    backlog of the best of them exceeds that of the best other by ``PENALTY_S``, both at peak throughput. Of those, the
    least uncached tokens in flight win, this request's included. Constants are the router's defaults
    (llm-d-router, prefix-cache-affinity-filter and token-load-scorer; llm-d's blog of 2026-08-04).
    """

    AFFINITY = 0.8
    PENALTY_S = 18.0

    def __call__(self, segment: Segment, fleet: Fleet, allowed: np.ndarray) -> int:
        fresh = missing(segment, fleet)
        warm = allowed & (fresh <= (1 - self.AFFINITY) * segment.tokens)
        cold = allowed & ~warm
        if warm.any() and cold.any():
            backlog = fleet.fresh * fleet.of_reports("prefill_s", GUESSED_PREFILL_S)
            saturated = backlog[warm].min() - backlog[cold].min() > self.PENALTY_S
            allowed = allowed if saturated else warm
        return _least(fleet.fresh + fresh, allowed)


def lmetric(segment: Segment, fleet: Fleet, allowed: np.ndarray) -> int:
    """Minimise the tokens to prefill times the batch with the request in it (LMetric, arXiv 2603.15202, OSDI 2026)."""
    return _least(missing(segment, fleet) * (fleet.requests + 1), allowed)


def autellix(segment: Segment, fleet: Fleet, allowed: np.ndarray) -> int:
    """Send prompts of up to 2,048 tokens to the least loaded engine, others home (Autellix, arXiv 2502.13965)."""
    home = segment.home
    if segment.tokens > 2048 and home is not None and allowed[home]:
        return home
    return _least(fleet.requests, allowed)


def _least(column: np.ndarray, allowed: np.ndarray) -> int:
    return int(np.where(allowed, column, np.inf).argmin())


def make_rule(name: str, seed: int = 0) -> Rule:
    """Make the rule of that name.

    Raises:
        ValueError: there is none; the message lists them.
    """
    if name not in RULES:
        raise ValueError(f"no rule of placement is called {name!r}; there are {', '.join(RULES)}")
    rule = RULES[name]
    if rule is PowerOfTwo:
        return PowerOfTwo(seed)
    return rule() if isinstance(rule, type) else rule


RULES: Mapping[str, Rule | type] = {
    "astraea": place,
    "least-busy": least_busy,
    "shortest-queue-once": least_busy_home,
    "power-of-two": PowerOfTwo,
    "consistent-hash": ConsistentHash,
    "sticky-until-saturated": StickyUntilSaturated,
    "lmetric": lmetric,
    "autellix": autellix,
}
"""Rules by name."""
