"""The scheduler benchmark at its smallest size."""

from __future__ import annotations

from support.scripts import run


def test_the_scheduler_benchmark_prints_a_curve():
    out = run(
        "scripts/bench_scheduler.py", "--policies=astraea", "--waiting=100,200", "--running=16", "--steps=20", "--json="
    )
    assert "200 waiting" in out
