"""What the documents tell a reader to run, run as it stands."""

from __future__ import annotations

import re

from support.scripts import ROOT, run


def test_the_readme_example(tmp_path):
    [code] = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    (tmp_path / "example.py").write_text(code)
    [promised] = re.findall(r"print\(.*?\)  # (.*)", code)
    assert run(str(tmp_path / "example.py")).strip() == promised


def test_the_agent_example():
    lines = run("examples/agent.py").splitlines()
    assert lines == [
        "The total is 60.  (4 requests, tools: price, price, calculator)",
        "The total is 325.  (3 requests, tools: price, calculator)",
    ]


def test_the_evaluation(tmp_path):
    assert "100.0%" in run("scripts/eval_tiny.py", "--tasks=20", "--wanted=1")


def test_the_demo_draws_its_picture(tmp_path):
    picture = tmp_path / "demo.png"
    flags = ("--residency=always-offload,always-discard", "--kv_bytes=1048576", f"--picture={picture}")
    out = run("scripts/demo.py", "--programs=12", "--concurrency=8", "--tool_scale=0.05", *flags)
    assert "12, 8 at once" in out
    moved = {name: int(found) for name, found in re.findall(r"(always-\w+) .* ([\d,]+) MiB", out)}
    assert moved["always-offload"] > moved["always-discard"] == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
