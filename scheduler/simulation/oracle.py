"""A predictor that knows the future, for studies."""

from __future__ import annotations

import random
from collections.abc import Hashable, Iterable, Mapping

from ..prediction import Predictor
from ..program import Program, Request
from .trace import TraceProgram, TraceRequest, everyone


class Oracle(Predictor):
    """Knows the programs of a trace, exactly or with noise; for studies only.

    Args:
        truth: programs, found by their names as keys.
        noise: relative standard deviation of every answer; each question about a request has one wrong answer.
        seed: of the noise.
    """

    def __init__(self, truth: Iterable[TraceProgram], noise: float = 0.0, seed: int = 0):
        super().__init__()
        self._truth: Mapping[Hashable, TraceProgram] = {p.id: p for p in everyone(truth)}
        self._noise, self._seed = noise, seed

    def _wrong(self, program: Program, question: str) -> float:
        if self._noise == 0:
            return 1.0
        rng = random.Random(f"{self._seed} {program.key} {program.turns} {question}")
        return max(0.05, 1.0 + self._noise * rng.gauss(0.0, 1.0))

    def _left(self, program: Program) -> tuple[TraceRequest, ...]:
        return self._truth[program.key].requests[program.turns :]

    def _job_left(self, program: Program) -> tuple[TraceRequest, ...]:
        left = self._left(program)
        ends = next((i for i, request in enumerate(left) if request.human), len(left))
        return left[: ends + 1]

    def output_tokens(self, request: Request) -> float:
        total = self._left(request.program)[0].output * self._wrong(request.program, "output")
        return max(1.0, total - len(request.output))

    def wait_s(self, program: Program, elapsed_s: float = 0.0) -> float:
        requests = self._truth[program.key].requests
        at = program.turns - 1 if program.wait is not None else min(program.turns, len(requests) - 1)
        return max(0.0, requests[at].tool_s * self._wrong(program, "tool") - elapsed_s)

    def returns_in(self, program: Program, elapsed_s: float) -> float:
        return self.wait_s(program, elapsed_s)

    def remaining_turns(self, program: Program) -> float:
        return max(1.0, len(self._job_left(program)) * self._wrong(program, "turns"))

    def turns_index(self, program: Program) -> float:
        return self.remaining_turns(program)

    def remaining_s(self, request: Request) -> float:
        left = self._job_left(request.program)
        fresh = max(1, request.num_tokens - request.reusable) + sum(s.new for s in left[1:])
        decoded = sum(s.output for s in left) - len(request.output)
        exact = self.costs.prefill_s(fresh) + self.steps.decode_s(decoded)
        return exact * self._wrong(request.program, "rest")
