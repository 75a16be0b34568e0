"""scripts/bench_serving.py as a process, once and tiny; and the arithmetic of its load."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

SCRIPTS = Path(__file__).parents[2] / "scripts"
TINY = ("--prompts=4", "--input=16", "--output=8", "--max_seqs=4", "--max_step_tokens=16", "--kv_bytes=2097152")


def _module(name):
    """Import a script; scripts are no package."""
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


serving_load = _module("serving_load")


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
    load = serving_load.Load.draw(4, 16, 8, 0.5, 260, seed=0)
    assert offline["input_tokens"] == sum(map(len, load.prompts))
    assert offline["output_tokens"] == sum(load.outputs)
    assert offline["cached_tokens"] == 0
    assert offline["seconds"] >= max(offline["prefill_floor_s"], offline["decode_floor_s"]) > 0
    assert online["requests"] == 4
    assert online["output_tokens"] == sum(serving_load.Load.draw(4, 16, 8, 0.5, 260, seed=2).outputs)
    for name in ("ttft", "tpot", "itl", "e2e"):
        assert 0 < online[name]["p50"] <= online[name]["p90"] <= online[name]["p99"]
    assert online["ttft"]["p99"] < online["e2e"]["p99"]
    assert start["first"]["executables"] == start["again"]["executables"] > 0
    assert min(start["first"]["compile_s"], start["again"]["compile_s"]) > 0
    assert figures["peers"] == {absent: "not installed"}
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


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(2, 9)), min_size=1, max_size=6), st.integers(1, 4))
def test_the_work_of_a_load_is_what_decoding_it_takes(requests, max_seqs):
    load = serving_load.Load([[0] * prompt for prompt, _ in requests], [output for _, output in requests])
    read = sum(prompt + made for prompt, output in requests for made in range(1, output))
    assert load.read_tokens() == read
    left, steps = sorted((output - 1 for _, output in requests), reverse=True), 0
    while any(left):  # the longest first is the best order
        left = sorted([n - 1 for n in left[:max_seqs] if n > 1] + left[max_seqs:], reverse=True)
        steps += 1
    assert load.decode_steps(max_seqs) == steps


@given(st.integers(1, 20), st.floats(0, 0.99), st.integers(0, 3))
def test_lengths_stay_within_their_spread(mean, spread, seed):
    load = serving_load.Load.draw(8, mean, mean + 1, spread, 50, seed)
    assert load == serving_load.Load.draw(8, mean, mean + 1, spread, 50, seed)
    low, high = round(mean * (1 - spread)), round(mean * (1 + spread))
    assert all(max(1, low) <= len(prompt) <= high for prompt in load.prompts)
    assert all(2 <= output <= round((mean + 1) * (1 + spread)) for output in load.outputs)
    assert all(0 <= token < 50 for prompt in load.prompts for token in prompt)


def test_latencies_of_a_request():
    request = serving_load.Served(arrived=1.0, tokens=[1.5, 1.6, 1.9], prompt_tokens=3, cached_tokens=0, preemptions=0)
    assert (request.ttft, request.e2e) == pytest.approx((0.5, 0.9))
    assert request.tpot == pytest.approx(0.2)
    assert serving_load.Slo(0.5, 0.21).met(request)
    assert not serving_load.Slo(0.49, 0.21).met(request)
    assert not serving_load.Slo(0.5, 0.19).met(request)
