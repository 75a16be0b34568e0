"""scripts/bench_doors.py as a process, once on a pretended device and once on the real one."""

from __future__ import annotations

import json

import pytest
from support.scripts import run

TINY = ("--streams=3", "--words=2", "--output=6", "--rounds=2", "--rows=2", "--arrivals=6", "--max_step_tokens=16")


@pytest.mark.parametrize("device", [("--pretend_ms=1",), ("--kv_bytes=2097152",)])
def test_every_way_makes_as_many_tokens(device, random_folder, tmp_path):
    path = tmp_path / "runs.jsonl"
    said = run("scripts/bench_doors.py", *TINY, *device, f"--model={random_folder}", f"--json={path}")
    for word in ("of this process", "tokens/message", "JSON schema", "goodput"):
        assert word in said
    [line] = path.read_text().splitlines()
    figures = json.loads(line)["figures"]
    assert list(figures["streams"]) == ["in this process", "grpc", "completions", "chat"]
    for results, rows in [(figures["streams"], 3), (figures["constrained"], 2)]:
        for measured in results.values():
            assert [one["played"]["tokens"] for one in measured] == [6 * rows] * 2
            assert all(one["played"]["requests"] <= one["played"]["messages"] for one in measured)
    for capacity, over in [[one["played"] for one in pair] for pair in figures["overload"].values()]:
        assert capacity["requests"] + capacity["refused"] == 6  # a slow machine may refuse one
        assert over["requests"] + over["refused"] == 12
        assert 3 * over["requests"] <= over["tokens"] <= 9 * over["requests"]
