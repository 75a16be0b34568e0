"""How long tools take, from published measurements."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass


@dataclass(frozen=True)
class LogNormal:
    """``exp(N(ln median, sigma))`` seconds."""

    median: float
    sigma: float

    def draw(self, rng: random.Random) -> float:
        return math.exp(rng.gauss(math.log(self.median), self.sigma))

    @property
    def mean(self) -> float:
        return self.median * math.exp(self.sigma**2 / 2)


@dataclass(frozen=True)
class ToolTimes:
    """A mixture of log-normal distributions of seconds per tool call."""

    weights: tuple[float, ...]
    components: tuple[LogNormal, ...]

    def draw(self, rng: random.Random) -> float:
        """Seconds of one call."""
        return rng.choices(self.components, self.weights)[0].draw(rng)

    @property
    def mean(self) -> float:
        return sum(w * c.mean for w, c in zip(self.weights, self.components, strict=True))


CLAUDE_CODE_TOOLS = ToolTimes((0.95, 0.05), (LogNormal(1.1, 0.45), LogNormal(8.0, 1.1)))
"""Claude Code on SWE-bench Pro, fitted to the quantiles of 16,886 calls in arXiv 2606.00866 (MORI): p50 1.10 s, p90
2.03 s, p99 19.98 s. The fit gives 1.13, 2.22 and 20.1 s; its mean is 1.9 s. The quantiles are quoted second-hand."""
