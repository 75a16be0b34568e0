"""The demo at its smallest size: agents, and the replay."""

from __future__ import annotations

import re

from support.scripts import run


def test_the_demo_draws_its_pictures(tmp_path):
    agents, replay = tmp_path / "agents.png", tmp_path / "new" / "demo.png"
    flags = ("--residency=always-offload,always-discard", "--kv_bytes=1048576", "--sessions=3", "--context=1024")
    pictures = (f"--picture={agents}", f"--replay_picture={replay}")
    out = run("scripts/demo.py", "--programs=12", "--concurrency=8", "--tool_scale=0.05", *flags, *pictures)
    assert "12, 8 at once" in out
    assert "status page: http://127.0.0.1:" in out
    assert re.search(r"always-offload, HTTP +│ +12 │", out)
    moved = {name: int(found) for name, found in re.findall(r"(always-\w+) +│.* ([\d,]+) MiB", out)}
    assert moved["always-offload"] > moved["always-discard"] == 0
    assert "claude-code to 1024 tokens, load 2, 2.5x oversubscribed, 3 programs, 2 seeds, real engine" in out
    assert re.search(r"│ fcfs, KV keep-lru +│.* 1\.000 │", out)
    assert re.search(r"│ astraea, KV host +│", out)
    for picture in (agents, replay):
        assert picture.read_bytes().startswith(b"\x89PNG")
