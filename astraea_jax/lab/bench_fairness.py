"""Measures what tenants have of each other, in the simulator.

*Two tenants, one floods*: programs of one tenant arrive at a rate within its share of the machine, and another sends
more than can be served: 1,300 long requests of 4,096 and 2,000 tokens again and again, 200 of 30,000 and 500 tokens, or
all at once many programs of the same workload. The first tenant's times stand beside what it would have alone: on the
whole machine, and on half of it, with half the slots and pages and twice the time for everything, which is its fair
share. Between as one tenant and as two stands two tenants whose idle KV is evicted without regard to whose it is.

*Many tenants*: the programs of a workload, dealt out to so many tenants. Nobody floods, so what fairness does here is
its price.

  python scripts/bench_fairness.py
  python scripts/bench_fairness.py --policies=fcfs,plas,astraea --load=0.2
  python scripts/bench_fairness.py --host=0 --tenants=       what tenants have of each other without a host tier
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import NamedTuple

import numpy as np
from absl import flags

from astraea_jax.frontends.flags import run_main
from astraea_jax.lab.record import Section, define_flags, publish
from astraea_jax.scheduler.costs import StepCosts
from astraea_jax.scheduler.policies import SERVING, make_policy
from astraea_jax.scheduler.simulation.engine import Sizes
from astraea_jax.scheduler.simulation.experiment import UNLIMITED, WORKLOADS, Cell, draw, prepare
from astraea_jax.scheduler.simulation.machines import MACHINES, Machine
from astraea_jax.scheduler.simulation.simulator import Outcome, Simulator
from astraea_jax.scheduler.simulation.trace import TraceProgram, TraceRequest

FLAGS = flags.FLAGS
flags.DEFINE_multi_enum("policies", ["astraea"], SERVING, "Policies.")
flags.DEFINE_enum("workload", "claude-code", list(WORKLOADS), "Workload of the tenants that do not flood.")
flags.DEFINE_enum("machine", "h200-8b", list(MACHINES), "Machine.")
flags.DEFINE_integer("programs", 60, "Programs of the tenant beside a flood, and of all where many share.", 1)
flags.DEFINE_float("load", 0.4, "Load that the tenant beside a flood brings, of the whole machine.", 0.01, 1.0)
flags.DEFINE_integer("host", UNLIMITED, "Tokens of the host tier; 0: there is none.", 0)
flags.DEFINE_integer("flood", 150, "Programs of a flood of the workload.", 1)
flags.DEFINE_list("tenants", ["2", "10", "60"], "Numbers of tenants that share; the last is at most --programs.")
flags.DEFINE_integer("seeds", 2, "Runs of every cell where many share.", 1)
define_flags("bench_fairness")

PRICE_LOAD, OVERSUBSCRIPTION = 0.85, 1.5
"""Load of the machine where many share, and live contexts by the pool."""


class Times(NamedTuple):
    """Times of a tenant, in seconds."""

    jct_s: float
    jct_p99_s: float
    model_p99_s: float
    """Completion time without tools."""
    first_p99_s: float
    """From a request to its first token."""
    hits: float
    """Share of the tokens repeated from earlier requests of the same program that need not be computed again."""


def times_of(outcome: Outcome, prefix: str) -> Times:
    """The times of those programs whose id begins so."""
    records = [record for record in outcome.records if record.program.id.startswith(prefix) and record.spans]
    jct = [record.jct_s for record in records]
    first = [began - submitted for record in records for submitted, _, began, _ in record.spans]
    model = [record.jct_no_tool_s for record in records]
    repeated = sum(request.cached for record in records for request in record.program.requests)
    hits = sum(record.cached_tokens for record in records) / max(1, repeated)
    jct_p99_s, model_p99_s, first_p99_s = (float(np.percentile(of, 99)) for of in (jct, model, first))
    return Times(float(np.mean(jct)), jct_p99_s, model_p99_s, first_p99_s, hits)


def halved(machine: Machine) -> Machine:
    """The machine at half its speed."""
    steps = StepCosts(**{name: 2 * cost for name, cost in asdict(machine.steps).items()})
    return replace(machine, steps=steps, link_bytes_s=machine.link_bytes_s / 2)


def long_requests(count: int, prompt: int, output: int, until_s: float) -> list[TraceProgram]:
    """So many requests at once, and again halfway."""
    requests = (TraceRequest(0, prompt, output),)
    return [
        TraceProgram(f"flood-{wave}-{i}", requests, arrival_s=wave * until_s / 2)
        for wave in range(2)
        for i in range(count)
    ]


def beside_floods(policy: str) -> list[tuple[str, Times]]:
    """Times of a tenant alone and beside floods: as one tenant, with fairness, and with that of steps alone."""
    machine, workload = MACHINES[FLAGS.machine], FLAGS.workload
    prepared = prepare(workload, FLAGS.programs, 0, FLAGS.load, FLAGS.machine)
    own = [replace(p, id=f"own-{p.id}", owner="own") for p in prepared.programs]
    longest = max(p.longest for p in own)
    live = prepared.live_context * PRICE_LOAD / FLAGS.load  # of the machine under its usual load
    pool = max(int(live / OVERSUBSCRIPTION), 2 * longest + 8192)
    whole = Sizes(pool, host_tokens=FLAGS.host)
    half = replace(whole, pool_tokens=max(pool // 2, longest + 4096), max_seqs=whole.max_seqs // 2)

    def run(programs: Sequence[TraceProgram], machine: Machine, sizes: Sizes, *, pages: bool = True) -> Times:
        made = make_policy(policy)
        made.tenants_share_pages = pages
        return times_of(Simulator(programs, made, machine, sizes).run(), "own-")

    rows = [("alone", run(own, machine, whole)), ("alone on half the machine", run(own, halved(machine), half))]
    agents = [replace(p, id=f"flood-{i}", arrival_s=0.0) for i, p in enumerate(draw(workload, FLAGS.flood, 7))]
    until_s = max(p.arrival_s or 0.0 for p in own)
    floods = {
        "long requests": long_requests(1300, 4096, 2000, until_s),
        "long contexts": long_requests(200, 30_000, 500, until_s),
        f"{FLAGS.flood} programs": agents,
    }
    ways = (("own", True, "one tenant"), ("flood", False, "two, KV of either"), ("flood", True, "two tenants"))
    for name, flood in floods.items():
        for owner, pages, how in ways:
            together = [*(replace(p, owner=owner) for p in flood), *own]
            rows.append((f"beside {name}, as {how}", run(together, machine, whole, pages=pages)))
    return rows


def price(policy: str, tenants: int) -> tuple[float, float]:
    """Mean and 99th percentile of completion times where so many tenants share, by those of one tenant."""
    figures = []
    for seed in range(FLAGS.seeds):
        cell = Cell(FLAGS.workload, policy, programs=FLAGS.programs, seed=seed, load=PRICE_LOAD, machine=FLAGS.machine)
        prepared = prepare(cell.workload, cell.programs, seed, cell.load, cell.machine)
        dealt = np.random.default_rng(seed).permutation(len(prepared.programs)) % tenants
        shared = [replace(p, owner=f"tenant-{i}") for p, i in zip(prepared.programs, dealt.tolist(), strict=True)]
        sizes = Sizes(prepared.pool_tokens(cell), host_tokens=UNLIMITED)
        for programs in (prepared.programs, shared):
            outcome = Simulator(programs, make_policy(policy), MACHINES[cell.machine], sizes).run()
            figures.append(times_of(outcome, "")[:2])
    (alone, alone_p99), (mean, p99) = np.mean(figures[::2], axis=0), np.mean(figures[1::2], axis=0)
    return float(mean / alone), float(p99 / alone_p99)


def main(_: list[str]) -> None:
    sections, results = [], []
    for policy in FLAGS.policies:
        rows = beside_floods(policy)
        results += [{"policy": policy, "case": name, **times._asdict()} for name, times in rows]
        title = f"{policy}: a tenant of {FLAGS.programs} programs at {FLAGS.load:g} of the machine, seconds"
        columns = ("tenant", "mean JCT", "P99 JCT", "P99 JCT without tools", "P99 first token", "prefix hits")
        cells = [(name, *(f"{seconds:.1f}" for seconds in times[:-1]), f"{times.hits:.1%}") for name, times in rows]
        sections.append(Section(title, columns, cells))
        prices: list[tuple[str, ...]] = []
        for tenants in map(int, FLAGS.tenants):
            mean, p99 = price(policy, tenants)
            results.append({"policy": policy, "case": f"{tenants} tenants", "mean": mean, "p99": p99})
            prices.append((str(tenants), f"{mean - 1:+.1%}", f"{p99 - 1:+.1%}"))
        title = f"{policy}: completion times where many tenants share, by those of one, load {PRICE_LOAD:g}"
        if prices:
            sections.append(Section(title, ("tenants", "mean", "P99"), prices))
    publish("bench_fairness", sections, {"rows": results})


def run() -> None:
    """Run the benchmark."""
    run_main(main, __name__)
