"""Program-level attained service (PLAS) of Autellix, arXiv 2502.13965.

A call's priority is the service its program has received, discretised into queues with growing quanta and first come,
first served inside; a program whose share of waiting grows past ``BETA`` goes to the first queue.

The paper leaves the number of queues, the quanta and beta open. Ours: quanta double from 2,048 computed tokens, eight
queues, beta 20. Service counts computed tokens, prefill that was cached left out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from ..policy import CLASS, Policy, Pressure
from ..program import Request

QUEUES = 8
QUANTUM = 2048.0
"""Computed tokens that the first queue allows; each later one twice as many."""
BETA = 20.0
"""(waited + ran) / ran from which a program counts as starving."""


def queue_of(service: float) -> int:
    """Queue of a program that has received ``service`` tokens."""
    return min(QUEUES - 1, int(math.log2(service / QUANTUM + 1)))


class PLAS(Policy):
    columns = 4

    def features(self, request: Request) -> Sequence[float]:
        job = request.program.job
        return queue_of(job.service), request.submitted, request.queued - job.waited_s, job.ran_s

    def scores(self, features: np.ndarray, now: float, pressure: Pressure) -> np.ndarray:
        queue, submitted, waiting_since, ran = features.T
        step = self.predict.steps.mean_step_s
        starving = now - waiting_since >= (BETA - 1) * np.maximum(ran, step)
        return np.where(starving, 0.0, queue) * CLASS + submitted
