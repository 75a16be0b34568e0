"""ThunderAgent (arXiv 2602.13692): programs are paused when their contexts outgrow the KV memory.

Every ``INTERVAL_S`` seconds: if the contexts of programs that reason, plus those of programs that act (wait for a
tool) weighted by ``2 ** -t`` after t seconds, exceed the capacity, programs are paused, acting ones first and then
shortest context first; else paused ones are restored, reasoning ones first and then shortest first, while they fit.
New programs wait while anything is paused. Order is that of the engine below: first come, first served.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..policy import CLASS, Policy, Pressure
from ..prediction import Predictor
from ..program import Program, Request

INTERVAL_S = 5.0
"""The paper's number."""


class ThunderAgent(Policy):
    columns = 2
    max_skips = 0

    def __init__(self, predictor: Predictor):
        super().__init__(predictor)
        self._context: dict[Program, int] = {}
        self._acting: dict[Program, float] = {}  # since when
        self._waiting: dict[Program, Request] = {}
        self._paused: dict[Program, None] = {}
        self._next = 0.0
        self._capacity = float("inf")

    def features(self, request: Request) -> Sequence[float]:
        self.backfill = len(self._paused)  # none of which keeps back a request of another tenant or priority
        return request.program in self._paused, request.submitted

    def scores(self, features: np.ndarray, now: float, pressure: Pressure) -> np.ndarray:
        paused, submitted = features.T
        return paused * CLASS + submitted

    def admits(self, request: Request, now: float, pressure: Pressure) -> bool:
        self._capacity = pressure.pages * pressure.page_size
        if now >= self._next:
            self._next = now + INTERVAL_S
            self._tick(now)
        return request.program not in self._paused

    def queued(self, request: Request, now: float) -> None:
        program = request.program
        if program not in self._context and (self._paused or self._used(now) + request.num_tokens > self._capacity):
            self._paused[program] = None
        self._context[program] = request.num_tokens
        self._acting.pop(program, None)
        self._waiting[program] = request

    def admitted(self, request: Request, now: float) -> None:
        self._waiting.pop(request.program, None)

    def ended(self, request: Request, now: float) -> None:
        self._waiting.pop(request.program, None)
        self._context[request.program] = request.num_tokens
        self._acting[request.program] = now

    def forgotten(self, program: Program) -> None:
        for known in (self._context, self._acting, self._waiting, self._paused):
            known.pop(program, None)

    def _used(self, now: float) -> float:
        return sum(self._weight(p, c, now) for p, c in self._context.items() if p not in self._paused)

    def _weight(self, program: Program, context: int, now: float) -> float:
        since = self._acting.get(program)
        return float(context) if since is None else context * 2.0 ** -min(60.0, now - since)

    def _tick(self, now: float) -> None:
        used = self._used(now)
        order = sorted(self._context, key=lambda p: (p not in self._acting, self._context[p], p.number))
        for program in order:
            if used <= self._capacity:
                break
            if program not in self._paused and (program in self._acting or program in self._waiting):
                used -= self._weight(program, self._context[program], now)
                self._paused[program] = None
                self._reorder(program)
        for program in sorted(self._paused, key=lambda p: (p in self._acting, self._context[p], p.number)):
            used += self._weight(program, self._context[program], now)
            if used > self._capacity and len(self._paused) < len(self._context):
                break
            del self._paused[program]
            self._reorder(program)

    def _reorder(self, program: Program) -> None:
        if program in self._waiting:
            self.outdate(self._waiting[program])
