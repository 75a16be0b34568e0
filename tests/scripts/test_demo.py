"""The demo at its smallest size."""

from __future__ import annotations

import re

from support.scripts import run


def test_the_demo_draws_its_picture(tmp_path):
    picture = tmp_path / "demo.png"
    flags = ("--residency=always-offload,always-discard", "--kv_bytes=1048576", f"--picture={picture}")
    out = run("scripts/demo.py", "--programs=12", "--concurrency=8", "--tool_scale=0.05", *flags)
    assert "12, 8 at once" in out
    assert "status page: http://127.0.0.1:" in out
    assert re.search(r"always-offload, HTTP +│ +12 │", out)
    moved = {name: int(found) for name, found in re.findall(r"(always-\w+) +│.* ([\d,]+) MiB", out)}
    assert moved["always-offload"] > moved["always-discard"] == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
