"""Tables of completion times, of runs under several policies, predictors and residencies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from astraea_jax.lab.record import Section
from astraea_jax.scheduler.simulation.experiment import interval

LEAST_GAP = 0.01
"""Share of a mean below which a gap is not told from none."""


def groups(rows: Sequence[dict[str, Any]]) -> dict[tuple[Any, ...], dict[tuple[str, str], list[dict[str, Any]]]]:
    """(label of the workload, residency, oversubscription) -> (policy, predictor) -> its rows, one per seed."""
    found: dict[tuple[Any, ...], dict[tuple[str, str], list[dict[str, Any]]]] = {}
    for row in rows:
        group = found.setdefault((row["label"], row["residency"], row["oversubscription"]), {})
        group.setdefault((row["policy"], row["predictor"]), []).append(row)
    return found


def row_name(policy: str, predictor: str) -> str:
    """Name a policy, and what it predicts by unless that goes without saying."""
    return policy if predictor == "online" or policy == "srpt-clairvoyant" else f"{policy} ({predictor})"


def completion_times(rows: Sequence[dict[str, Any]]) -> list[Section]:
    """A table per workload, residency and oversubscription."""
    found = []
    for (workload, residency, factor), group in groups(rows).items():
        first = next((runs for (policy, _), runs in group.items() if policy == "fcfs"), next(iter(group.values())))
        title = (
            f"{workload}, KV {residency}, {factor:g}x oversubscribed, "
            f"{first[0]['programs']} programs, {len(first)} seeds, {first[0]['machine']}"
        )
        columns = (
            *("policy", "mean JCT s", "95 %", f"vs {first[0]['policy']}", "P50", "P90", "P99", "no tools", "max slow-"),
            *("hit", "again", "moved GB", "preempt", "us/step"),
        )
        base = np.array([r["mean_jct_s"] for r in first])
        table = []
        for (policy, predictor), runs in group.items():
            mean = lambda key, runs=runs: float(np.mean([r[key] for r in runs]))  # noqa: E731
            low, high = interval([r["mean_jct_s"] for r in runs])
            ratio = float(np.mean(np.array([r["mean_jct_s"] for r in runs]) / base))
            table.append(
                (
                    row_name(policy, predictor),
                    f"{mean('mean_jct_s'):.1f}",
                    f"{low:.0f}-{high:.0f}",
                    f"{ratio:.3f}",
                    *(f"{mean(k):.0f}" for k in ("p50_jct_s", "p90_jct_s", "p99_jct_s", "mean_jct_no_tool_s")),
                    f"{mean('max_slowdown'):.1f}",
                    f"{mean('prefix_hit'):.0%}",
                    f"{mean('recomputed_tokens') / 1e6:.1f}M",
                    f"{mean('moved_bytes') / 1e9:.0f}",
                    f"{mean('preemptions'):.0f}",
                    f"{mean('scheduler_us_per_step'):.0f}",
                )
            )
        found.append(Section(title, columns, table))
    return found


def residencies_compared(rows: Sequence[dict[str, Any]]) -> list[Section]:
    """Compare residencies per policy, by mean completion time and bytes moved; no table if there is only one."""
    names = list(dict.fromkeys(row["residency"] for row in rows))
    if len(names) < 2:
        return []
    cells: dict[tuple[Any, ...], dict[str, list[dict[str, Any]]]] = {}
    for row in rows:
        key = (row["label"], row["oversubscription"], row["policy"])
        cells.setdefault(key, {}).setdefault(row["residency"], []).append(row)
    table = []
    for (workload, factor, policy), by_name in cells.items():
        keys = ("mean_jct_s", "p99_jct_s", "moved_bytes")
        means = {name: [float(np.mean([r[key] for r in by_name[name]])) for key in keys] for name in names}
        base_s, base_p99, moved = means[names[0]]
        others = [
            f"{mean / base_s:.3f} ({p99 / base_p99:.2f}; {moved / 1e9:,.0f})"
            for mean, p99, moved in (means[name] for name in names[1:])
        ]
        table.append((workload, policy, f"{factor:g}", f"{base_s:.1f} ({moved / 1e9:,.0f})", *others))
    title = f"Mean JCT against KV {names[0]} (P99 against it; GB moved)"
    return [Section(title, ("workload", "policy", "x", f"{names[0]}, s", *names[1:]), table, named=2)]


def gaps(rows: Sequence[dict[str, Any]]) -> list[Section]:
    """Tell how much of the gap from ``fcfs`` to the clairvoyant order each policy closes; no table without both.

    Ratios are means over seeds of those of equal programs.
    """
    table = []
    for (workload, residency, factor), group in groups(rows).items():
        by_seed = {name: {row["seed"]: row for row in runs} for name, runs in group.items()}
        base, bound = by_seed.get(("fcfs", "online")), by_seed.get(("srpt-clairvoyant", "oracle"))
        if base is None or bound is None:
            continue
        gap = 1 - _against(base, bound, "mean_jct_s").mean()
        for (policy, predictor), runs in by_seed.items():
            mean, p99 = (_against(base, runs, key) for key in ("mean_jct_s", "p99_jct_s"))
            error = f"{mean.std(ddof=1) / len(mean) ** 0.5:.3f}" if len(mean) > 1 else ""
            closed = f"{(1 - mean.mean()) / gap:.0%}" if gap >= LEAST_GAP else ""
            told = f"{mean.mean():.3f}", error, f"{p99.mean():.2f}", f"{p99.max():.2f}", closed
            table.append((f"{workload}, KV {residency}", f"{factor:g}", row_name(policy, predictor), *told))
    columns = ("workload", "x", "policy", "mean JCT", "std error", "P99", "its highest", "gap closed")
    title = "Against fcfs, and the share of its gap to srpt-clairvoyant"
    return [Section(title, columns, table, named=3)] if table else []


def _against(base: Mapping[int, dict[str, Any]], runs: Mapping[int, dict[str, Any]], key: str) -> np.ndarray:
    """A figure of each seed's run against the same of its base."""
    return np.array([runs[seed][key] / base[seed][key] for seed in base])
