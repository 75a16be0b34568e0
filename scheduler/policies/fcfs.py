"""First come, first served: by segment, as engines do that know no programs, or by program."""

from __future__ import annotations

from collections.abc import Sequence

from ..policy import Policy
from ..program import Segment


class FCFS(Policy):
    """By the segment's own arrival, with a least-recently-used prefix cache per program (vLLM, SGLang)."""


class ProgramFCFS(Policy):
    """By the program's arrival: a program that returns from a tool keeps its place.

    InferCept (arXiv 2402.01869) and Continuum (arXiv 2511.02230) order so.
    """

    def features(self, segment: Segment) -> Sequence[float]:
        return (segment.program.arrival,)

    def rank(self, segment: Segment) -> tuple[float, ...]:
        return (segment.program.arrival, segment.number)
