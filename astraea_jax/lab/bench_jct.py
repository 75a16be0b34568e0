"""Job completion times of agent programs under every scheduling policy: which one finishes whole agents soonest?

  python scripts/bench_jct.py                       the shipped trace, five policies, half a minute
  python scripts/bench_jct.py --policies=all --workload=swe-batch --oversubscription=0.5,1,1.5,2.5 --seeds=5
  python scripts/bench_jct.py --trace=mine.jsonl --predictor=online,noise50 --residency=keep-lru,host --plots=out
  python scripts/bench_jct.py --backend=engine --context=4096,8192,16384 --programs=60 --seeds=5

The simulator (`scheduler/simulation/`) runs the engine's own scheduler on a virtual clock. Accelerator machines are
computed from data sheets, not measured; `cpu-tiny` is measured. Every figure names the KV tier (`--residency`):
keep-lru has no host memory; host has a host tier that is never full, with the adaptive strategy or the policy's own;
the other names are strategies with such a host tier. Workloads called family-… are made-up agents on which nothing in
the scheduler was tuned; family-change turns from one family to another in the middle.

The engine backend serves `--model` here, with lengths scaled to `--context` and tools sped up by `--tool_scale`, and
prints beside each run the simulation of that run, with the step costs fitted to it. Programs arrive at the rate that
this machine can work off, as its steps show before the first run. All runs share the compiled steps; `--limit_s` ends
the study early, with what there is.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from absl import app, flags
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from astraea_jax.engine.config import EngineConfig
from astraea_jax.errors import StartupError
from astraea_jax.frontends.flags import engine_flags, run_main
from astraea_jax.lab.jct_tables import completion_times, gaps, groups, residencies_compared, row_name
from astraea_jax.lab.record import Section, define_flags, publish
from astraea_jax.lab.roofline import Roofline
from astraea_jax.models.config import CheckpointError
from astraea_jax.models.published import PUBLISHED
from astraea_jax.scheduler.policies import ABLATION, POLICIES, SERVING
from astraea_jax.scheduler.simulation.experiment import (
    PREDICTORS,
    RESIDENCIES,
    WORKLOADS,
    Cell,
    draw,
    interval,
    simulate,
    summary,
)
from astraea_jax.scheduler.simulation.machines import MACHINES
from astraea_jax.scheduler.simulation.simulator import ProgramRecord
from astraea_jax.scheduler.simulation.trace import MOST_TOKENS

SIMULATED = ("fcfs", "program-fcfs", "plas", "astraea", "srpt-clairvoyant")
ON_ENGINE = ("fcfs@keep-lru", "fcfs@host", "astraea@host")

FLAGS = flags.FLAGS
flags.DEFINE_enum("backend", "sim", ["sim", "engine"], "Simulate, or replay against the real engine on this machine.")
flags.DEFINE_multi_string("trace", [], "Trace file to replay; repeatable.")
flags.DEFINE_list("workload", [], f"Workloads, of {', '.join(WORKLOADS)}; claude-code if neither is given.")
flags.DEFINE_list(
    "policies",
    [],
    f"Some of {', '.join(POLICIES)}; all; or ablation: astraea with one term left out at a time. POLICY@RESIDENCY runs "
    f"with that residency only. By default {', '.join(SIMULATED)}, and on the engine {', '.join(ON_ENGINE)}.",
)
flags.DEFINE_list("predictor", ["online"], f"Some of {', '.join(PREDICTORS)}.")
flags.DEFINE_list("residency", ["host"], f"Some of {', '.join(RESIDENCIES)}.")
flags.DEFINE_list("oversubscription", ["1.5"], "Live contexts over the KV pool.")
flags.DEFINE_integer("programs", 300, "Programs of a run.", 1, 100_000)
flags.DEFINE_integer("seeds", 1, "Runs of every cell.", 1, 1000)
flags.DEFINE_list("load", ["0.85"], "Shares of the machine's throughput that arrive.")
flags.DEFINE_list(
    "context", [], "Tokens that contexts are scaled to; 0: as recorded. By default 0, on the engine 4096."
)
flags.DEFINE_enum("machine", "h200-8b", list(MACHINES), "Cost model of the simulated machine.")
flags.DEFINE_float("tool_scale", None, "Factor on tool times; by default 1, and 0.1 on the engine.", 0.0, 1000.0)
flags.DEFINE_string(
    "model",
    "tiny-32k",
    f"Model of the engine: with random weights {', '.join(PUBLISHED)}; or a folder, or astraea-tiny.",
)
flags.DEFINE_float("limit_s", math.inf, "Seconds after which the engine's run is cut off and no other begins.", 1.0)
engine_config = engine_flags(
    *("max_seqs", "max_step_tokens", "page_size", "kv_bytes", "dtype", "attention"), max_seqs=32, max_step_tokens=256
)
define_flags("bench_jct")
flags.DEFINE_string("plots", None, "Draw pictures into this folder.")

console = Console(width=max(140, Console().width))
BEGAN = time.monotonic()


def arms() -> list[tuple[str, str]]:
    """Policies and the residencies that each runs with."""
    on_engine = FLAGS.backend == "engine"
    names: list[str] = []
    for name in FLAGS.policies or (ON_ENGINE if on_engine else SIMULATED):
        names += list(POLICIES) if name == "all" else list(ABLATION) if name == "ablation" else [name]
    known = SERVING if on_engine else [*POLICIES, *ABLATION]
    default = one_of("residency", FLAGS.residency)
    found = []
    for name in names:
        policy, at, own = name.partition("@")
        if policy not in known:
            raise app.UsageError(f"no policy is called {policy!r}; --backend={FLAGS.backend} has {', '.join(known)}")
        found += [(policy, residency) for residency in (one_of("policies", [own]) if at else default)]
    return found


def one_of(flag: str, values: list[str], allowed: Iterable[str] = RESIDENCIES) -> list[str]:
    for value in values:
        if value not in allowed:
            raise app.UsageError(f"--{flag}: {value!r} is none of {', '.join(allowed)}")
    return values


def numbers(flag: str, least: float, most: float) -> list[float]:
    """The values of a flag that must be numbers in a range."""
    try:
        found = [float(x) for x in FLAGS[flag].value or ()]
    except ValueError:
        raise app.UsageError(f"--{flag}: {FLAGS[flag].value} are not all numbers") from None
    if not all(least <= x <= most for x in found):
        raise app.UsageError(f"--{flag}: every one must be from {least:g} to {most:g}")
    return found


def contexts() -> list[int]:
    """The values of ``--context``."""
    found = numbers("context", 0, MOST_TOKENS)
    if not all(x.is_integer() for x in found):
        raise app.UsageError(f"--context: {FLAGS.context} are not all whole numbers")
    return [int(x) for x in found] or [4096 if FLAGS.backend == "engine" else 0]


def study() -> list[Cell]:
    """All cells of the study, each once; those that run the same programs stand together."""
    on_engine = FLAGS.backend == "engine"
    workloads = list(dict.fromkeys([*FLAGS.trace, *FLAGS.workload])) or ["claude-code"]
    if len({Path(name).stem for name in workloads}) < len(workloads):
        raise app.UsageError(f"{', '.join(workloads)}: two have the same name, by which the tables tell them apart")
    tool_scale = FLAGS.tool_scale if FLAGS.tool_scale is not None else 0.1 if on_engine else 1.0
    machine = f"{FLAGS.model} here" if on_engine else FLAGS.machine
    cells = [
        Cell(
            *(workload, policy, predictor, residency, factor, seed, FLAGS.programs, load, machine, context), tool_scale
        )
        for workload in workloads
        for context in contexts()
        for load in numbers("load", 0.001, 1000)
        for factor in numbers("oversubscription", 0.001, 1000)
        for seed in range(FLAGS.seeds)
        for predictor in one_of("predictor", FLAGS.predictor, PREDICTORS)
        for policy, residency in arms()
    ]
    if not cells:
        raise app.UsageError("there is nothing to run: a list is empty")
    if on_engine and set(FLAGS.predictor) != {"online"}:
        raise app.UsageError("--predictor: an engine learns online; oracles are for --backend=sim")
    try:
        for workload, context, seed in {(cell.workload, cell.context, cell.seed) for cell in cells}:
            draw(workload, FLAGS.programs, seed, context, tool_scale)
    except ValueError as error:
        raise app.UsageError(str(error)) from None
    return list(dict.fromkeys(cells))


def run_cell(cell: Cell) -> tuple[dict[str, Any], list[ProgramRecord]]:
    outcome = simulate(cell)
    return summary(cell, outcome), outcome.records


def run_all(cells: Sequence[Cell]) -> list[tuple[dict[str, Any], list[ProgramRecord]]]:
    """Every cell, several at a time."""
    columns = (TextColumn("runs"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    results = []
    with Progress(*columns, console=console) as bar, ProcessPoolExecutor(os.cpu_count()) as pool:
        shown = bar.add_task("runs", total=len(cells))
        chunk = max(1, min(len(arms()), len(cells) // (2 * (os.cpu_count() or 1))))
        for result in pool.map(run_cell, cells, chunksize=chunk):
            results.append(result)
            bar.update(shown, advance=1)
    return results


def study_on_engine(cells: Sequence[Cell]) -> tuple[list[Section], list[tuple[dict[str, Any], list[ProgramRecord]]]]:
    """Every cell on the real engine, and its simulation: tables and rows."""
    from astraea_jax.lab.engine_study import Study, costs_of, named, tables
    from astraea_jax.lab.replay import Replayer

    longest = max(cell.context for cell in cells) or None
    replayer = Replayer(FLAGS.model, engine_config(max_context=longest, max_queued=8192))
    for workload, context, seed in {(cell.workload, cell.context, cell.seed) for cell in cells}:
        replayer.check(draw(workload, FLAGS.programs, seed, context))
    replayer.compile()
    console.print(f"{FLAGS.model} is ready, with room for {replayer.tokens:,} tokens", highlight=False)
    study = Study(replayer, console, BEGAN + FLAGS.limit_s)
    runs = study.run(cells)
    for run in runs:
        what = f"{run.cell.label}, {run.cell.oversubscription:g}x, seed {run.cell.seed}, {named(run.cell)}"
        console.print(f"steps of {what}: {costs_of(run.replayed.machine)}", highlight=False)
    pairs = study.simulate(runs)
    results = [
        (row, outcome.records)
        for pair in pairs
        for row, outcome in zip(pair.rows(), (pair.run.replayed.outcome, pair.simulated), strict=False)
        if outcome is not None
    ]
    return tables(pairs), results


def slug(label: str) -> str:
    """A label as part of a file's name."""
    return label.replace(", ", "_").replace(" ", "-")


