"""Predictions that policies may use, learned online.

No decision waits for a prediction; with nothing learned yet the answers are rough and positive.
"""

from __future__ import annotations

import math

from .costs import StepCosts, StepFit, TransferFit
from .distribution import ENOUGH, Distribution
from .hazards import TurnHazards
from .histogram import Histogram
from .program import Job, Program, Request
from .wait_times import WaitTimes

FEW_TOKENS, FEW_TURNS = 100.0, 8.0
"""Output tokens per request and requests per job, before anything is known: guesses, which only order the first few
programs."""
JOB_S = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1800.0, 3600.0)
"""Bounds of the completion times of jobs that are counted."""


class Predictor:
    """Learns from what has ended: output lengths, times of waits, turns per job, seconds per step."""

    def __init__(self) -> None:
        self.steps = StepFit()
        self.transfers = TransferFit()
        self.outputs = Distribution()
        """Output tokens per request."""
        self.service = Distribution()
        """Tokens computed per request, as the mean of its job so far."""
        self.waits = WaitTimes()
        self.talk = Distribution()
        """Output tokens per request, as the mean of its job so far."""
        self.turns = Distribution()
        """Requests per job."""
        self.jobs = Histogram(JOB_S)
        """Completion times of jobs that have come to their end: from their first request to their last token."""
        self.hazards = TurnHazards()
        self._progress = [0.0] * 6  # decaying sums over the turns of ended jobs: 1, k, r, k², r², k r (see eta)

    # -- questions ---------------------------------------------------------------------------------------------

    @property
    def costs(self) -> StepCosts:
        """The latest fit of step costs."""
        return self.steps.costs

    def output_tokens(self, request: Request) -> float:
        """Predict the tokens that a request will still output.

        This is the mean of its job, drawn to that of all as if two more had output that.
        """
        job = request.program.job
        own = self._output(job.turns, job.output_tokens)
        return max(own - len(request.output), 0.1 * own)

    def _output(self, turns: int, outputs: int) -> float:
        """Output tokens per request of a job that has had so many of each."""
        return (outputs + 2 * self.outputs.mean(FEW_TOKENS)) / (turns + 2)

    def wait_s(self, program: Program, elapsed_s: float = 0.0) -> float:
        """Seconds that a program's present or next wait goes on after ``elapsed_s``, in the mean."""
        hint = _hint_beyond(program, elapsed_s)
        if hint is not None:
            return hint
        return self.waits.of(program).mean_beyond(elapsed_s, self.waits.default_s(program))

    def returns_in(self, program: Program, elapsed_s: float) -> float:
        """Seconds until a program's wait is as likely over as not."""
        hint = _hint_beyond(program, elapsed_s)
        if hint is not None:
            return hint
        return self.waits.of(program).median_beyond(elapsed_s, self.waits.default_s(program))

    def knows_wait(self, program: Program) -> bool:
        """Whether the present wait of a program can be predicted from more than a guess."""
        return _hint_beyond(program, 0.0) is not None or len(self.waits.of(program)) >= ENOUGH

    def remaining_turns(self, program: Program) -> float:
        """Requests that a program's job will still run, the present or next one included."""
        job = program.job
        return self.hazards.remaining(*self._turn(job.turns, job.output_tokens))

    def turns_index(self, program: Program) -> float:
        """Expected requests per chance that a program's job ends; see :meth:`~.hazards.TurnHazards.index`."""
        job = program.job
        return self.hazards.index(*self._turn(job.turns, job.output_tokens))

    def _turn(self, turns: int, outputs: int) -> tuple[int, int, float]:
        """Tell turn, kind and talk of a job, which its hazard of ending depends on."""
        talk = math.log(max(self._output(turns, outputs), 1e-3) / max(self.outputs.mean(FEW_TOKENS), 1e-3))
        return turns, self._kind(turns, outputs), talk

    def _kind(self, turns: int, outputs: int) -> int:
        """Tell the kind of a job by its hazard of ending.

        It is the third in which its mean output per request lies; 0 while that is unknown.
        """
        if turns == 0 or len(self.talk) < ENOUGH:
            return 0
        return 1 + sum(outputs / turns > self.talk.quantile(q, 0.0) for q in (1 / 3, 2 / 3))

    def job_s(self) -> float:
        """Seconds that a typical job runs in all."""
        return self.steps.decode_s(self.outputs.mean(FEW_TOKENS) * self.turns.mean(FEW_TURNS))

    def remaining_s(self, request: Request) -> float:
        """Seconds of model time that a request and those that its job runs after it would take alone."""
        own = self.steps.decode_s(self.output_tokens(request))
        later = self.steps.decode_s(self.outputs.mean(FEW_TOKENS))
        fresh = self.costs.prefill_s(max(1, request.num_tokens - request.reusable))
        return fresh + own + (self.remaining_turns(request.program) - 1) * later

    def request_s(self, request: Request) -> float:
        """Seconds of model time that a request would take alone."""
        fresh = self.costs.prefill_s(max(1, request.num_tokens - request.reusable))
        return fresh + self.steps.decode_s(self.output_tokens(request))

    def eta(self) -> float:
        """Say how far progress predicts completion (Continuum, arXiv 2511.02230).

        This is ``-Corr(k, r)`` of the turns k that ended jobs had behind them and the r ahead; 1 for a fixed number
        of turns, 0 for a geometric one, below 0 for heavier tails.
        """
        n, k, r, kk, rr, kr = self._progress
        if n < ENOUGH:
            return 1.0
        variance = (kk / n - (k / n) ** 2) * (rr / n - (r / n) ** 2)
        return 1.0 if variance <= 1e-12 else -(kr / n - k * r / n**2) / math.sqrt(variance)

    # -- events ------------------------------------------------------------------------------------------------

    def ended(self, request: Request, now: float) -> None:
        """A request has ended; its program and its job count it already."""
        if request.finish_reason in ("stop", "length"):
            job = request.program.job
            job.last_turn = self._turn(job.turns - 1, job.output_tokens - len(request.output))
            last = request.final and request.program.leads
            self.hazards.observe(*job.last_turn, last=last)
            if last:
                self.jobs.add(now - job.arrival)
            self.outputs.add(len(request.output))
            self.talk.add(job.output_tokens / job.turns)
            self.service.add(job.service / job.turns)

    def wait_told(self, program: Program) -> None:
        """Somebody has said what a program waits for."""
        program.together = self.waits.together(program)

    def returned(self, program: Program, took_s: float) -> float:
        """A wait has ended; returns what had been predicted for it."""
        predicted_s = self.wait_s(program)
        self.waits.add(program, took_s, predicted_s)
        return predicted_s

    def answered(self, job: Job, took_s: float) -> None:
        """A job turns out to have ended with its last request, ``took_s`` seconds after its arrival."""
        if job.last_turn is not None:
            self.hazards.ended(*job.last_turn)
        self.jobs.add(took_s)
        self.job_ended(job)

    def job_ended(self, job: Job) -> None:
        """A job has ended."""
        if job.turns == 0:
            return
        self.turns.add(job.turns)
        n = job.turns
        k, squares = (
            n * (n - 1) / 2,
            (n - 1) * n * (2 * n - 1) / 6,
        )  # sums over turns 0 … n - 1, of which n - k are left
        moments = (n, k, n * n - k, squares, n**3 - 2 * n * k + squares, n * k - squares)
        self._progress = [0.995 * old + new for old, new in zip(self._progress, moments, strict=True)]


def _hint_beyond(program: Program, elapsed_s: float) -> float | None:
    """Seconds that the client expects a wait to go on; None: it has not said, or the time is over."""
    expected_s = program.wait.wait.expected_s if program.wait is not None else None
    return expected_s - elapsed_s if expected_s is not None and elapsed_s < expected_s else None
