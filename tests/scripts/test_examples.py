"""Runs what the documents tell a reader to run, as it stands."""

from __future__ import annotations

import re

from support.scripts import ROOT, run


def test_the_readme_example(tmp_path):
    [code] = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    (tmp_path / "example.py").write_text(code)
    [promised] = re.findall(r"print\(.*?\)  # (.*)", code)
    assert run(str(tmp_path / "example.py")).strip() == promised


def test_the_client_examples(serve, tmp_path):
    [code] = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "server.md").read_text(), re.DOTALL)
    with serve("--model=astraea-tiny", "--kv_bytes=4194304") as server:
        (tmp_path / "raw.py").write_text(code.replace("localhost:9000", server.address))
        assert "'x-finish-reason'" in run(str(tmp_path / "raw.py"))
        answers = run("examples/client.py", server.address).splitlines()
    assert len(answers) == 3
    assert all(re.search(r"\?  .*\d", answer) for answer in answers)


def test_the_agent_example():
    lines = run("examples/agent.py").splitlines()
    assert lines == [
        "The total is 60.  (4 requests, tools: price, price, calculator)",
        "The total is 325.  (3 requests, tools: price, calculator)",
    ]
