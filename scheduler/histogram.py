"""Counts of a quantity by fixed buckets: bounded memory, and the cost of a search for each observation."""

from __future__ import annotations

import bisect
from collections.abc import Sequence


class Histogram:
    """Counts of a quantity's values up to each of some bounds. One thread adds, any thread reads.

    Args:
        bounds: upper bounds of the buckets, rising; what lies beyond the last has a bucket of its own.
    """

    def __init__(self, bounds: Sequence[float]):
        self.bounds = tuple(bounds)
        self.counts = [0] * (len(self.bounds) + 1)
        """Observations by bucket."""
        self.sum = 0.0

    def add(self, value: float, times: int = 1) -> None:
        """Count a value, or several equal ones."""
        self.counts[bisect.bisect_left(self.bounds, value)] += times
        self.sum += value * times
