"""Shortest job first, highest response ratio next, and shortest remaining program first."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..policy import Policy, Pressure
from ..program import Request


class SJF(Policy):
    """Serves the request with the least predicted model time first; not preemptive."""

    def features(self, request: Request) -> Sequence[float]:
        return (self.predict.request_s(request),)


class HRRN(Policy):
    """Highest response ratio next (Brinch Hansen 1971) by request: ``(W + T) / T``, not preemptive."""

    columns = 2

    def features(self, request: Request) -> Sequence[float]:
        return request.queued, max(1e-6, self.predict.request_s(request))

    def scores(self, features: np.ndarray, now: float, pressure: Pressure) -> np.ndarray:
        scores: np.ndarray = (features[:, 0] - now) / features[:, 1]
        return scores


class SRPT(Policy):
    """Serves the program with the least model time left first; told by an oracle, it shows how far an order can get."""

    def features(self, request: Request) -> Sequence[float]:
        return (self.predict.remaining_s(request),)