def draw_plots(results: Sequence[tuple[dict[str, Any], list[ProgramRecord]]], folder: Path) -> None:
    from astraea_jax.lab.plots import distributions, simulated_timelines, sweep

    folder.mkdir(parents=True, exist_ok=True)
    rows = [row for row, _ in results]
    lines: dict[tuple[str, str], dict[str, list[tuple[float, float, float, float]]]] = {}
    for (workload, residency, factor), group in groups(rows).items():
        name = f"{slug(workload)}_{residency}_{factor:g}x"
        jct: dict[str, list[float]] = {}
        for (policy, predictor), runs in group.items():
            label = row_name(policy, predictor)
            jct[label] = [r.jct_s for row, records in results if row in runs for r in records]
            means = [r["mean_jct_s"] for r in runs]
            lines.setdefault((workload, residency), {}).setdefault(label, []).append(
                (factor, float(np.mean(means)), *interval(means))
            )
        distributions(jct, folder / f"cdf_{name}.png", f"{workload}, KV {residency}, {factor:g}x oversubscribed")
    for (workload, residency), found in lines.items():
        if len(next(iter(found.values()))) > 1:
            sweep(found, folder / f"sweep_{slug(workload)}_{residency}.png", f"{workload}, KV {residency}")
    for row, records in results:
        if row["seed"] == 0 and row["policy"] in ("fcfs", "astraea") and row["predictor"] == "online":
            name = f"{slug(row['label'])}_{row['residency']}_{row['oversubscription']:g}x_{row['policy']}"
            simulated_timelines(records[:100], folder / f"timeline_{name}.png", name.replace("_", ", "))
    console.print(f"pictures in {folder}")


def main(_: list[str]) -> None:
    cells = study()
    if FLAGS.backend == "engine":
        roofline = Roofline.measure(EngineConfig().weight_dtype())
        try:
            sections, results = study_on_engine(cells)
        except (CheckpointError, StartupError) as error:
            raise SystemExit(f"bench_jct: {error}") from error
    else:
        roofline, results = None, run_all(cells)
        rows = [row for row, _ in results]
        sections = [*completion_times(rows), *residencies_compared(rows), *gaps(rows)]
    publish("bench_jct", sections, {"rows": [row for row, _ in results]}, roofline, console=console)
    if FLAGS.plots:
        draw_plots(results, Path(FLAGS.plots))


def run() -> None:
    """Run the benchmark."""
    run_main(main, __name__)
