"""Rules of placement on a simulated fleet: on which replica should the next request of an agent run?

  python scripts/bench_fleet.py                                   one recorded workload, 4 replicas, every rule
  python scripts/bench_fleet.py --workload=swe-batch --replicas=2,4,8 --seeds=5 --plots=out
  python scripts/bench_fleet.py --rules=astraea,lmetric --die_s=200 --back_s=260
  python scripts/bench_fleet.py --cost                            microseconds of a placement, bytes of the reports

Every replica is the engine's own scheduler with the policy astraea and a host tier that is never full, on one virtual
clock; machines are computed from data sheets, not measured. A fleet of k replicas serves k times --programs, which
arrive k times as fast as one machine of --load would have them. Its pools hold 1 / --oversubscription of what its
programs hold in unlimited memory. `pooled` is one engine with the memory and the compute of all: a bound.
"""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from absl import app, flags
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from astraea_jax.frontends.flags import run_main
from astraea_jax.lab.record import Section, define_flags, publish
from astraea_jax.scheduler.placement import DECILES, Report
from astraea_jax.scheduler.prefix import beginnings
from astraea_jax.scheduler.router import Route, Router
from astraea_jax.scheduler.simulation.experiment import WORKLOADS, interval, ratio_interval
from astraea_jax.scheduler.simulation.fleet import Change, Reporting
from astraea_jax.scheduler.simulation.fleet_study import FLEET_RULES, POOLED, FleetCell, simulate, summary
from astraea_jax.scheduler.simulation.machines import MACHINES
from astraea_jax.scheduler.simulation.sharing import PRODUCTS, SHARING

AGAINST = "sticky-until-saturated"
"""llm-d's rule."""
SIZES = ((8, 1_000), (64, 10_000), (256, 100_000), (1000, 100_000))
"""Replicas and programs whose placement is timed."""
TIMED = 2000
"""Placements of each kind."""
IN_FLIGHT = 10
"""Requests of each replica that run while new programs are placed, so that many replicas have each beginning."""

FLAGS = flags.FLAGS
flags.DEFINE_list("workload", ["claude-code"], f"Some of {', '.join(WORKLOADS)}.")
flags.DEFINE_list("rules", list(FLEET_RULES), f"Some of {', '.join(FLEET_RULES)}.")
flags.DEFINE_list("replicas", ["4"], "Sizes of the fleet.")
flags.DEFINE_list("oversubscription", ["1.5"], "Live contexts over the pools.")
flags.DEFINE_integer("programs", 100, "Programs for each replica.", 1, 100_000)
flags.DEFINE_integer("seeds", 1, "Runs of every cell.", 1, 1000)
flags.DEFINE_float("load", 0.85, "Share of the machines' throughput that arrives.", 0.001, 1000)
flags.DEFINE_enum("machine", "h200-8b", list(MACHINES), "Cost model of a replica.")
flags.DEFINE_float("report_s", 1.0, "Seconds between two reports of a replica; 0: none.", 0.0, 3600.0)
flags.DEFINE_float(
    "steal_s", 0.0, "Seconds after which idle replicas look for requests to take over; 0: never.", 0.0, 60.0
)
flags.DEFINE_float("die_s", None, "Time at which the first replica dies.", 0.0)
flags.DEFINE_float("back_s", None, "Time at which it is back, with nothing.", 0.0)
flags.DEFINE_integer("jobs", 1, "Processes.", 1, 256)
flags.DEFINE_bool("cost", False, "Measure what a placement costs, instead.")
flags.DEFINE_string("plots", None, "Draw a picture into this folder.")
define_flags("bench_fleet")

console = Console(width=max(160, Console().width))
Result = tuple[dict[str, Any], np.ndarray]


def some_of(flag: str, allowed: Sequence[str]) -> list[str]:
    """The values of a flag, each of which must be one of ``allowed``."""
    values: list[str] = FLAGS[flag].value or []
    for value in values:
        if value not in allowed:
            raise app.UsageError(f"--{flag}: {value!r} is none of {', '.join(allowed)}")
    return list(dict.fromkeys(values))


def numbers(flag: str, kind: type, least: float) -> list[Any]:
    """The values of a flag as numbers that are at least ``least``."""
    try:
        found = [kind(x) for x in FLAGS[flag].value or []]
    except ValueError:
        raise app.UsageError(f"--{flag}: {FLAGS[flag].value} are not all numbers") from None
    if not found or not all(least <= x < 1e6 for x in found):
        raise app.UsageError(f"--{flag}: numbers from {least:g} are needed")
    return found


