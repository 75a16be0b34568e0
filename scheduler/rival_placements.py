"""Rules of placement of other systems, to compare with: each with its source, and as near to it as a router can be.

What a system learns from its cache index, we take from the program's home: the tokens that are computed there. Ties
are broken at random, as schedulers of Kubernetes do, or else the first replica would get all programs of a quiet fleet.
"""

from __future__ import annotations

import random
from bisect import bisect_right
from collections.abc import Callable, Mapping
from zlib import crc32

import numpy as np

from .placement import GUESSED_PREFILL_S, Fleet, Rule, Segment, missing, place


class Rival:
    """A rule that breaks ties at random.

    Args:
        seed: of that.
    """

    def __init__(self, seed: int = 0):
        self._rng = random.Random(seed)

    def __call__(self, segment: Segment, fleet: Fleet, allowed: np.ndarray) -> int:
        raise NotImplementedError

    def least(self, column: np.ndarray, allowed: np.ndarray) -> int:
        """One of the replicas ``allowed [R]`` with the least of ``column [R]``."""
        among = np.where(allowed, column, np.inf)
        return int(self._rng.choice(np.flatnonzero(among == among.min()).tolist()))


class LeastBusy(Rival):
    """The replica with the fewest requests in progress, wherever the program has been."""

    def __call__(self, segment: Segment, fleet: Fleet, allowed: np.ndarray) -> int:
        return self.least(fleet.requests, allowed)


class Sticky(LeastBusy):
    """The shortest queue for a new program, which then stays there for ever: what ``Replicas`` did before."""

    def __call__(self, segment: Segment, fleet: Fleet, allowed: np.ndarray) -> int:
        home = segment.home
        return home if home is not None and allowed[home] else super().__call__(segment, fleet, allowed)


class PowerOfTwo(Rival):
    """The shorter queue of two random replicas (Mitzenmacher 2001), the default of Ray Serve; blind to programs."""

    def __call__(self, segment: Segment, fleet: Fleet, allowed: np.ndarray) -> int:
        indices = np.flatnonzero(allowed).tolist()
        two = np.zeros_like(allowed)
        two[self._rng.sample(indices, min(2, len(indices)))] = True
        return self.least(fleet.requests, two)


class ConsistentHash(Rival):
    """A ring of hashes of programs (Karger et al. 1997), as Ray Serve's ConsistentHashRouter: affinity without load."""

    POINTS = 100
    """Points of a replica on the ring, as many as Ray Serve gives it."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__(seed)
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


class StickyUntilSaturated(Rival):
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
        if warm.any():
            backlog = fleet.fresh * fleet.of_reports("prefill_s", GUESSED_PREFILL_S)
            if not cold.any() or backlog[warm].min() - backlog[cold].min() <= self.PENALTY_S:
                allowed = warm
        return self.least(fleet.fresh + fresh, allowed)


class LMetric(Rival):
    """The least tokens to prefill times the batch with the request in it (LMetric, arXiv 2603.15202, OSDI 2026)."""

    def __call__(self, segment: Segment, fleet: Fleet, allowed: np.ndarray) -> int:
        return self.least(missing(segment, fleet) * (fleet.requests + 1), allowed)


class Autellix(Rival):
    """Prompts of up to 2,048 tokens to the least loaded engine, others home (Autellix, arXiv 2502.13965)."""

    SHORT = 2048

    def __call__(self, segment: Segment, fleet: Fleet, allowed: np.ndarray) -> int:
        home = segment.home
        if segment.tokens > self.SHORT and home is not None and allowed[home]:
            return home
        return self.least(fleet.requests, allowed)


RULES: Mapping[str, Callable[[int], Rule]] = {
    "astraea": lambda seed: place,
    "least-busy": LeastBusy,
    "sticky": Sticky,
    "power-of-two": PowerOfTwo,
    "consistent-hash": ConsistentHash,
    "sticky-until-saturated": StickyUntilSaturated,
    "lmetric": LMetric,
    "autellix": Autellix,
}
"""Rules by name, made from a seed."""


def make_rule(name: str, seed: int = 0) -> Rule:
    """Make the rule of that name.

    Raises:
        ValueError: there is none; the message lists them.
    """
    if name not in RULES:
        raise ValueError(f"no rule of placement is called {name!r}; there are {', '.join(RULES)}")
    return RULES[name](seed)
