"""Algorithm 1 of Astraea (arXiv 2512.14142 §4.3) to the letter: the order of :mod:`.astraea_mlfq`, in batches.

A batch takes ready requests queue by queue, and in a queue by falling response ratio, as many as fit into memory; it
runs until every member has ended, and only then is the next one built. The paper's text leaves open whether filling
stops at the first non-empty queue; it goes on here, as in the listing.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..policy import Pressure
from ..prediction import Predictor
from ..program import Request
from .astraea_mlfq import AstraeaMLFQ

EVERYBODY = 10**9


class AstraeaPaper(AstraeaMLFQ):
    backfill = EVERYBODY
    max_skips = EVERYBODY
    tenants_share_pages = False

    def __init__(self, predictor: Predictor):
        super().__init__(predictor)
        self._batch: set[Request] = set()
        self._built = 0.0  # when the batch was built

    def admits(self, request: Request, now: float, pressure: Pressure) -> bool:
        if not self._batch:
            self._built, self.backfill = now, EVERYBODY
        elif now != self._built:
            self.backfill = 0  # nobody may start, so nobody after the first need be asked
        return now == self._built

    def admitted(self, request: Request, now: float) -> None:
        self._batch.add(request)
        super().admitted(request, now)

    def queued(self, request: Request, now: float) -> None:
        self._batch.discard(request)  # if it was preempted

    def ended(self, request: Request, now: float) -> None:
        self._batch.discard(request)
        super().ended(request, now)


class BatchedFCFS(AstraeaPaper):
    """Runs the same batches to completion, in order of arrival: shows what the paper's order gains by itself."""

    def scores(self, features: np.ndarray, now: float, pressure: Pressure) -> np.ndarray:
        return features[:, 1]

    def features(self, request: Request) -> Sequence[float]:
        return 0.0, request.submitted, 1.0
