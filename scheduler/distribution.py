"""The latest observations of a quantity, as a distribution."""

from __future__ import annotations

import bisect
from collections import deque

WINDOW = 1024
"""Recent observations that a distribution keeps: a guess."""
ENOUGH = 30
"""Observations below which a narrower distribution gives way to a wider one: the usual rule of thumb."""


class Distribution:
    """The last ``WINDOW`` observations of a quantity."""

    def __init__(self) -> None:
        self._recent: deque[float] = deque()
        self._sorted: list[float] = []
        self._sum = 0.0

    def __len__(self) -> int:
        return len(self._recent)

    def add(self, value: float) -> None:
        self._recent.append(value)
        bisect.insort(self._sorted, value)
        self._sum += value
        if len(self._recent) > WINDOW:
            oldest = self._recent.popleft()
            del self._sorted[bisect.bisect_left(self._sorted, oldest)]
            self._sum -= oldest

    @property
    def values(self) -> list[float]:
        """The observations in rising order."""
        return self._sorted

    def mean(self, default: float) -> float:
        return self._sum / len(self._recent) if self._recent else default

    def quantile(self, q: float, default: float) -> float:
        return self._sorted[min(len(self._sorted) - 1, int(q * len(self._sorted)))] if self._sorted else default

    def mean_beyond(self, elapsed: float, default: float) -> float:
        """Predict the remainder of a quantity that has reached ``elapsed``.

        It is at least as much again if nothing seen went further.
        """
        beyond = self._sorted[bisect.bisect_right(self._sorted, elapsed) :]
        return sum(beyond) / len(beyond) - elapsed if beyond else max(elapsed, default)

    def median_beyond(self, elapsed: float, default: float) -> float:
        """Median remainder of a quantity that has reached ``elapsed``; the same if nothing seen went further."""
        beyond = self._sorted[bisect.bisect_right(self._sorted, elapsed) :]
        return beyond[len(beyond) // 2] - elapsed if beyond else max(elapsed, default)
