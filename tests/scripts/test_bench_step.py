"""The step benchmark at its smallest size."""

from __future__ import annotations

from support.scripts import run


def test_the_step_benchmark_prints_its_roofline():
    sizes = ("--batch=4", "--context=16", "--steps=8", "--prefill=32", "--max_step_tokens=16", "--extras", "--json=")
    out = run("scripts/bench_step.py", *sizes)
    for word in ("decode step", "prefill of 32", "host work per step", "read", "matmul", "a grammar"):
        assert word in out
