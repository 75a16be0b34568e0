"""Waits of programs between two of their requests, and the jobs that end and begin with them."""

from __future__ import annotations

from dataclasses import replace

from .prediction import Predictor
from .program import Job, Program, Request
from .registry import Registry
from .residency import Residency
from .wait import HUMAN_WAIT, IGNORED, TOOL_WAIT, BoundedWait, Wait, WaitOutcome


class Waits:
    """Begins and ends the waits of programs, and says to which job the request after a wait belongs.

    A program that nobody says anything about works on one job. A child takes part in the job of its parent as long as
    that has one; by itself it works on a job of its own.

    Args:
        programs: the table of programs.
        residency: is told who waits for what.
        predict: learns from waits and jobs.
    """

    def __init__(self, programs: Registry, residency: Residency, predict: Predictor):
        self._programs, self._residency, self._predict = programs, residency, predict

    def begin(self, program: Program, request: Request, now: float) -> None:
        """A request of a program has ended, and the program goes on to wait."""
        program.wait_began, program.wait, program.together = now, None, None
        program.last = program.last or request
        self._programs.idle.add(program)
        self._residency.wait_begins(program, now)

    def forked(self, program: Program, parent: Program, now: float) -> None:
        """A program is a fork of another: it waits for its first request, and takes part in the other's job."""
        program.job, program.leads, program.wait_began = parent.job, False, now
        self._programs.idle.add(program)
        self._residency.wait_begins(program, now)

    def taken_over(self, program: Program, now: float) -> None:
        """A program has come from another replica: it waits, and nobody knows for what."""
        program.wait_began = now
        self._programs.idle.add(program)
        self._residency.wait_begins(program, now)

    def tell(self, program: Program, wait: Wait, now: float) -> None:
        """Say what an idle program waits for; what was said last counts."""
        self._programs.humans -= program.awaits_human
        program.wait = BoundedWait.of(wait)
        self._programs.humans += program.awaits_human
        self._predict.wait_told(program)
        keep_s = program.wait.wait.keep_s
        if not self._residency.wait_told(program, keep_s, now) and keep_s:
            program.wait = replace(program.wait, leased=IGNORED)
        if program.awaits_human:
            self.job_over(program)

    def end(self, program: Program, now: float) -> WaitOutcome | None:
        """An idle program has got its next request; None: its first, so it is a fork, which has waited for nobody."""
        self._programs.idle.discard(program)
        self._residency.wait_ended(program, now)
        if not program.turns:
            return None
        took_s, wait = now - program.wait_began, program.wait
        predicted_s = self._predict.returned(program, took_s)
        if not program.awaits_human:
            program.job.tool_s += took_s
        if wait is None:
            return WaitOutcome(predicted_s, took_s)
        kind = HUMAN_WAIT if wait.wait.human else TOOL_WAIT
        return WaitOutcome(predicted_s, took_s, kind, wait.hinted, wait.leased)

    def join_job(self, program: Program, now: float) -> None:
        """Let a program whose next request has just come take part in the job that this belongs to.

        Parents may be children of their children, who name them: a job keeps the program that leads it.
        """
        parent = self._parent(program)
        if parent is not None and not (program.leads and parent.job is program.job):
            self.forget(program)
            program.job, program.leads = parent.job, False
        elif not program.leads or program.awaits_human:
            self.forget(program)
            program.job, program.leads = Job(now), True
        if program.awaits_human:
            self._programs.humans -= 1
            program.wait = None

    def _parent(self, program: Program) -> Program | None:
        """The parent of a program, if it has a job that somebody leads."""
        parent = self._programs.find(program.parent) if program.parent is not None else None
        if parent is None or parent is program or parent.owner != program.owner:
            return None
        return None if parent.awaits_human or parent.job.left else parent

    def job_over(self, program: Program) -> None:
        """The job of an idle program has ended with its last request, if it is this program that leads it."""
        job = program.job
        if program.leads and not job.ended:
            job.ended = True
            self._predict.answered(job, program.wait_began - job.arrival)

    def forget(self, program: Program) -> None:
        """A program has ended, or takes part in another job from now on: the one that it has led is over."""
        if not program.leads:
            return
        program.job.left = True
        if not program.job.ended:
            program.job.ended = True
            self._predict.job_ended(program.job)
