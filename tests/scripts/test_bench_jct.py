"""The study of completion times, simulated and on the engine, at its smallest size; and what it refuses."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from support.scripts import ROOT, run


def test_the_study_of_completion_times_writes_its_rows_and_pictures(tmp_path):
    table, plots = tmp_path / "rows.json", tmp_path / "plots"
    out = run(
        "scripts/bench_jct.py",
        *(
            "--policies=fcfs,astraea",
            "--programs=12",
            "--oversubscription=0.5,2",
            f"--json={table}",
            f"--plots={plots}",
        ),
    )
    assert "claude-code, KV host, 2x oversubscribed" in out
    rows = json.loads(table.read_text())["figures"]["rows"]
    assert [(r["policy"], r["oversubscription"]) for r in rows] == [
        (policy, factor) for factor in (0.5, 2.0) for policy in ("fcfs", "astraea")
    ]
    wanted = (
        "workload policy predictor residency oversubscription seed programs mean_jct_s p50_jct_s p90_jct_s p99_jct_s"
    )
    assert {*wanted.split(), "mean_jct_no_tool_s", "max_slowdown"} <= rows[0].keys()
    pictures = {path.name for path in plots.iterdir()}
    assert {"sweep_claude-code_host.png", "cdf_claude-code_host_2x.png"} <= pictures
    assert "timeline_claude-code_host_2x_astraea.png" in pictures


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--policies=lifo", "no policy is called 'lifo'"),
        (
            "--policies=srpt-clairvoyant --backend=engine",
            "'srpt-clairvoyant'; --backend=engine has",
        ),
        ("--workload=nothing", "no workload or trace file"),
        ("--oversubscription=-1", "must be above 0"),
        ("--predictor=crystal", "'crystal' is none of"),
    ],
)
def test_a_study_that_cannot_be_is_refused(flags, words):
    command = [sys.executable, "scripts/bench_jct.py", *flags.split()]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode != 0
    assert words in done.stderr + done.stdout


SMALL_STEPS = """
import runpy, sys
from astraea_jax.lab import replay
replay.SEQS, replay.STEP_TOKENS = 8, 32
sys.argv[0] = "scripts/bench_jct.py"
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_the_replay_compares_engine_and_simulator(tmp_path):
    """On short programs and in small steps, or else the model would take a minute to say it all, and to compile."""
    table, trace = tmp_path / "rows.json", tmp_path / "short.jsonl"
    first = {"new_prompt_tokens": 40, "cached_prompt_tokens": 0, "output_tokens": 8}
    last = {"new_prompt_tokens": 20, "cached_prompt_tokens": 48, "output_tokens": 12, "tool": None}
    requests = [{**first, "tool": {"name": "search", "seconds": 1.0}}, last]
    trace.write_text("\n".join(json.dumps({"program": f"p{i}", "segments": requests}) for i in range(6)))
    run(
        *("-c", SMALL_STEPS),
        *("--backend=engine", "--policies=astraea", f"--trace={trace}", "--programs=6", "--tool_scale=0.002"),
        f"--json={table}",
    )
    real, simulated = json.loads(table.read_text())["figures"]["rows"]
    assert (real["policy"], simulated["policy"]) == ("astraea", "astraea simulated")
    assert real["programs"] == simulated["programs"] == 6
    assert 0 < real["mean_jct_s"] < 60
