"""Shortest job first, highest response ratio next, and shortest remaining program first."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..policy import Policy, Pressure
from ..program import Segment


class SJF(Policy):
    """The segment with the least predicted model time first; not preemptive."""

    def features(self, segment: Segment) -> Sequence[float]:
        return (self.predict.segment_s(segment),)


class HRRN(Policy):
    """Highest response ratio next (Brinch Hansen 1971) by segment: ``(W + T) / T``, not preemptive."""

    columns = 2

    def features(self, segment: Segment) -> Sequence[float]:
        return segment.queued, max(1e-6, self.predict.segment_s(segment))

    def scores(self, features: np.ndarray, now: float, pressure: Pressure) -> np.ndarray:
        scores: np.ndarray = (features[:, 0] - now) / features[:, 1]
        return scores


class SRPT(Policy):
    """The program with the least model time left first: with an oracle, how far an order can get. For studies only."""

    def features(self, segment: Segment) -> Sequence[float]:
        return (self.predict.remaining_s(segment),)
