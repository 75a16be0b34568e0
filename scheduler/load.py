"""What a scheduler says of its load, so that somebody else can place programs and grow a fleet."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from .config import SchedulerConfig, SchedulerStats
from .context_tree import ContextTree
from .placement import MOST, Report
from .prediction import Predictor
from .program import Program, Request
from .start_waits import StartWaits


class Load:
    """Follows programs and requests as they come and go; every event is O(1), and :meth:`report` is read at any time.

    Args:
        config: sizes.
        predict: what has been learned of steps and programs.
    """

    def __init__(self, config: SchedulerConfig, predict: Predictor):
        self.contexts = ContextTree(config.page_size)
        self.waits = StartWaits()
        self._output = 0  # tokens that live requests have sampled
        self._queued: dict[Request, tuple[int, float]] = {}  # not started: how many were waiting, and remaining time
        self._config, self._predict = config, predict

    def submitted(self, request: Request, ahead: int, now: float) -> None:
        """A request has come, while ``ahead`` others wait."""
        self.contexts.works(request.program, request.block_hashes, len(request.prompt), now)
        self._queued[request] = ahead, self._predict.remaining_s(request)

    def admitted(self, request: Request) -> None:
        """A request has got a slot."""
        if (queued := self._queued.pop(request, None)) is not None:
            ahead, remaining_s = queued
            self.waits.observe(request.started - request.submitted, ahead + 1, remaining_s)

    def sampled(self, tokens: int) -> None:
        """Live requests have sampled so many tokens; below 0, some of those counted are none."""
        self._output += tokens

    def ended(self, request: Request, now: float) -> None:
        """A request has ended, and its program waits, or is forgotten next."""
        self._output -= len(request.output)
        self._queued.pop(request, None)
        self.waiting(request.program, request.program.last or request, now)  # the one before, if this one never ran

    def waiting(self, program: Program, last: Request, now: float) -> None:
        """A program begins to wait with the context of a request, or of a fork's: what is computed of its parent's."""
        hashes, further = last.block_hashes, last.further_hashes()
        tokens = last.num_tokens if last.program is program else program.computed + 1
        self.contexts.waits(program, [*hashes, *further] if further else hashes, tokens, now)

    def report(self, stats: SchedulerStats, now: float) -> Report:
        """Say how loaded the scheduler is, whose counts these are. Any thread may ask.

        The numbers are each whole; together they may be of different moments.
        """
        size, host, contexts, costs = self._config.page_size, self._config.host, self.contexts.sums, self._predict.costs
        active = contexts.active + self._output
        step, transfers = self._predict.steps.largest_step, self._predict.transfers
        prefill_s = costs.prefill_s(step) / step
        return Report(
            pool=(self._config.num_pages - 1) * size,
            free=stats.free_pages * size,
            retained=stats.retained_pages * size,
            host_free=max(0, host.pages - stats.host_pages) * size,
            live=max(0, round(active + contexts.waiting)),
            demand=max(0.0, active + contexts.faded(now)),
            running=stats.running,
            waiting=stats.waiting,
            tool_waits=stats.in_tool_wait,
            wait_s=self.expected(stats),
            prefill_s=prefill_s,
            step_s=self._predict.steps.mean_step_s,
            restore_s=transfers.per_page_s / size if host.pages else prefill_s,
            sessions=stats.sessions,
        )

    def expected(self, stats: SchedulerStats) -> tuple[float, ...]:
        """Seconds that a new request would wait, by decile of the model time that its program has left.

        Where nobody waits, and a typical context has room, there is no wait.
        """
        programs = max(1, len(self.contexts))
        typical = (self.contexts.sums.active + self.contexts.sums.waiting) / programs
        room = (stats.free_pages + stats.retained_pages) * self._config.page_size >= typical
        fits = room and stats.running < self._config.max_running
        return tuple(min(MOST, wait) for wait in self.waits.expected(stats.waiting + (not fits)))

    def check(self, live: dict[Program, Request]) -> None:
        """Raise AssertionError unless what is counted is what there is (for tests; O(everything))."""
        self.contexts.check(set(live))
        assert self._output == sum(len(request.output) for request in live.values())
        unstarted = {request for request in live.values() if request.slot < 0 and not request.preemptions}
        assert unstarted <= self._queued.keys() <= set(live.values())


def together(reports: Sequence[Report]) -> Report:
    """Return what several replicas, of which there is one at least, say as one: a new request goes to the best of them.

    Times are means.
    """
    takers = [report for report in reports if not report.draining] or reports

    names = {field.name for field in fields(Report)} - {"wait_s", "draining"}
    sums: dict[str, Any] = {name: sum(getattr(report, name) for report in reports) for name in names}
    sums |= {name: sums[name] / len(reports) for name in ("prefill_s", "step_s", "restore_s")}
    waits = tuple(map(min, *(report.wait_s for report in takers), takers[0].wait_s))
    return Report(**sums, wait_s=waits, draining=all(report.draining for report in reports))
