"""Continuum (arXiv 2511.02230): KV pinned for a time to live that the tool's history justifies, program order.

``tau* = argmax_tau P_f(tau) * (T_q * eta + reload) - tau`` over the observed durations of the tool and 0, where P_f is
their empirical distribution, T_q the mean queueing delay of programs that had lost their KV, eta whether progress
predicts completion, and reload the time to compute the KV again. With fewer than 100 waits known in all, the time to
live is that of tools exponential with mean 1 s and eta 1; with fewer than 100 of a tool, all tools' distribution.

Order: preempted segments, then those that return within their time to live, then by arrival of the program. Pins are
respected while something runs; else (the paper's deadlock guard) the pinned program that arrived last loses its pin.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterable, Sequence

import numpy as np

from ..policy import Policy, Pressure
from ..prediction import Predictor
from ..program import Program, Segment

KNOWN = 100
"""Waits from which on a distribution is trusted."""


def time_to_live(durations: Sequence[float], benefit_s: float) -> float:
    """``argmax P(tau) * benefit - tau`` over ``durations`` (rising) and 0."""
    best, best_tau = 0.0, 0.0
    step = max(1, len(durations) // 128)
    for i in range(step - 1, len(durations), step):
        value = bisect_right(durations, durations[i]) / len(durations) * benefit_s - durations[i]
        if value > best:
            best, best_tau = value, durations[i]
    return best_tau


class Continuum(Policy):
    columns = 2

    def __init__(self, predictor: Predictor):
        super().__init__(predictor)
        self._until: dict[Program, float] = {}
        self._queue_s = 0.0  # mean queueing delay of those who had lost their KV
        self._delays = 0

    def features(self, segment: Segment) -> Sequence[float]:
        pinned = self._until.get(segment.program, -1.0) >= segment.submitted
        return 0 if segment.preemptions else 1 if pinned else 2, segment.program.arrival

    def scores(self, features: np.ndarray, now: float, pressure: Pressure) -> np.ndarray:
        scores: np.ndarray = features[:, 0] * 1e9 + features[:, 1]
        return scores

    def rank(self, segment: Segment) -> tuple[float, ...]:
        return (segment.program.arrival, segment.number)

    def victims(self, programs: Iterable[Program], now: float) -> Iterable[Program]:
        free: list[Program] = []
        pinned: list[Program] = []
        for program in programs:
            (pinned if self._until.get(program, -1.0) >= now else free).append(program)
        pinned.sort(key=lambda p: -p.arrival)
        return [*free, *pinned]

    def admitted(self, segment: Segment, now: float) -> None:
        if segment.cached_tokens < segment.matched - 1 and segment.preemptions == 0:
            self._delays += 1
            self._queue_s += (now - segment.queued - self._queue_s) / min(self._delays, 100)

    def ended(self, segment: Segment, now: float) -> None:
        if segment.final:
            return
        costs, waits = self.predict.costs, self.predict.tool_times(None)
        reload_s = costs.prefill_s(segment.known)
        if len(waits) < KNOWN:
            benefit = self._queue_s + reload_s
            tau = math.log(benefit) if benefit > 1 else 0.0
        else:
            tau = time_to_live(waits.values, self._queue_s * max(0.0, self.predict.eta()) + reload_s)
        self._until[segment.program] = now + tau

    def tool_called(self, program: Program, now: float) -> None:
        waits = self.predict.tool_times(program.tool)
        if len(waits) >= KNOWN and program.last is not None:
            reload_s = self.predict.costs.prefill_s(program.last.known)
            benefit = self._queue_s * max(0.0, self.predict.eta()) + reload_s
            self._until[program] = now + time_to_live(waits.values, benefit)

    def forgotten(self, program: Program) -> None:
        self._until.pop(program, None)
