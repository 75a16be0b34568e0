"""The study of fleets at its smallest size, what a placement costs, and what is refused."""

from __future__ import annotations

import json
import subprocess
import sys

from support.scripts import ROOT, run


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

ASK_ALL = """
import json, sys
from absl import app, flags
from absl.testing import flagsaver
from astraea_jax.lab import bench_fleet
for line in json.load(sys.stdin):
    with flagsaver.flagsaver():
        try:
            flags.FLAGS(["bench_fleet", *line.split()])
            print(json.dumps(f"{len(bench_fleet.study())} cells"))
        except (app.UsageError, flags.Error) as error:
            print(json.dumps(str(error)))
bench_fleet.SIZES = ((4, 50),)
placements, reports = bench_fleet.costs()
assert placements.rows[0][:2] == ("4", "50")
assert reports.rows[0][1:3] == ("192", "768")
"""


def test_a_study_that_cannot_be_is_refused_and_costs_are_measured():
    asked = json.dumps([*REFUSED])
    done = subprocess.run([sys.executable, "-c", ASK_ALL], cwd=ROOT, input=asked, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for (line, words), said in zip(REFUSED.items(), map(json.loads, done.stdout.splitlines()), strict=True):
        assert words in said, line
