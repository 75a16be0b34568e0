"""The study of fleets at its smallest size, what a placement costs, and what is refused."""

from __future__ import annotations

import json

from support.scripts import check_studies, run


def test_the_study_of_fleets_writes_its_rows_and_a_picture(tmp_path):
    table, plots = tmp_path / "rows.json", tmp_path / "plots"
    out = run(
        "scripts/bench_fleet.py",
        *("--programs=4", "--replicas=2,3", "--rules=pooled,astraea,sticky-until-saturated,thunderagent"),
        *("--workload=infercept-mix", "--die_s=5", "--back_s=9", "--steal_s=1"),
        *(f"--json={table}", f"--plots={plots}"),
    )
    assert "infercept-mix, 3 replicas, load 0.85, 1.5x oversubscribed, 12 programs, 1 seeds" in out
    rows = json.loads(table.read_text())["figures"]["rows"]
    assert len(rows) == 8
    assert all(row["programs"] == 4 * row["replicas"] for row in rows)
    assert [path.name for path in plots.iterdir()] == ["fleet_infercept-mix_1.5x.png"]


REFUSED = {
    "--rules=lifo": "'lifo' is none of",
    "--workload=nothing": "'nothing' is none of",
    "--replicas=0": "numbers from 1",
    "--replicas=1 --die_s=3": "numbers from 2",
    "--replicas=2.5": "not all numbers",
    "--oversubscription=nan": "numbers from 0.01",
    "--rules=astraea,astraea --replicas=2,4": "2 cells",
}
"""What cannot be studied, and what is said of it; what is named several times is run once."""

COSTS = """
from astraea_jax.lab import bench_fleet
bench_fleet.SIZES, bench_fleet.TIMED = ((4, 50),), 20
placements, reports = bench_fleet.costs()
assert placements.rows[0][:2] == ("4", "50")
assert reports.rows[0][1:3] == ("192", "768")
"""


def test_a_study_that_cannot_be_is_refused():
    check_studies("bench_fleet", REFUSED)


def test_costs_of_placements_and_reports_are_measured():
    run("-c", COSTS)  # flags of several benchmarks do not go into one process
