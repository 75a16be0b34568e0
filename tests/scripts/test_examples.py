"""Runs what the documents tell a reader to run, as it stands."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

import pytest
from support.scripts import ROOT, run, run_shell
from support.sizes import CHAT

EXAMPLES = ROOT / "examples"
ANSWER = "The total is 60.\n"


@dataclass(frozen=True)
class Section:
    """Code of a document below a heading."""

    shell: str
    python: str

    @property
    def promised(self) -> str:
        """What its ``print`` says that it prints."""
        return "".join(f"{line}\n" for line in re.findall(r"^ *print\(.*\)  # (.*)", self.python, re.MULTILINE))


def section(document: Path, heading: str) -> Section:
    [text] = re.findall(rf"^##+ {re.escape(heading)}\n(.*?)(?=^##|\Z)", document.read_text(), re.MULTILINE | re.DOTALL)
    shell, python = ("".join(re.findall(rf"^```{kind}\n(.*?)```", text, re.M | re.S)) for kind in ("sh", "python"))
    return Section(shell, python)


@pytest.fixture(scope="module")
def server(serve):
    with serve("--model=astraea-tiny", f"--max_context={CHAT.max_context}") as server:
        yield server


@pytest.fixture
def execute(server):
    """Runs code where a reader does, with the addresses of the test's server."""

    def execute(code: Section, shell: str = "") -> str:
        script = f"{shell}\npython - <<'END'\n{code.python}\nEND\n" if code.python else shell
        there = script.replace("localhost:8000", server.http.removeprefix("http://"))
        return run_shell(there.replace("localhost:9000", server.address), EXAMPLES)

    return execute


@pytest.mark.parametrize("heading", ["OpenAI's SDK", "Anthropic's SDK and Claude Code", "An agent framework"])
def test_the_readmes_clients(execute, heading):
    code = section(ROOT / "README.md", heading)
    assert code.promised
    assert execute(code, code.shell) == code.promised


@pytest.mark.parametrize("heading", ["From Python", "Tools over MCP"])
def test_the_readmes_programs(heading):
    code = section(ROOT / "README.md", heading)
    assert code.promised == ANSWER
    assert run_shell(f"python - <<'END'\n{code.python}\nEND\n", EXAMPLES) == ANSWER


def test_the_readmes_curl(execute):
    code = section(ROOT / "README.md", "curl")
    answer = json.loads(execute(code, code.shell))
    assert answer["choices"][0]["message"]["content"] in ("yes", "no")


def test_the_readmes_grpc(server):
    [command] = re.findall(r"^python (\S+)", section(ROOT / "README.md", "gRPC").shell)
    answers = run(command, server.address).splitlines()
    assert len(answers) == 3
    assert all(re.search(r"\?  .*\d", answer) for answer in answers)


def test_the_documented_calls_about_sessions(execute):
    document, decoder = ROOT / "docs" / "http.md", json.JSONDecoder()
    answers = []
    for heading in ("What was reused", "Hints", "Forks and other tails"):
        code = section(document, heading)
        rest = execute(code, code.shell)
        while rest := rest.strip():
            answer, end = decoder.raw_decode(rest)
            answers.append(answer)
            rest = rest[end:]
    turn, hint, seen, fork, replaced, ended = answers
    assert turn["usage"]["astraea"]["program"] == "trip"
    assert [outcome["outcome"] for outcome in hint["outcomes"]] == ["accepted"]
    assert [program["program"] for program in seen["programs"]] == ["trip"]
    assert fork == {"session_id": "trip-b", "parent_session_id": "trip"}
    assert replaced["computed"]
    assert ended == {"session_id": "trip", "deleted": True}


def test_the_documented_branches():
    code = section(ROOT / "docs" / "scheduling.md", "Branches of a history")
    assert code.promised == run_shell(f"python - <<'END'\n{code.python}\nEND\n", EXAMPLES)


def test_a_grpc_client_of_ones_own(execute):
    assert "'x-finish-reason'" in execute(section(ROOT / "docs" / "server.md", "Clients"))


@pytest.mark.parametrize("example", ["openai_sdk.py", "anthropic_sdk.py", "framework.py"])
def test_the_examples_over_http(server, example):
    assert run(f"examples/{example}", server.http) == ANSWER


def test_the_agent_example():
    lines = run("examples/agent.py").splitlines()
    assert lines == [
        "The total is 60.  (4 requests, tools: price, price, calculator)",
        "The total is 325.  (3 requests, tools: price, calculator)",
    ]
