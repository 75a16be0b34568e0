"""InferCept (arXiv 2402.01869): arrival order kept over interceptions, KV given up by least waste.

Keeping the KV of a program in a tool wait wastes ``T * C`` token-seconds, T estimated as the time already waited;
dropping it wastes the time to compute it again, for itself and for everybody in the batch. Those whose keeping wastes
most beyond that lose it first: to the host where there is a tier (the paper's swap, whose budget is what hides behind
a step; ours is the staging buffer), else for good. KV is given up on demand only, which dominates giving it up early.
"""

from __future__ import annotations

from collections.abc import Iterable

from ..prediction import Predictor
from ..program import Program, Segment
from .fcfs import ProgramFCFS


class InferCept(ProgramFCFS):
    def __init__(self, predictor: Predictor):
        super().__init__(predictor)
        self._batch = 0.0  # tokens of context of those who run

    def admitted(self, segment: Segment, now: float) -> None:
        self._batch += segment.known

    def ended(self, segment: Segment, now: float) -> None:
        self._batch = max(0.0, self._batch - len(segment.prompt))

    def victims(self, programs: Iterable[Program], now: float) -> Iterable[Program]:
        def excess(program: Program) -> float:
            again_s = self.predict.costs.prefill_s(program.kept)
            keep = (now - program.wait_began) * program.kept
            return keep - again_s * (program.kept + self._batch)

        return sorted(programs, key=lambda p: (-excess(p), p.id))
