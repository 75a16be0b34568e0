"""What the documents tell a reader to run, run as it stands."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def run(*command: str) -> str:
    done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_readme_example(tmp_path):
    [code] = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    (tmp_path / "example.py").write_text(code)
    [promised] = re.findall(r"print\(.*?\)  # (.*)", code)
    assert run(str(tmp_path / "example.py")).strip() == promised


def test_the_agent_example():
    lines = run("examples/agent.py").splitlines()
    assert lines == [
        "The total is 60.  (4 segments, tools: price, price, calculator)",
        "The total is 325.  (3 segments, tools: price, calculator)",
    ]


def test_the_evaluation(tmp_path):
    assert "100.0%" in run("scripts/eval_tiny.py", "--tasks=20", "--wanted=1")


def test_the_demo_draws_its_picture(tmp_path):
    picture = tmp_path / "demo.png"
    out = run("scripts/demo.py", "--programs=12", "--concurrency=8", "--tool_scale=0.05", f"--picture={picture}")
    assert "12, 8 at once" in out
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_the_step_benchmark_prints_its_floors():
    out = run("scripts/bench_step.py", "--batch=4", "--context=16", "--steps=8", "--prefill=32")
    for word in ("decode step", "prefill of 32", "host work per step", "read", "matmul"):
        assert word in out
