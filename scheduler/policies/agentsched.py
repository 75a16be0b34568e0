"""AgentSched of AgentInfer (arXiv 2512.18337): from shortest-first to cache-first as memory tightens.

``score = a * hit - (b + lambda) * need + c * wait``, highest first, with ``lambda = lmax * sigmoid(k * (D / (U + eps) -
1))``, D the pages that waiting requests need and U the free ones. Sources are notes on the paper and give no
constants. Ours: hit is the share of the prompt that is cached, need the share of the pool it newly takes, wait in
minutes; a = 1, b = 4, c = 1, lmax = 16, k = 2.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from ..policy import Policy, Pressure
from ..program import Request

HIT, NEED, WAIT = 1.0, 4.0, 1.0 / 60
LAMBDA, STEEPNESS = 16.0, 2.0


class AgentSched(Policy):
    columns = 3

    def features(self, request: Request) -> Sequence[float]:
        fresh = request.num_tokens - request.reusable
        return request.reusable / request.num_tokens, fresh + self.predict.output_tokens(request), request.queued

    def scores(self, features: np.ndarray, now: float, pressure: Pressure) -> np.ndarray:
        hit, need, queued = features.T
        size = pressure.pages * pressure.page_size
        demand, free = need.sum(), (pressure.free + pressure.retained) * pressure.page_size
        steep = min(50.0, STEEPNESS * (demand / (free + 1.0) - 1.0))
        weight = LAMBDA / (1.0 + math.exp(-steep))
        scores: np.ndarray = -(HIT * hit - (NEED + weight) * need / size + WAIT * (now - queued))
        return scores
