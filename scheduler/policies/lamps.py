"""LAMPS (arXiv 2410.18248): least predicted memory-time area first.

The area is the KV a request holds integrated over its prefill, its decode and the tool wait after it, the last under
the cheapest of keeping, dropping and swapping. A request that has waited 100 iterations goes to the head and stays.
Sources are notes on the paper; where they are silent: an iteration is a recent step, and the wait of a tool is the
tool's mean.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..policy import CLASS, Policy, Pressure
from ..program import Request

PATIENCE = 100
"""Iterations after which a request goes to the head: the paper's number."""
SWAP_TOKENS_S = 400_000.0
"""Tokens per second over the host link, for the price of a swap: KV of an 8B model over PCIe 5."""


class LAMPS(Policy):
    columns = 2

    def features(self, request: Request) -> Sequence[float]:
        costs, output = self.predict.costs, self.predict.output_tokens(request)
        context, end = float(request.num_tokens), request.num_tokens + output
        prefill_s = costs.prefill_s(max(1, request.num_tokens - request.reusable))
        area = prefill_s * context / 2 + self.predict.steps.decode_s(output) * (context + end) / 2
        wait_s = self.predict.wait_s(request.program)
        area += end * min(wait_s, costs.prefill_s(round(end)), 2 * end / SWAP_TOKENS_S)
        return area, request.queued

    def scores(self, features: np.ndarray, now: float, pressure: Pressure) -> np.ndarray:
        area, queued = features.T
        starving = now - queued >= PATIENCE * self.predict.steps.mean_step_s
        return np.where(starving, queued - CLASS, area)
