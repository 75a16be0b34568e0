"""One cell of a study of fleets: a workload on several replicas under a rule of placement.

Rate and pool of a replica are those of :mod:`~.experiment` for one machine, so a fleet of k replicas serves k times as
many programs that arrive k times as fast. ``pooled`` is one engine with the memory, the compute and the link of all
replicas together, whose steps have the fixed cost of one: a bound that no placement can be expected to reach.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np

from ..placement import Rule
from ..policies import make_policy
from ..policy import Policy
from ..prediction import Predictor
from ..rival_placements import RULES, make_rule
from .engine import Sizes
from .experiment import UNLIMITED, arrival_rate, draw, run_unlimited
from .fleet import EVERY_SECOND, Change, FleetOutcome, FleetSimulator, Reporting
from .machines import MACHINES, Machine
from .trace import TraceProgram
from .workload import with_arrivals

POOLED, GLOBAL_QUEUE = "pooled", "thunderagent"
FLEET_RULES = (POOLED, *RULES, GLOBAL_QUEUE)


@dataclass(frozen=True)
class FleetCell:
    """One combination of a study."""

    workload: str
    rule: str
    """A name of ``FLEET_RULES``."""
    replicas: int = 4
    oversubscription: float = 1.5
    seed: int = 0
    programs: int = 100
    """For each replica."""
    load: float = 0.85
    machine: str = "h200-8b"
    policy: str = "astraea"
    steal_s: float = 0.0
    reporting: Reporting = EVERY_SECOND
    changes: tuple[Change, ...] = ()


@lru_cache(maxsize=16)
def prepare(
    workload: str, replicas: int, programs: int, seed: int, load: float, machine: str
) -> tuple[tuple[TraceProgram, ...], float]:
    """Draw programs with arrivals, and what those of one replica hold in the mean in unlimited memory, in tokens."""
    model, one = MACHINES[machine], draw(workload, programs, seed)
    rate = arrival_rate(one, model, load)
    live = run_unlimited(with_arrivals(one, rate, seed), model).mean_live_context
    everybody = with_arrivals(draw(workload, replicas * programs, seed), replicas * rate, seed)
    return tuple(everybody), live


def simulate(cell: FleetCell, rule: Rule | None = None) -> FleetOutcome:
    """Run a cell; ``rule`` replaces the one that it names.

    Raises:
        ValueError: an unknown name.
    """
    if cell.rule not in FLEET_RULES:
        raise ValueError(f"no rule of placement is called {cell.rule!r}; there are {', '.join(FLEET_RULES)}")
    programs, live = prepare(cell.workload, cell.replicas, cell.programs, cell.seed, cell.load, cell.machine)
    longest = max(p.longest for p in programs)
    pool = max(int(live / cell.oversubscription), longest + min(4096, longest // 8 + 2 * Sizes.page_size))
    machine, sizes, replicas = MACHINES[cell.machine], Sizes(pool, host_tokens=UNLIMITED), cell.replicas
    if cell.rule == POOLED:
        machine, sizes, replicas = pooled(machine, replicas), together(sizes, replicas), 1

    def policy() -> Policy:
        return make_policy(cell.policy, Predictor(), "adaptive")

    named = "sticky" if cell.rule in (POOLED, GLOBAL_QUEUE) else cell.rule
    return FleetSimulator(
        *(programs, policy, rule or make_rule(named, cell.seed), machine, sizes, replicas),
        held_back=cell.rule == GLOBAL_QUEUE,
        steal_s=cell.steal_s if cell.rule != POOLED else 0.0,
        reporting=cell.reporting,
        changes=cell.changes,
    ).run()


def pooled(machine: Machine, count: int) -> Machine:
    """One machine with the compute, the memory's bandwidth and the link of so many."""
    steps = machine.steps
    whole = {name: getattr(steps, name) / count for name in ("per_token_s", "per_context_s", "per_pair_s")}
    return replace(machine, steps=replace(steps, **whole), link_bytes_s=machine.link_bytes_s * count)


def together(sizes: Sizes, count: int) -> Sizes:
    """The sizes of so many engines as one."""
    names = ("pool_tokens", "max_seqs", "max_step_tokens", "staging_tokens")
    return replace(sizes, **{name: getattr(sizes, name) * count for name in names})


def summary(cell: FleetCell, outcome: FleetOutcome) -> dict[str, Any]:
    """The figures of a run, as a row of a table. Times in seconds."""
    records = outcome.history.served
    jct = np.array([r.jct_s for r in records])
    requests = sum(outcome.placed.values())
    return {
        "workload": cell.workload,
        "rule": cell.rule,
        "replicas": cell.replicas,
        "oversubscription": cell.oversubscription,
        "seed": cell.seed,
        "programs": len(records),
        "load": cell.load,
        "machine": cell.machine,
        "mean_jct_s": float(jct.mean()),
        "p50_jct_s": float(np.percentile(jct, 50)),
        "p99_jct_s": float(np.percentile(jct, 99)),
        "mean_queue_s": float(np.mean([r.queue_s for r in records])),
        "prefix_hit": outcome.prefix_hit,
        "moves": outcome.moves / max(1, requests),
        "resent": outcome.resent,
        "refused": outcome.history.refused,
    }
