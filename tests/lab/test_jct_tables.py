"""Tables of completion times, worked by hand and of simulated runs."""

from __future__ import annotations

import dataclasses

from astraea_jax.lab.jct_tables import completion_times, gaps
from astraea_jax.scheduler.simulation.experiment import Cell, simulate, summary


def row(policy, seed, mean, p99, predictor="online"):
    where = {"label": "w", "residency": "host", "oversubscription": 2.5}
    return {**where, "policy": policy, "predictor": predictor, "seed": seed, "mean_jct_s": mean, "p99_jct_s": p99}


def test_the_gap_is_between_fcfs_and_the_clairvoyant_order():
    base = [row("fcfs", 0, 100.0, 300.0), row("fcfs", 1, 200.0, 400.0)]
    bound = [row("srpt-clairvoyant", 1, 120.0, 400.0, "oracle"), row("srpt-clairvoyant", 0, 60.0, 300.0, "oracle")]
    ours = [row("astraea", 0, 80.0, 270.0), row("astraea", 1, 140.0, 440.0)]
    (section,) = gaps([*base, *ours, *bound])
    assert section.rows == [
        ("w, KV host", "2.5", "fcfs", "1.000", "0.000", "1.00", "1.00", "0%"),
        ("w, KV host", "2.5", "astraea", "0.750", "0.050", "1.00", "1.10", "62%"),
        ("w, KV host", "2.5", "srpt-clairvoyant", "0.600", "0.000", "1.00", "1.00", "100%"),
    ]


def test_a_gap_that_is_none_is_not_divided_by():
    rows = [row("fcfs", 0, 100.0, 300.0), row("srpt-clairvoyant", 0, 99.9, 300.0, "oracle")]
    (section,) = gaps(rows)
    assert [line[-1] for line in section.rows] == ["", ""]
    assert gaps(rows[:1]) == gaps(rows[1:]) == []


def test_a_policy_told_the_future_stands_beside_itself_without():
    cell = Cell("infercept-mix", "fcfs", programs=8)
    cells = [
        cell,
        dataclasses.replace(cell, policy="srpt-clairvoyant"),
        dataclasses.replace(cell, policy="astraea"),
        dataclasses.replace(cell, policy="astraea", predictor="oracle"),
    ]
    rows = [summary(cell, simulate(cell)) for cell in cells]
    names = ["fcfs", "srpt-clairvoyant", "astraea", "astraea (oracle)"]
    (times,), (section,) = completion_times(rows), gaps(rows)
    assert [line[0] for line in times.rows] == [line[2] for line in section.rows] == names
