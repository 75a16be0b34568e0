"""The study of completion times, simulated and on the engine, at its smallest size; and what it refuses."""

from __future__ import annotations

import json
import re
import subprocess
import sys

from support.scripts import ROOT, check_studies, run


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
    assert "claude-code, load 0.85, KV host, 2x oversubscribed" in out
    rows = json.loads(table.read_text())["figures"]["rows"]
    assert [(r["policy"], r["oversubscription"]) for r in rows] == [
        (policy, factor) for factor in (0.5, 2.0) for policy in ("fcfs", "astraea")
    ]
    wanted = (
        "workload policy predictor residency oversubscription seed programs mean_jct_s p50_jct_s p90_jct_s p99_jct_s"
    )
    assert {*wanted.split(), "mean_jct_no_tool_s", "max_slowdown"} <= rows[0].keys()
    pictures = {path.name for path in plots.iterdir()}
    assert {"sweep_claude-code_load-0.85_host.png", "cdf_claude-code_load-0.85_host_2x.png"} <= pictures
    assert "timeline_claude-code_load-0.85_host_2x_astraea.png" in pictures


REFUSED = {
    "--policies=lifo": "no policy is called 'lifo'",
    "--policies=srpt-clairvoyant --backend=engine": "'srpt-clairvoyant'; --backend=engine has",
    "--policies=fcfs@nowhere": "'nowhere' is none of",
    "--workload=nothing": "no workload or trace file",
    "--workload=chat,a/swe.jsonl,b/swe.jsonl": "two have the same name",
    "--oversubscription=-1": "must be from 0.001 to 1000",
    "--oversubscription=1e-300": "must be from 0.001 to 1000",
    "--load=nan": "must be from 0.001 to 1000",
    "--load=": "there is nothing to run",
    "--context=1e18": "must be from 0 to",
    "--context=0.5": "not all whole numbers",
    "--context=1": "does not fit into 1 tokens",
    "--tool_scale=inf": "--tool_scale=inf",
    "--programs=0": "--programs=0",
    "--predictor=crystal": "'crystal' is none of",
    "--backend=engine --predictor=online,oracle": "an engine learns online",
    "--policies=fcfs,fcfs@host --load=0.85,0.850 --workload=chat,chat --programs=3": "1 cells",
}
"""What cannot be studied, and what is said of it; what is named several times is run once."""


def test_a_study_that_cannot_be_is_refused():
    check_studies("bench_jct", REFUSED)


def trace_of(folder, count):
    """A trace of short programs, or else the model would take a minute to say it all."""
    trace = folder / "short.jsonl"
    first = {"new_prompt_tokens": 40, "cached_prompt_tokens": 0, "output_tokens": 8}
    last = {"new_prompt_tokens": 20, "cached_prompt_tokens": 48, "output_tokens": 12, "tool": None}
    requests = [{**first, "tool": {"name": "search", "seconds": 1.0}}, last]
    trace.write_text("\n".join(json.dumps({"program": f"p{i}", "segments": requests}) for i in range(count)))
    return trace


SMALL = ("--backend=engine", "--max_seqs=8", "--max_step_tokens=32", "--kv_bytes=8000000", "--tool_scale=0.002")


def test_the_replay_compares_policies_and_tiers_on_the_engine_and_with_the_simulator(tmp_path):
    table, trace = tmp_path / "rows.json", trace_of(tmp_path, 6)
    out = run(
        "scripts/bench_jct.py",
        *(*SMALL, "--policies=fcfs@keep-lru,astraea@host", f"--trace={trace}", "--programs=6", "--context=60"),
        f"--json={table}",
    )
    rows = json.loads(table.read_text())["figures"]["rows"]
    assert [(row["policy"], row["residency"]) for row in rows] == [
        ("fcfs", "keep-lru"),
        ("fcfs simulated", "keep-lru"),
        ("astraea", "host"),
        ("astraea simulated", "host"),
    ]
    assert all(row["programs"] == 6 and row["context"] == 60 and row["cut"] == 0 for row in rows)
    assert all(0 < row["mean_jct_s"] < 60 for row in rows)
    assert "short to 60 tokens, load 0.85, 1.5x oversubscribed, 6 programs, 1 seeds, real engine" in out
    assert "The simulator beside the engine" in out


def test_a_study_without_time_says_what_it_leaves_out(tmp_path):
    flags = ("--policies=fcfs,plas", f"--trace={trace_of(tmp_path, 4)}", "--programs=4", "--context=60")
    out = run("scripts/bench_jct.py", *SMALL, *flags, "--json=", "--limit_s=1")
    assert "no time is left for fcfs, KV host" in out
    assert "no time is left for plas, KV host" in out


def test_sessions_that_do_not_fit_are_named(tmp_path):
    trace = trace_of(tmp_path, 1)
    for flags, words in (
        (("--context=3",), r"program 'p0#0' does not fit into 3 tokens: its 2 requests hold 4"),
        (("--context=0", "--kv_bytes=65536"), r"program 'p0#0' has a context of 80 tokens, and this engine serves"),
    ):
        command = [sys.executable, "scripts/bench_jct.py", *SMALL, f"--trace={trace}", "--programs=1", *flags]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode != 0
        assert re.search(words, done.stderr + done.stdout)
