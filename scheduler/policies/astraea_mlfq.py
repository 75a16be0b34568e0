"""The order of Astraea (arXiv 2512.14142 §4.3), Stateful-MLFQ with enhanced HRRN, under continuous admission.

Every program starts in queue 0. When a request ends, its token cost above the queue's threshold demotes the program by
one queue (compute-intensive); ending in a tool call below it promotes by one (I/O-intensive). A program in the lowest
queue whose response ratio exceeds ``ALPHA`` goes to queue 0. Queues are served in strict priority, and in a queue by
falling ``(W + T) / T`` (equation 4), W the wait the *program* has accumulated and T the predicted time of this
*request*. The paper builds batches in this order, which run to completion (:mod:`.astraea_paper`); here a request
starts as soon as it fits, so that the order is judged without the batches.

The paper's text leaves open: the number of queues, thresholds and alpha (ours: 6, 128 … 640 tokens, quoted second-hand
from an imitation of the paper, and 10); whether token cost counts prefill (ours: what was computed and not cached, and
decode); by how much to promote (one queue); whether waits for tools count in W (they do not). How far later requests
may go before one that does not fit is ours, too: as far as in ``astraea``.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..policy import CLASS, Policy, Pressure
from ..program import Request

THRESHOLDS = (128.0, 256.0, 384.0, 512.0, 640.0)
"""Token cost of a request above which queue k demotes; the last queue has none."""
ALPHA = 10.0
"""Response ratio above which the lowest queue's programs go to the first."""


class AstraeaMLFQ(Policy):
    columns = 3
    backfill = 8
    max_skips = 4

    def features(self, request: Request) -> Sequence[float]:
        waiting_since = request.queued - request.program.job.waited_s
        return request.program.job.level, waiting_since, max(1e-6, self.predict.request_s(request))

    def scores(self, features: np.ndarray, now: float, pressure: Pressure) -> np.ndarray:
        level, waiting_since, t = features.T
        ratio = (now - waiting_since + t) / t
        lowest = level == len(THRESHOLDS)
        return np.where(lowest & (ratio > ALPHA), 0, level) * CLASS - ratio

    def admitted(self, request: Request, now: float) -> None:
        if self.ratio(request, now) > ALPHA and request.program.job.level == len(THRESHOLDS):
            request.program.job.level = 0

    def ratio(self, request: Request, now: float) -> float:
        """Response ratio of a request, equation 4."""
        t = max(1e-6, self.predict.request_s(request))
        return (request.program.job.waited_s + t) / t

    def ended(self, request: Request, now: float) -> None:
        job = request.program.job
        if job.level < len(THRESHOLDS) and request.service > THRESHOLDS[job.level]:
            job.level += 1
        elif not request.final:
            job.level = max(0, job.level - 1)
