"""The tables of bench_peers.py, and the program on our own engine."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from support.forked import say
from support.scripts import ROOT, run

from astraea_jax.lab.peer_engines import Ready, Served
from astraea_jax.lab.peer_tables import (
    WORKLOADS,
    Workload,
    engines_section,
    figures_section,
    ratios_section,
    same_tokens,
    spread,
)

LOADS = {"one": WORKLOADS["one"]}


def served(seconds, tokens=((1, 2, 3, 4),), ttft=0.5):
    return Served(seconds, [seconds] * len(tokens), [ttft] * len(tokens), [list(of_one) for of_one in tokens])


RESULTS = {
    "astraea": {"one": [served(1.0), served(2.0), served(4.0)]},
    "other": {"one": [served(2.0), served(2.0, [(1, 2, 3, 5)], ttft=1.0)]},  # failed at the third
    "unlike": {"one": []},  # failed at the first
}


def test_figures_are_medians_with_ranges():
    section = figures_section(RESULTS, LOADS, "a title")
    assert section.columns[2:] == ("astraea", "other", "unlike")
    assert section.rows[0][1:] == ("tok/s", "2.0 (1.0-4.0)", "2.0 (2.0-2.0)", "")
    assert section.rows[1][1:] == ("TTFT, s (less is better)", "0.500 (0.500-0.500)", "0.750 (0.500-1.000)", "")


def test_a_ratio_is_of_one_repetition():
    section = ratios_section(RESULTS, LOADS)
    assert section.columns[2:] == ("other", "unlike")
    assert section.rows == [
        ("one", "tok/s", "1.50 (1.00-2.00)", ""),
        ("one", "TTFT, s (less is better)", "0.75 (0.50-1.00)", ""),
    ]


def test_engines_that_were_left_out_are_named():
    states = {"astraea": Ready("1", "fast", 2.0), "other": Ready("2", "too", 3.0), "unlike": "failed", "absent": "why"}
    rows = engines_section(RESULTS, states).rows
    assert rows == [
        ("astraea", "1", "2 s", "", "fast"),
        ("other", "2", "3 s", "1 of 2", "too"),
        ("unlike", "", "", "", "failed"),
        ("absent", "", "", "", "why"),
    ]


def test_spread_of_one_value_is_that_value():
    assert [spread(values, 1) for values in ([], [1.26], [3.0, 1.0])] == ["", "1.3", "2.0 (1.0-3.0)"]


def test_programs_are_compared_one_by_one():
    assert same_tokens([served(1, [(1,), (2,)])], [served(1, [(1,), (3,)])]) == (1, 2)
    assert same_tokens([served(1)], []) == (0, 0)


def test_every_repetition_has_other_tokens_and_every_engine_the_same():
    load = Workload(3, 2, 5, 4, ()).load(100, seed=1)
    assert load == Workload(3, 2, 5, 4, ()).load(100, seed=1)
    assert load.programs != Workload(3, 2, 5, 4, ()).load(100, seed=2).programs
    assert [[len(turn) for turn in program] for program in load.programs] == [[5, 5]] * 3
    assert {token for program in load.programs for turn in program for token in turn} <= set(range(100))


def test_ours_is_measured_where_no_other_engine_is_installed(tmp_path):
    record, lock = tmp_path / "runs.jsonl", tmp_path / "lock"
    said = run(
        "scripts/bench_peers.py",
        *("--model=astraea-tiny", "--peers=sglang,llama.cpp", "--peer_python=sglang=/nowhere/python"),
        *("--workloads=few", "--pool=2048", "--host_mib=0", "--repeats=1", f"--json={record}", f"--lock={lock}"),
    )
    assert "/nowhere/python does not run" in said
    assert "pip install xllamacpp" in said
    figures = json.loads(record.read_text())["figures"]
    assert figures["results"]["astraea"]["few"]["tok/s"][0] > 0
    assert set(figures["engines"]) == {"astraea", "sglang", "llama.cpp"}
    assert lock.exists()


START_AND_MEASURE = """
import contextlib, pathlib, sys
from absl import flags
from astraea_jax.lab import bench_peers as bench
from astraea_jax.lab.peer_engines import Setup
flags.FLAGS(["bench_peers", "--peer_python=vllm=" + sys.argv[1]])
with contextlib.ExitStack() as stack:
    processes, states = bench.start(["vllm"], Setup("", "float32", 1, 1, 1, 0), pathlib.Path(sys.argv[2]), stack)
    print(bench.measure(processes, {key: bench.WORKLOADS[key] for key in ("one", "few")}, 100, states), states)
"""


def start_and_measure(folder, script):
    """Start and measure one engine whose Python is a script."""
    python = folder / "python"
    python.write_text(f"#!/bin/bash\n{script}\n")
    python.chmod(0o755)
    command = [sys.executable, "-c", START_AND_MEASURE, python, folder]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=380)


def test_an_interrupt_ends_what_is_being_started(tmp_path):
    pid = tmp_path / "pid"
    done = start_and_measure(tmp_path, f"echo $$ > {pid}; sleep 2; kill -INT $PPID; exec sleep 60")
    assert "KeyboardInterrupt" in done.stderr
    with pytest.raises(ProcessLookupError):
        os.killpg(int(pid.read_text()), 0)


def test_engines_may_fail_until_none_is_left(tmp_path):
    done = start_and_measure(tmp_path, """echo '{"version": "1", "note": "", "start_s": 1.0}'; read load""")
    assert done.stdout == "{'vllm': {'one': [], 'few': []}} {'vllm': '1 failed at one: ended'}\n", done.stderr


@pytest.mark.parametrize(
    ("flag", "said"),
    [
        ("--workloads=", "give at least one"),
        ("--lock=/nowhere/lock", "No such file"),
        ("--peer_python=vllm,torch=", "'vllm' must be one of"),
        ("--pool=500", "a context has up to 1000 tokens"),
    ],
)
def test_wrong_flags_are_told(flag, said):
    status, words = say("scripts/bench_peers.py", flag)
    assert status == 1
    assert said in words
