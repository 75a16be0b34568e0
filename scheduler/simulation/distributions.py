"""Distributions from which workloads are drawn."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass


@dataclass(frozen=True)
class LogNormal:
    """``exp(N(ln median, sigma))``."""

    median: float
    sigma: float

    def draw(self, rng: random.Random) -> float:
        return math.exp(rng.gauss(math.log(self.median), self.sigma))

    @property
    def mean(self) -> float:
        return self.median * math.exp(self.sigma**2 / 2)


@dataclass(frozen=True)
class Mixture:
    """A mixture of log-normal distributions."""

    weights: tuple[float, ...]
    components: tuple[LogNormal, ...]

    def draw(self, rng: random.Random) -> float:
        return rng.choices(self.components, self.weights)[0].draw(rng)

    @property
    def mean(self) -> float:
        return sum(w * c.mean for w, c in zip(self.weights, self.components, strict=True))
