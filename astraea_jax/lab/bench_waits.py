"""How good the waits are that a replica reports (`scheduler/start_waits.py`), in the simulator, request by request.

When a request comes, the wait that the report would have named for it, by the decile of its program's remaining model
time, is noted, and compared with what it has waited once it starts. Beside the mean error stands that of whoever knows
the mean of all waits of the run, which no router does, and the rank correlation of what was said with what came.

  python scripts/bench_waits.py                              coding workloads, two policies, two sizes of memory
  python scripts/bench_waits.py --workloads=swe-batch --policies=astraea,plas --load=0.95
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from absl import flags

from astraea_jax.frontends.flags import run_main
from astraea_jax.lab.record import Section, define_flags, publish
from astraea_jax.scheduler.config import SchedulerStats
from astraea_jax.scheduler.load import Load
from astraea_jax.scheduler.policies import make_policy
from astraea_jax.scheduler.program import Request
from astraea_jax.scheduler.scheduler import Scheduler
from astraea_jax.scheduler.simulation.engine import Sizes
from astraea_jax.scheduler.simulation.experiment import UNLIMITED, Cell, prepare
from astraea_jax.scheduler.simulation.machines import MACHINES
from astraea_jax.scheduler.simulation.simulator import Simulator

FLAGS = flags.FLAGS
flags.DEFINE_list("workloads", ["claude-code", "swe-batch"], "Workloads, by name.")
flags.DEFINE_list("policies", ["astraea", "fcfs"], "Policies.")
flags.DEFINE_list("oversubscription", ["1.5", "2.5"], "Live contexts over the pool.")
flags.DEFINE_float("load", 0.85, "Arrivals, over what the machine works off.", lower_bound=0.0)
flags.DEFINE_integer("programs", 300, "Programs of each run.", lower_bound=20)
define_flags("bench_waits")
WARM = 0.1
"""Share of the requests, the first ones, that do not count: nothing has been learned yet."""


class Watched(Load):
    """The load of a scheduler, which also notes what it would have reported and what came."""

    def __init__(self, scheduler: Scheduler):
        super().__init__(scheduler.config, scheduler._policy.predict)
        self.said_and_came: list[tuple[float, float]] = []
        self._stats = scheduler.stats
        self._said: dict[Request, float] = {}

    def submitted(self, request: Request, ahead: int, now: float) -> None:
        """Note what a report says at this moment."""
        said = self.expected(self._before(ahead))
        super().submitted(request, ahead, now)
        self._said[request] = said[self.waits.decile(self._predict.remaining_s(request))]

    def admitted(self, request: Request) -> None:
        """Note what has come."""
        if (said := self._said.pop(request, None)) is not None and not request.preemptions:
            self.said_and_came.append((said, request.started - request.submitted))
        super().admitted(request)

    def _before(self, ahead: int) -> SchedulerStats:
        stats = self._stats()
        assert stats.waiting == ahead
        return stats


def measure(cell: Cell) -> tuple[float, ...]:
    """Mean wait, mean error of what was said, of the mean itself, bias, and rank correlation."""
    prepared = prepare(cell.workload, cell.programs, cell.seed, cell.load, cell.machine)
    sizes = Sizes(prepared.pool_tokens(cell), host_tokens=UNLIMITED)
    simulator = Simulator(prepared.programs, make_policy(cell.policy), MACHINES[cell.machine], sizes)
    watched = simulator.scheduler._load = Watched(simulator.scheduler)
    simulator.run()
    said, came = np.array(watched.said_and_came[int(WARM * len(watched.said_and_came)) :]).T
    return (
        float(came.mean()),
        float(np.abs(said - came).mean()),
        float(np.abs(came - came.mean()).mean()),
        float(said.mean() - came.mean()),
        float(np.corrcoef(_ranks(said), _ranks(came))[0, 1]),
    )


def _ranks(values: np.ndarray) -> np.ndarray:
    """Ranks, equal values sharing their mean one."""
    _, which, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[which]


def main(_: Sequence[str]) -> None:
    rows, figures = [], []
    for workload in FLAGS.workloads:
        for policy in FLAGS.policies:
            for oversubscription in map(float, FLAGS.oversubscription):
                cell = Cell(
                    workload, policy, oversubscription=oversubscription, programs=FLAGS.programs, load=FLAGS.load
                )
                found = measure(cell)
                figures.append({"cell": cell.label, "policy": policy, "figures": found})
                names = (workload, policy, f"{oversubscription:g}")
                rows.append((*names, *(f"{x:.2f} s" for x in found[:3]), f"{found[3]:+.2f} s", f"{found[4]:.2f}"))
    columns = ("workload", "policy", "oversubscription", "mean wait", "error", "error of the mean", "bias", "rank r")
    section = Section("Waits that replicas report, and those that came", columns, rows, named=3)
    publish("bench_waits", [section], {"rows": figures})


def run() -> None:
    """Run the benchmark."""
    run_main(main, __name__)
