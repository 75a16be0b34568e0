"""One cell of a study: a workload at a load, on a machine, under a policy, a predictor and a residency.

Rate and pool are chosen so that cells compare: programs arrive at ``load`` times the rate at which the machine with
unlimited memory works off all programs at once (until four fifths have ended), and the pool holds ``1 /
oversubscription`` of the contexts that are alive in the mean when memory is unlimited.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from ..policies import make_policy
from ..prediction import Predictor
from ..strategies import STRATEGIES
from .engine import Sizes
from .machines import MACHINES, Machine
from .oracle import Oracle
from .sharing import SHARING, sharing_beginnings
from .simulator import Outcome, ProgramRecord, Simulator
from .trace import TraceProgram, everyone, load_trace
from .workload import GENERATED, generate, resample, scaled_to_fit, with_arrivals

TRACES = Path(__file__).parent / "traces"
RECORDED = {"claude-code": TRACES / "claude_code_swe_haiku.jsonl"}
"""Shipped traces, as workloads; see README.md beside them."""
WORKLOADS = (*RECORDED, *GENERATED, *SHARING)
PREDICTORS: Mapping[str, float | None] = {"online": None, "oracle": 0.0, "noise10": 0.1, "noise30": 0.3, "noise50": 0.5}
"""Relative noise of the oracle; None: learned online."""
RESIDENCIES: Mapping[str, tuple[bool, str | None]] = {
    "keep-lru": (False, None),
    "host": (True, None),
    "unlimited": (False, None),
    **{name: (True, name) for name in STRATEGIES},
}
"""Whether there is a host tier, and the strategy; None: the policy's own, or else ``adaptive`` with a host tier and
``always-keep`` without. ``keep-lru``: a prefix cache, no host tier. ``unlimited``: a bound that ignores memory."""
UNLIMITED = 2**40
"""Tokens of a host tier that is never full."""


@dataclass(frozen=True)
class Cell:
    """One combination of a study."""

    workload: str
    """A name, or the path of a trace file."""
    policy: str
    predictor: str = "online"
    residency: str = "host"
    oversubscription: float = 1.5
    seed: int = 0
    programs: int = 300
    load: float = 0.85
    machine: str = "h200-8b"
    context: int = 0
    """Tokens that the lengths are scaled to fit in; 0: they are as recorded."""
    tool_scale: float = 1.0
    """Factor on the times of tools."""

    @property
    def label(self) -> str:
        """The workload as it is run, for tables."""
        context = f" to {self.context} tokens" if self.context else ""
        return f"{Path(self.workload).stem}{context}, load {self.load:g}"


@dataclass(frozen=True)
class Prepared:
    """Programs with arrivals, and what they would hold in unlimited memory."""

    programs: tuple[TraceProgram, ...]
    live_context: float

    def pool_tokens(self, cell: Cell) -> int:
        """Tokens of a cell's pool; the longest context has room in any."""
        if cell.residency == "unlimited":
            return everything(self.programs)
        longest = max(p.longest for p in self.programs)
        least = longest + min(4096, longest // 8 + 2 * Sizes.page_size)
        return max(int(self.live_context / cell.oversubscription), least)


def draw(workload: str, count: int, seed: int, context: int = 0, tool_scale: float = 1.0) -> list[TraceProgram]:
    """Draw programs of a workload by name, or of a trace file, scaled as :class:`Cell` says.

    Raises:
        ValueError: there is no such workload.
        TraceError: the file cannot be replayed, or a program cannot be scaled so far down.
    """
    path = RECORDED.get(workload, Path(workload))
    if workload in SHARING:
        sharing = SHARING[workload]
        programs = sharing_beginnings(draw(sharing.of, count, seed), sharing, seed)
    elif workload in GENERATED:
        programs = generate(workload, count, seed)
    elif path.is_file():
        programs = resample(load_trace(path), count, seed)
    else:
        raise ValueError(f"no workload or trace file is called {workload!r}; there are {', '.join(WORKLOADS)}")
    return scaled_to_fit(programs, context or max(p.longest for p in programs), tool_scale)


@lru_cache(maxsize=64)
def prepare(
    workload: str, count: int, seed: int, load: float, machine: str, context: int = 0, tool_scale: float = 1.0
) -> Prepared:
    """Draw programs and let them arrive."""
    programs = draw(workload, count, seed, context, tool_scale)
    return let_arrive(programs, MACHINES[machine], Sizes(everything(programs)), load, seed)


def let_arrive(programs: Sequence[TraceProgram], machine: Machine, ample: Sizes, load: float, seed: int) -> Prepared:
    """Let programs arrive at ``load`` times what the machine works off, unless they say when they do."""
    if any(p.arrival_s is None for p in programs):
        programs = with_arrivals(programs, arrival_rate(programs, machine, load, ample), seed)
    return Prepared(tuple(programs), run_unlimited(programs, machine, ample).mean_live_context)


def arrival_rate(programs: Sequence[TraceProgram], machine: Machine, load: float, ample: Sizes | None = None) -> float:
    """Programs per second that are ``load`` times what a machine works off, in unlimited memory, of all at once."""
    at_once = [replace(p, arrival_s=0.0) for p in programs]
    ends = sorted(r.ended for r in run_unlimited(at_once, machine, ample).served)
    done = max(1, int(0.8 * len(programs)))
    return load * done / ends[done - 1]


def simulate(cell: Cell, *, record_plans: bool = False) -> Outcome:
    """Run a cell.

    Raises:
        ValueError: an unknown name.
    """
    prepared = prepare(
        *(cell.workload, cell.programs, cell.seed, cell.load, cell.machine), cell.context, cell.tool_scale
    )
    host, strategy = residency_of(cell)
    sizes = Sizes(prepared.pool_tokens(cell), host_tokens=UNLIMITED if host else 0)
    policy = make_policy(cell.policy, predictor_for(cell, prepared.programs), strategy)
    return Simulator(prepared.programs, policy, MACHINES[cell.machine], sizes, record_plans=record_plans).run()


def residency_of(cell: Cell) -> tuple[bool, str]:
    """Whether there is a host tier, and the strategy."""
    host, strategy = RESIDENCIES[cell.residency]
    own = make_policy(cell.policy).residency
    return host, strategy or own or ("adaptive" if host else "always-keep")


def everything(programs: Sequence[TraceProgram]) -> int:
    """Tokens of a pool that all programs fit into at once."""
    return sum(p.longest + 2 * Sizes.page_size for p in everyone(programs)) + 4096


def predictor_for(cell: Cell, programs: Sequence[TraceProgram]) -> Predictor:
    """Make the predictor of a cell, which knows its programs if it is an oracle."""
    noise = PREDICTORS[cell.predictor]
    if cell.policy == "srpt-clairvoyant":
        noise = 0.0
    return Predictor() if noise is None else Oracle(programs, noise, cell.seed)


def run_unlimited(programs: Sequence[TraceProgram], machine: Machine, ample: Sizes | None = None) -> Outcome:
    """Run programs in the order of arrival, in sizes that all fit into at once, or in ``ample`` ones."""
    return Simulator(programs, make_policy("fcfs"), machine, ample or Sizes(everything(programs))).run()


def alone_s(program: TraceProgram, machine: Machine, max_step_tokens: int = 2048) -> float:
    """Seconds that a program takes on an idle machine, with its tool waits and those that it begins."""
    total, costs, attended = program.tool_s, machine.steps, machine.attended
    for s in program.requests:
        steps = -(-s.new // max_step_tokens)
        fresh = s.new / steps
        pairs = machine.pairs(s.cached + (s.new - fresh) / 2, fresh)
        total += steps * costs.step_s(0, round(fresh), attended(s.prompt, fresh), pairs)
        total += max((alone_s(child, machine, max_step_tokens) for child in s.children), default=0.0)
        total += (s.output - 1) * costs.step_s(1, 1, attended(s.prompt + s.output // 2))
    return total


def summary(cell: Cell, outcome: Outcome, machine: Machine | None = None) -> dict[str, Any]:
    """The figures of a run, as a row of a table. Times in seconds; ``machine`` if it is not the named one."""
    machine = machine or MACHINES[cell.machine]
    records = outcome.served
    jct = np.array([r.jct_s for r in records])
    alone = np.array([alone_s(r.program, machine) for r in records])
    p50, p90, p95, p99 = np.percentile(jct, [50, 90, 95, 99]).tolist()
    jobs = [s for r in records for s in r.job_times] or jct.tolist()  # a run that was cut off may have none that ended
    outputs = sum(x.output for p in everyone(r.program for r in records) for x in p.requests)
    s = outcome.stats
    return {
        "workload": cell.workload,
        "policy": cell.policy,
        "predictor": "oracle" if cell.policy == "srpt-clairvoyant" else cell.predictor,
        "residency": cell.residency,
        "oversubscription": cell.oversubscription,
        "seed": cell.seed,
        "machine": cell.machine,
        "load": cell.load,
        "context": cell.context,
        "label": cell.label,
        "programs": len(records),
        "refused": outcome.refused,
        "mean_jct_s": float(jct.mean()),
        "p50_jct_s": p50,
        "p90_jct_s": p90,
        "p95_jct_s": p95,
        "p99_jct_s": p99,
        "mean_jct_no_tool_s": float(np.mean([r.jct_no_tool_s for r in records])),
        "p99_jct_no_tool_s": float(np.percentile([r.jct_no_tool_s for r in records], 99)),
        "mean_job_s": float(np.mean(jobs)),
        "p99_job_s": float(np.percentile(jobs, 99)),
        "mean_queue_s": float(np.mean([r.queue_s for r in records])),
        "max_slowdown": float((jct / alone).max()),
        "programs_per_s": len(records) / outcome.makespan_s,
        "output_tokens_per_s": outputs / outcome.makespan_s,
        "prefix_hit": s.reused_tokens / max(1, s.reused_tokens + _prefilled(records, s.recomputed_tokens)),
        "recomputed_tokens": s.recomputed_tokens,
        "moved_bytes": outcome.page_size
        * machine.bytes_of(s.offloaded_pages + s.restored_pages, s.offloaded_windows + s.restored_windows),
        "preemptions": s.preemptions,
        "scheduler_us_per_step": 1e6 * outcome.scheduler_s / max(1, outcome.steps),
        "steps": outcome.steps,
    }


def _prefilled(records: Sequence[ProgramRecord], recomputed: int) -> int:
    return recomputed + sum(s.new for r in records for p in everyone([r.program]) for s in p.requests)


def interval(values: Sequence[float], seed: int = 0) -> tuple[float, float]:
    """95 % bootstrap interval of a mean."""
    data = np.asarray(values, float)
    rng = np.random.default_rng(seed)
    means = data[rng.integers(0, len(data), (2000, len(data)))].mean(axis=1)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def ratio_interval(
    runs: Sequence[np.ndarray], bases: Sequence[np.ndarray], seed: int = 0
) -> tuple[float, float, float]:
    """Ratio of the means of paired runs, and its 95 % bootstrap interval.

    Args:
        runs: of each seed, a figure per program.
        bases: the same of the same programs in the runs to compare with.
        seed: of the bootstrap. It draws runs if there are at least three, or else programs, which takes those of one
            run as independent.
    """
    pairs = np.array([[a.mean(), b.mean()] for a, b in zip(runs, bases, strict=True)])
    drawn = pairs if len(pairs) >= 3 else np.column_stack([np.concatenate(runs), np.concatenate(bases)])
    rng = np.random.default_rng(seed)
    sums = drawn[rng.integers(0, len(drawn), (2000, len(drawn)))].sum(axis=1)
    low, high = np.percentile(sums[:, 0] / sums[:, 1], [2.5, 97.5])
    total = drawn.sum(axis=0)
    return float(total[0] / total[1]), float(low), float(high)
