"""scripts/bench_doors.py as a process, once on a pretended device and once on the real one."""

from __future__ import annotations

import json

import pytest
from support.scripts import run

TINY = ("--streams=4", "--words=2", "--output=6", "--rounds=2", "--rows=2", "--arrivals=6", "--max_step_tokens=16")


@pytest.mark.parametrize("device", [("--pretend_ms=1",), ("--kv_bytes=2097152",)])
def test_every_way_makes_as_many_tokens(device, random_folder, tmp_path):
    path = tmp_path / "runs.jsonl"
    said = run("scripts/bench_doors.py", *TINY, *device, f"--model={random_folder}", f"--json={path}")
    for word in ("of this process", "tokens/message", "JSON schema", "goodput"):
        assert word in said
    [line] = path.read_text().splitlines()
    figures = json.loads(line)["figures"]
    assert list(figures["streams"]) == ["in this process", "grpc", "completions", "chat"]
    for results, rows in [(figures["streams"], 4), (figures["constrained"]["2"], 2)]:
        for measured in results.values():
            assert [one["played"]["tokens"] for one in measured] == [6 * rows] * 2
            assert all(one["played"]["requests"] <= one["played"]["messages"] for one in measured)
    for capacity, over in [[one["played"] for one in pair] for pair in figures["overload"].values()]:
        assert (capacity["requests"], capacity["refused"]) == (6, 0)  # a client's share of the queue holds them all
        assert over["requests"] + over["refused"] == 12
        assert 3 * over["requests"] <= over["tokens"] <= 9 * over["requests"]


def test_constrained_decoding_is_measured_alone_at_a_vocabulary_that_is_made_up(tmp_path):
    path = tmp_path / "runs.jsonl"
    alone = ("--vocabulary=2000", "--doors=", "--arrivals=0", "--rows=1", "--rows=2", "--kv_bytes=8388608")
    sizes = ("--streams=2", "--output=6", "--rounds=1", "--max_step_tokens=16")
    run("scripts/bench_doors.py", *sizes, *alone, f"--json={path}")
    figures = json.loads(path.read_text())["figures"]
    assert list(figures) == ["constrained"]
    assert list(figures["constrained"]) == ["1", "2"]
    for rows, ways in figures["constrained"].items():
        assert [ways[way][0]["played"]["tokens"] for way in ("free", "JSON schema")] == [6 * int(rows)] * 2