def study() -> list[FleetCell]:
    """All cells; those that run the same programs stand together."""
    died = [] if FLAGS.die_s is None else [Change(FLAGS.die_s, 0, "die")]
    back = [] if FLAGS.back_s is None else [Change(FLAGS.back_s, 0, "join")]
    axes = (
        some_of("workload", WORKLOADS),
        numbers("replicas", int, 1 + bool(died)),
        range(FLAGS.seeds),
        numbers("oversubscription", float, 0.01),
        some_of("rules", FLEET_RULES),
    )
    return [
        FleetCell(
            *(workload, rule, replicas, factor, seed, FLAGS.programs, FLAGS.load, FLAGS.machine),
            steal_s=FLAGS.steal_s,
            reporting=Reporting(FLAGS.report_s),
            changes=(*died, *back) if rule != POOLED else (),
        )
        for workload, replicas, seed, factor, rule in product(*axes)
    ]


def run_cell(cell: FleetCell) -> Result:
    outcome = simulate(cell)
    return summary(cell, outcome), np.array([r.jct_s for r in outcome.history.served])


def run_all(cells: Sequence[FleetCell]) -> Iterator[Result]:
    """Every cell, with a progress bar."""
    columns = (TextColumn("runs"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as bar, ProcessPoolExecutor(FLAGS.jobs) as pool:
        shown = bar.add_task("runs", total=len(cells))
        for result in pool.map(run_cell, cells):
            yield result
            bar.update(shown, advance=1)


def grouped(results: Sequence[Result]) -> dict[tuple[str, int, float], dict[str, list[Result]]]:
    """(workload, replicas, oversubscription) -> rule -> its runs, one per seed."""
    found: dict[tuple[str, int, float], dict[str, list[Result]]] = {}
    for result in results:
        row = result[0]
        group = found.setdefault((row["workload"], row["replicas"], row["oversubscription"]), {})
        group.setdefault(row["rule"], []).append(result)
    return found


def mean(runs: Sequence[Result], figure: str) -> float:
    """Mean of a figure over seeds."""
    return float(np.mean([row[figure] for row, _ in runs]))


def compared(runs: Sequence[Result], base: Sequence[Result] | None) -> str:
    """Ratio of mean completion times to those of a base, with its 95 % interval."""
    if base is None or base is runs:
        return "-"
    ratio, low, high = ratio_interval([jct for _, jct in runs], [jct for _, jct in base])
    return f"{ratio:.3f} ({low:.2f}-{high:.2f})"


def tables(results: Sequence[Result]) -> list[Section]:
    """A table for each workload, size of the fleet, and oversubscription."""
    columns = (
        *("rule", "mean JCT s", "vs llm-d's", "vs lmetric", f"vs {POOLED}", "P99 s", "vs llm-d's", "queue s", "hits"),
        "moves",
    )
    found = []
    for (workload, replicas, factor), group in grouped(results).items():
        table, base = [], group.get(AGAINST)
        for rule, runs in group.items():
            p99 = "-" if base is None else f"{mean(runs, 'p99_jct_s') / mean(base, 'p99_jct_s'):.2f}"
            table.append(
                (
                    *(rule, f"{mean(runs, 'mean_jct_s'):.1f}"),
                    *(compared(runs, group.get(other)) for other in (AGAINST, "lmetric", POOLED)),
                    *(f"{mean(runs, 'p99_jct_s'):.0f}", p99, f"{mean(runs, 'mean_queue_s'):.1f}"),
                    *(f"{mean(runs, 'prefix_hit'):.1%}", f"{mean(runs, 'moves'):.1%}"),
                )
            )
        programs, seeds = next(iter(group.values()))[0][0]["programs"], len(next(iter(group.values())))
        found.append(
            Section(
                f"{workload}, {replicas} replicas, load {FLAGS.load:g}, {factor:g}x oversubscribed, "
                f"{programs} programs, {seeds} seeds, {FLAGS.machine}",
                columns,
                table,
            )
        )
    return found


def full_router(replicas: int, programs: int) -> tuple[Router, np.random.Generator]:
    """A router of many replicas that have reported, and of programs that wait on them."""
    rng = np.random.default_rng(0)
    router = Router(max_programs=programs)
    for i in range(replicas):
        router.join(i, 0.0)
        router.report(i, some_report(rng), 0.0)
    for p in range(programs):
        tokens = int(rng.integers(1_000, 60_000))
        router.ended(router.route(p, tokens, 0.0), 0.0, context=tokens + 200)
    return router, rng


def some_report(rng: np.random.Generator) -> Report:
    """A report of a busy replica."""
    free, retained = rng.integers(0, 100_000, 2).tolist()
    waits = tuple(np.sort(rng.exponential(2.0, DECILES)).tolist())
    return Report(
        *(400_000, free, retained, 10**6, 600_000, 5e5, 20, 5, 15, waits, 3.2e-5, 0.012, 2.6e-6), sessions=100
    )


def later_us(router: Router, programs: int, rng: np.random.Generator) -> list[float]:
    """Microseconds of placing further requests of programs that wait."""
    times = []
    for n in range(TIMED):
        program, tokens = int(rng.integers(programs)), int(rng.integers(1_000, 60_000))
        began = time.perf_counter_ns()
        route = router.route(program, tokens, n * 1e-3)
        times.append((time.perf_counter_ns() - began) / 1e3)
        router.ended(route, n * 1e-3, context=tokens)
    return times


def first_us(router: Router, replicas: int, rng: np.random.Generator) -> tuple[list[float], list[float]]:
    """Microseconds of naming the beginnings of new programs' prompts, and of placing these programs.

    They are sessions of the products of ``claude-shared``.
    """
    common = SHARING["claude-shared"].prefix
    products = [rng.integers(100_000, size=common).tolist() for _ in range(PRODUCTS)]
    shares = 1 / np.arange(1, PRODUCTS + 1)
    running: deque[tuple[Route, int]] = deque()
    naming, placing = [], []
    for n, of in enumerate(rng.choice(PRODUCTS, 2 * IN_FLIGHT * replicas + TIMED, p=shares / shares.sum())):
        tokens = int(rng.integers(common + 1_000, 60_000))
        prompt = [*products[of], *range(n, n + tokens - common)]
        began = time.perf_counter_ns()
        prefixes = beginnings(prompt)
        named = time.perf_counter_ns()
        route = router.route(("new", n), tokens, n * 1e-3, prefixes=prefixes)
        placing.append((time.perf_counter_ns() - named) / 1e3)
        naming.append((named - began) / 1e3)
        running.append((route, tokens))
        if len(running) > IN_FLIGHT * replicas:
            over, context = running.popleft()
            router.ended(over, n * 1e-3, context=context)
    return naming[-TIMED:], placing[-TIMED:]


def report_us(router: Router, replicas: int, report: Report) -> float:
    """Microseconds of taking in a report."""
    began = time.perf_counter_ns()
    for n in range(1000):
        router.report(n % replicas, report, 2.0)
    return (time.perf_counter_ns() - began) / 1e6


def costs() -> list[Section]:
    """What placements and reports cost as the fleet grows."""
    placements, reports = [], []
    for replicas, programs in SIZES:
        router, rng = full_router(replicas, programs)
        later, (naming, placing) = later_us(router, programs, rng), first_us(router, replicas, rng)
        report = some_report(rng)
        times = [f"{q:.0f}" for of in (later, placing, naming) for q in np.percentile(of, (50, 99))]
        placements.append((f"{replicas:,}", f"{programs:,}", *times, f"{report_us(router, replicas, report):.0f}"))
        size = len(json.dumps(report.fields(), separators=(",", ":")))
        packed = 8 * len(report.fields())
        reports.append((f"{replicas:,}", f"{packed}", f"{packed * replicas:,}", f"{size}", f"{size * replicas:,}"))
    return [
        Section(
            "Placing a known program's request and a new program, naming the beginnings of its prompt, and taking in a "
            "report, in microseconds of one process",
            (
                *("replicas", "programs", "known P50", "known P99", "new P50", "new P99", "naming P50", "naming P99"),
                "report",
            ),
            placements,
            named=2,
        ),
        Section(
            "Reports once a second to one router, in bytes (computed: without headers of the transport)",
            ("replicas", "packed", "bytes/s", "JSON", "bytes/s as JSON"),
            reports,
        ),
    ]


def over_replicas(
    sizes: Mapping[int, Mapping[str, Sequence[Result]]], figure: str
) -> dict[str, list[tuple[float, float, float, float]]]:
    """Of every rule the mean of a figure, with its 95 % interval over seeds, by the number of replicas."""
    lines: dict[str, list[tuple[float, float, float, float]]] = {}
    for replicas, group in sizes.items():
        for rule, runs in group.items():
            values = [row[figure] for row, _ in runs]
            lines.setdefault(rule, []).append((replicas, float(np.mean(values)), *interval(values)))
    return lines


def draw_plot(results: Sequence[Result], folder: Path) -> None:
    from astraea_jax.lab.plots import sweep

    folder.mkdir(parents=True, exist_ok=True)
    groups = grouped(results)
    for workload, factor in dict.fromkeys((workload, factor) for workload, _, factor in groups):
        sizes = {replicas: group for (w, replicas, f), group in groups.items() if (w, f) == (workload, factor)}
        times, hits = (over_replicas(sizes, figure) for figure in ("mean_jct_s", "prefix_hit"))
        name = folder / f"fleet_{workload}_{factor:g}x.png"
        title = f"{workload}, load {FLAGS.load:g}, {factor:g}x oversubscribed, simulated"
        sweep(times, name, title, "replicas", hits)
    console.print(f"pictures in {folder}")


def main(_: list[str]) -> None:
    if FLAGS.cost:
        sections = costs()
        rows = {
            section.title: [dict(zip(section.columns, row, strict=True)) for row in section.rows]
            for section in sections
        }
        publish("bench_fleet", sections, rows, None, console=console)
        return
    results = list(run_all(study()))
    publish("bench_fleet", tables(results), {"rows": [row for row, _ in results]}, None, console=console)
    if FLAGS.plots:
        draw_plot(results, Path(FLAGS.plots))


def run() -> None:
    """Run the benchmark."""
    run_main(main, __name__)
