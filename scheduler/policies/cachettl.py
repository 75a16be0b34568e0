"""CacheTTL (arXiv 2511.02230, first called Continuum): KV pinned for a time to live, and program order.

Order: preempted requests, then those that return within their time to live, then by arrival of the program. The times
to live are those of :class:`~..rival_strategies.CacheTTL`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..policy import CLASS, Policy, Pressure
from ..program import Request


class CacheTTL(Policy):
    columns = 2
    residency = "cachettl"

    def features(self, request: Request) -> Sequence[float]:
        pinned = self.strategy.pinned(request.program, request.submitted)
        return 0 if request.preemptions else 1 if pinned else 2, request.program.job.arrival

    def scores(self, features: np.ndarray, now: float, pressure: Pressure) -> np.ndarray:
        scores: np.ndarray = features[:, 0] * CLASS + features[:, 1]
        return scores

    def rank(self, request: Request) -> tuple[float, ...]:
        return (request.program.job.arrival, request.number)
