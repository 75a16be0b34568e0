"""Completion times on the real engine: the same programs under one policy and KV tier after the other, and simulated.

All runs share the compiled steps. Every seed draws its programs and their arrivals once; the order of the runs turns
from seed to seed, so that a machine that slows down with time favours nobody.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from astraea_jax.lab.record import Section
from astraea_jax.lab.replay import Replayed, Replayer, Setting
from astraea_jax.scheduler.simulation.experiment import (
    Cell,
    Prepared,
    draw,
    interval,
    ratio_interval,
    residency_of,
    summary,
)
from astraea_jax.scheduler.simulation.machines import Machine
from astraea_jax.scheduler.simulation.simulator import Outcome


@dataclass(frozen=True)
class Run:
    """One run on the engine."""

    cell: Cell
    setting: Setting
    prepared: Prepared
    replayed: Replayed
    took_s: float

    @property
    def jct_s(self) -> np.ndarray:
        return np.array([r.jct_s for r in self.replayed.outcome.records])


@dataclass(frozen=True)
class Pair:
    """A run and its simulation."""

    run: Run
    simulated: Outcome | None

    @property
    def simulated_s(self) -> np.ndarray:
        """Simulated completion times; programs are cut off when they were in the run."""
        assert self.simulated is not None
        stop = self.run.took_s if self.run.replayed.cut else math.inf
        return np.array([max(0.0, min(r.ended, stop) - r.arrival) for r in self.simulated.records])

    def rows(self) -> list[dict[str, Any]]:
        """The figures of both."""
        run = self.run
        found = {"pool_tokens": run.setting.pool_tokens, "cut": run.replayed.cut, "took_s": run.took_s}
        rows = [{**summary(run.cell, run.replayed.outcome, run.replayed.machine), **found}]
        if self.simulated is not None:
            cell = replace(run.cell, policy=f"{run.cell.policy} simulated")
            rows.append({**summary(cell, self.simulated, run.replayed.machine), **found})
        return rows


class Study:
    """Runs cells on one engine's compiled steps, until it is late.

    Args:
        replayer: the model.
        console: where each run is told of as it ends.
        until: time by ``time.monotonic`` at which the run in progress is cut off, and after which none begins.
        run_limit_s: seconds after which any run is cut off.
    """

    def __init__(self, replayer: Replayer, console: Console, until: float = math.inf, run_limit_s: float = math.inf):
        self._replayer, self._console, self._until, self._run_limit_s = replayer, console, until, run_limit_s
        self._here: dict[tuple[str, int], Machine] = {}
        """The machine as the workload's steps show it, by workload and context; it sets the rate of arrival."""
        self._prepared: dict[Cell, Prepared] = {}

    def run(self, cells: Sequence[Cell]) -> list[Run]:
        """Run cells, of which those with the same programs stand together."""
        columns = (TextColumn("programs"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        runs: list[Run] = []
        with Progress(*columns, console=self._console) as bar:
            shown = bar.add_task("programs", total=sum(cell.programs for cell in cells))
            for number, (first, same) in enumerate(groupby(cells, lambda c: replace(c, policy="", residency="host"))):
                prepared = self._prepare(first)
                arms = list(same)
                for cell in arms if number % 2 == 0 else reversed(arms):
                    if (left_s := self._until - time.monotonic()) <= 0:
                        self._console.print(f"no time is left for {named(cell)}")
                        continue
                    setting = Setting(cell.policy, prepared.pool_tokens(cell), *residency_of(cell))
                    began = time.monotonic()
                    limit_s = min(left_s, self._run_limit_s)
                    replayed = self._replayer.run(
                        prepared.programs, setting, lambda: bar.update(shown, advance=1), limit_s
                    )
                    runs.append(Run(cell, setting, prepared, replayed, time.monotonic() - began))
                    self._console.print(told(runs[-1]), highlight=False)
        return runs

    def simulate(self, runs: Iterable[Run]) -> list[Pair]:
        """Simulate what has run, while there is time."""
        pairs = []
        for run in runs:
            late = time.monotonic() > self._until
            machine = run.replayed.machine
            outcome = None if late else self._replayer.simulate(run.prepared.programs, run.setting, machine)
            pairs.append(Pair(run, outcome))
        return pairs

    def _prepare(self, cell: Cell) -> Prepared:
        same = replace(cell, oversubscription=1.0)
        if same not in self._prepared:
            self._prepared[same] = self._drawn(same)
        return self._prepared[same]

    def _drawn(self, cell: Cell) -> Prepared:
        programs = draw(cell.workload, cell.programs, cell.seed, cell.context, cell.tool_scale)
        key = (cell.workload, cell.context)
        if key not in self._here:
            self._here[key] = self._replayer.measure(programs, self._until - time.monotonic())
        return self._replayer.let_arrive(programs, self._here[key], cell.load, cell.seed)


def named(cell: Cell) -> str:
    """What tells a run from others of the same programs."""
    return f"{cell.policy}, KV {cell.residency}"


def costs_of(machine: Machine) -> str:
    """Step costs for people."""
    s = machine.steps
    return (
        f"{1e3 * s.base_s:.2f} ms + {1e3 * s.per_prefill_s:.2f} ms with prefill + {1e6 * s.per_token_s:.1f} us a token "
        f"+ {1e9 * s.per_context_s:.1f} ns per context token + {1e9 * s.per_pair_s:.2f} ns per prefilled pair; "
        f"{machine.kv_bytes / 1024:.0f} KiB of KV a token"
    )


def told(run: Run) -> str:
    """A run as it ends, for people."""
    outcome, jct = run.replayed.outcome, run.jct_s
    cut = f", at least: {run.replayed.cut} of {len(jct)} programs were cut off" if run.replayed.cut else ""
    what = (
        f"{run.cell.label}, {run.cell.oversubscription:g}x ({run.setting.pool_tokens:,} tokens), seed {run.cell.seed}"
    )
    return (
        f"{what}, {named(run.cell)}: mean JCT {jct.mean():.1f} s{cut}; "
        f"{outcome.stats.recomputed_tokens:,} tokens computed again, {outcome.steps:,} steps in {run.took_s:.0f} s"
    )


def tables(pairs: Sequence[Pair]) -> list[Section]:
    """A table per workload, context, load and oversubscription; and one of the simulator's errors."""
    groups: dict[tuple[str, float], dict[str, list[Pair]]] = {}
    for pair in sorted(pairs, key=lambda pair: pair.run.cell.seed):
        c = pair.run.cell
        arms = groups.setdefault((c.label, c.oversubscription), {})
        arms.setdefault(named(c), []).append(pair)
    found = [_completion_times(group, arms) for group, arms in groups.items()]
    errors = [_error(group, name, arm) for group, arms in groups.items() for name, arm in arms.items()]
    columns = ("workload", "policy and KV tier", "engine: mean JCT s", "P99", "simulator", "P99", "mean differs by")
    if rows := [row for row in errors if row]:
        found.append(Section("The simulator beside the engine", columns, rows, named=2))
    return found


def _completion_times(group: tuple[str, float], arms: dict[str, list[Pair]]) -> Section:
    label, factor = group
    names = list(arms)
    first = arms[names[0]]
    title = f"{label}, {factor:g}x oversubscribed, {len(first[0].run.jct_s)} programs, {len(first)} seeds, real engine"
    columns = ("policy and KV tier", "mean JCT s", "95 %", f"of {names[0]}", "95 %")
    rows = []
    for name, arm in arms.items():
        jct, outcomes = [pair.run.jct_s for pair in arm], [pair.run.replayed.outcome for pair in arm]
        cut = "≥ " if any(pair.run.replayed.cut for pair in arm) else ""
        seeds = {pair.run.cell.seed for pair in arm}
        base = [pair.run.jct_s for pair in first if pair.run.cell.seed in seeds]
        ratio, low, high = ratio_interval(jct, base) if len(base) == len(jct) else (math.nan,) * 3
        most = "≤ " if not cut and any(pair.run.replayed.cut for pair in first) else ""
        of = interval([x.mean() for x in jct] if len(jct) >= 3 else np.concatenate(jct).tolist())
        every = np.concatenate(jct)
        rows.append(
            (
                name,
                f"{cut}{every.mean():.2f}",
                f"{of[0]:.1f}-{of[1]:.1f}",
                f"{most}{ratio:.3f}",
                f"{low:.3f}-{high:.3f}",
                *(f"{np.percentile(every, q):.1f}" for q in (50, 99)),
                f"{np.mean([o.stats.recomputed_tokens for o in outcomes]):,.0f}",
                f"{np.mean([_moved_gb(pair.run) for pair in arm]):.2f}",
            )
        )
    return Section(title, (*columns, "P50", "P99", "computed again", "moved GB"), rows)


def _error(group: tuple[str, float], name: str, arm: Sequence[Pair]) -> tuple[str, ...] | None:
    both = [(pair.run.jct_s, pair.simulated_s) for pair in arm if pair.simulated is not None]
    if not both:
        return None
    real, simulated = (np.concatenate(side) for side in zip(*both, strict=True))
    label, factor = group
    return (
        f"{label}, {factor:g}x",
        name,
        *(f"{figure:.2f}" for side in (real, simulated) for figure in (side.mean(), np.percentile(side, 99))),
        f"{simulated.mean() / real.mean() - 1:+.1%}",
    )


def _moved_gb(run: Run) -> float:
    stats, page = run.replayed.outcome.stats, run.replayed.page_bytes
    return (stats.offloaded_pages + stats.restored_pages) * page / 1e9
