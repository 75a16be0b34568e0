"""The benchmark of continuity at its smallest size."""

from __future__ import annotations

from support.scripts import run


def test_the_continuity_benchmark_prints_its_parts():
    out = run(
        "scripts/bench_continuity.py", "--tokens=500", "--result_chars=200", "--runs=2", "--sessions=0", "--json="
    )
    assert "recognised and compared" in out
