"""scripts/bench_agents.py as a process, at its smallest size."""

from __future__ import annotations

import json

from support.scripts import run

TINY = ("--agents=3", "--turns=2", "--rounds=1", "--over_s=0", "--step_ms=1", "--oversubscribed=0.1")


def test_every_way_has_the_same_prompts_and_answers(tmp_path):
    path = tmp_path / "runs.jsonl"
    said = run("scripts/bench_agents.py", *TINY, f"--json={path}")
    assert "mean JCT" in said
    [line] = path.read_text().splitlines()
    ways = json.loads(line)["figures"]["ways"]
    assert list(ways) == ["HTTP", "HTTP, named sessions", "gRPC, named sessions"]
    [inferred, named, grpc] = [way[0] for way in ways.values()]
    assert all(len(way["done"]["seconds"]) == 3 for way in (inferred, named, grpc))
    for count in ("prompt_tokens", "output_tokens"):
        assert inferred[count] == named[count] == grpc[count] > 0
