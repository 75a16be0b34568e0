"""First come, first served: by request, as engines do that know no programs, or by program."""

from __future__ import annotations

from collections.abc import Sequence

from ..policy import Policy
from ..program import Request


class FCFS(Policy):
    """Serves requests by their own arrival, with a least-recently-used prefix cache (vLLM, SGLang)."""

    def features(self, request: Request) -> Sequence[float]:
        return (request.submitted,)


class ProgramFCFS(Policy):
    """Serves requests by their program's arrival: a program that returns from a tool keeps its place.

    InferCept (arXiv 2402.01869) and CacheTTL (arXiv 2511.02230) use this order.
    """

    def features(self, request: Request) -> Sequence[float]:
        return (request.program.job.arrival,)

    def rank(self, request: Request) -> tuple[float, ...]:
        return (request.program.job.arrival, request.number)
