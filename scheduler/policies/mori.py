"""MORI (arXiv 2606.00866): programs ranked by idleness, the busiest on the device, the idlest on the host.

Order: programs whose KV is on the device, then those whose KV is on the host, the least idle first, then those that
have none; of equals, by arrival of the program. Idleness, and who leaves the device, is
:class:`~..rival_strategies.Idleness`. The paper's text was at hand only second-hand.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..policy import CLASS, Policy, Pressure
from ..prediction import Predictor
from ..program import Program, Request
from ..rival_strategies import Cycles

DEVICE, HOST, NOWHERE = range(3)
"""Where the KV of a program lies: in one of the paper's tiers, or nowhere, as while it waits for one."""
IDLE = 1e6
"""Difference of the scores of the busiest and the idlest program, larger than any time."""


class MORI(Policy):
    columns = 3
    residency = "mori"

    def __init__(self, predictor: Predictor):
        super().__init__(predictor)
        self._cycles = Cycles()

    def features(self, request: Request) -> Sequence[float]:
        program = request.program
        tier = DEVICE if program.pages else HOST if program.copies else NOWHERE
        idleness = self._cycles.idleness(program, request.submitted, waits=False)
        return tier, idleness, program.job.arrival

    def scores(self, features: np.ndarray, now: float, pressure: Pressure) -> np.ndarray:
        tier, idleness, arrival = features.T
        scores: np.ndarray = tier * CLASS + idleness * IDLE + arrival
        return scores

    def rank(self, request: Request) -> tuple[float, ...]:
        return (request.program.job.arrival, request.number)

    def queued(self, request: Request, now: float) -> None:
        if request.wait is not None and request.preemptions == 0:
            self._cycles.add(request.program, now)

    def forgotten(self, program: Program) -> None:
        self._cycles.forget(program)
