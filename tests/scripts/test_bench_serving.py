"""scripts/bench_serving.py as a process, once and tiny."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

from astraea_jax.lab.serving_load import Load

SCRIPTS = Path(__file__).parents[2] / "scripts"
TINY = ("--prompts=4", "--input=16", "--output=8", "--max_seqs=4", "--max_step_tokens=16", "--kv_bytes=2097152")


def bench(*arguments):
    command = [sys.executable, str(SCRIPTS / "bench_serving.py"), *TINY, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def record_of(path):
    [line] = path.read_text().splitlines()
    return json.loads(line)


def test_the_record_adds_up(random_folder, tmp_path):
    absent = next(name for name in ("sglang", "vllm", "") if importlib.util.find_spec(name or "sglang") is None)
    path = tmp_path / "runs.jsonl"
    done = bench(f"--model={random_folder}", "--rate=40", "--spread=0.5", f"--peers={absent}", f"--json={path}")
    assert done.returncode == 0, done.stderr
    for word in ("prefill: its products", "goodput", "ready after", "roofline: read", "revision"):
        assert word in done.stdout
    record = record_of(path)
    figures = record["figures"]
    offline, [online], start = figures["offline"], figures["online"], figures["start"]
    load = Load.draw(4, 16, 8, 0.5, 260, seed=0)
    assert offline["input_tokens"] == sum(map(len, load.prompts))
    assert offline["output_tokens"] == sum(load.outputs)
    assert offline["cached_tokens"] == 0
    assert offline["seconds"] >= max(offline["prefill_floor_s"], offline["decode_floor_s"]) > 0
    assert online["requests"] == 4
    assert online["output_tokens"] == sum(Load.draw(4, 16, 8, 0.5, 260, seed=2).outputs)
    for name in ("ttft", "tpot", "itl", "e2e"):
        assert 0 < online[name]["p50"] <= online[name]["p90"] <= online[name]["p99"]
    assert online["ttft"]["p99"] < online["e2e"]["p99"]
    assert start["first"]["executables"] == start["again"]["executables"] > 0
    assert min(start["first"]["compile_s"], start["again"]["compile_s"]) > 0
    assert f"not installed (no package {absent})" in figures["peers"][absent]
    assert record["floors"]["read_gb_s"] > 0
    assert "--part" not in record["command"]


def test_no_time_is_told(random_folder, tmp_path):
    done = bench(f"--model={random_folder}", "--timeout_s=1", f"--json={tmp_path / 'runs.jsonl'}")
    assert done.returncode == 1
    assert "cannot measure: nothing after" in done.stderr
    assert not (tmp_path / "runs.jsonl").exists()


@pytest.mark.parity
def test_the_others_make_as_many_tokens(tmp_path):
    path = tmp_path / "runs.jsonl"
    done = bench("--load=", "--peers=transformers,torch", f"--json={path}")
    assert done.returncode == 0, done.stderr
    peers = record_of(path)["figures"]["peers"]
    assert peers["transformers"]["output_tokens"] == peers["torch"]["output_tokens"] == 4 * 8
    assert peers["torch"]["seconds"] > 0
