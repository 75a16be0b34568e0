"""Algorithm 1 of Astraea (arXiv 2512.14142 §4.3) to the letter: Stateful-MLFQ, enhanced HRRN, request-level batches.

Every program starts in queue 0. When a request ends, its token cost above the queue's threshold demotes the program by
one queue (compute-intensive); ending in a tool call below it promotes by one (I/O-intensive). A program in the lowest
queue whose response ratio exceeds ``ALPHA`` goes to queue 0. A batch takes ready requests queue by queue, in a queue
by falling ``(W + T) / T`` (equation 4), W the wait the *program* has accumulated and T the predicted time of this
*request*, as many as fit into memory; it runs until every member has ended, and only then is the next one built.

The paper's text leaves open: the number of queues, thresholds and alpha (ours: 6, 128 … 640 tokens, quoted second-hand
from an imitation of the paper, and 10); whether token cost counts prefill (ours: what was computed and not cached, and
decode); by how much to promote (one queue); whether filling stops at the first non-empty queue (it goes on, as in the
listing); whether waits for tools count in W (they do not).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..policy import CLASS, Policy, Pressure
from ..prediction import Predictor
from ..program import Request

THRESHOLDS = (128.0, 256.0, 384.0, 512.0, 640.0)
"""Token cost of a request above which queue k demotes; the last queue has none."""
ALPHA = 10.0
"""Response ratio above which the lowest queue's programs go to the first."""
EVERYBODY = 10**9


class AstraeaPaper(Policy):
    columns = 3
    backfill = EVERYBODY

    def __init__(self, predictor: Predictor):
        super().__init__(predictor)
        self._batch: set[Request] = set()
        self._built = 0.0  # when the batch was built

    def features(self, request: Request) -> Sequence[float]:
        waiting_since = request.queued - request.program.job.waited_s
        return request.program.job.level, waiting_since, max(1e-6, self.predict.request_s(request))

    def scores(self, features: np.ndarray, now: float, pressure: Pressure) -> np.ndarray:
        level, waiting_since, t = features.T
        ratio = (now - waiting_since + t) / t
        lowest = level == len(THRESHOLDS)
        return np.where(lowest & (ratio > ALPHA), 0, level) * CLASS - ratio

    def admits(self, request: Request, now: float, pressure: Pressure) -> bool:
        if not self._batch:
            self._built, self.backfill = now, EVERYBODY
        elif now != self._built:
            self.backfill = 0  # nobody may start, so nobody after the first need be asked
        return now == self._built

    def admitted(self, request: Request, now: float) -> None:
        self._batch.add(request)
        if self.ratio(request, now) > ALPHA and request.program.job.level == len(THRESHOLDS):
            request.program.job.level = 0

    def ratio(self, request: Request, now: float) -> float:
        """Response ratio of a request, equation 4."""
        t = max(1e-6, self.predict.request_s(request))
        return (request.program.job.waited_s + t) / t

    def queued(self, request: Request, now: float) -> None:
        self._batch.discard(request)  # if it was preempted

    def ended(self, request: Request, now: float) -> None:
        self._batch.discard(request)
        job = request.program.job
        if job.level < len(THRESHOLDS) and request.service > THRESHOLDS[job.level]:
            job.level += 1
        elif not request.final:
            job.level = max(0, job.level - 1)


class BatchedFCFS(AstraeaPaper):
    """Runs the same batches to completion, in order of arrival: shows what the paper's order gains by itself."""

    def scores(self, features: np.ndarray, now: float, pressure: Pressure) -> np.ndarray:
        return features[:, 1]

    def features(self, request: Request) -> Sequence[float]:
        return 0.0, request.submitted, 1.0
