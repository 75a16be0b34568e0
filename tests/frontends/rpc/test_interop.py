"""JetStream's own clients, unmodified, against scripts/serve.py.

Set JETSTREAM_CHECKOUT to a checkout of AI-Hypercomputer/JetStream at 29329e8, outside this repository. JETSTREAM_PYTHON
names the interpreter that runs it, by default this one; `load_tester` needs grpcio, protobuf and absl-py there, and
`requester` also jax, flax, seqio and transformers.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(
    "JETSTREAM_CHECKOUT" not in os.environ,
    reason="JETSTREAM_CHECKOUT is not set; it names a checkout of AI-Hypercomputer/JetStream",
)
PYTHON = os.environ.get("JETSTREAM_PYTHON", sys.executable)


@pytest.fixture(scope="module")
def endpoint(serve):
    with serve() as server:
        yield server.address


def jetstream(*arguments: str, code: bool = False) -> subprocess.CompletedProcess[str]:
    checkout = Path(os.environ["JETSTREAM_CHECKOUT"])
    path = os.pathsep.join(filter(None, (str(checkout), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1", "JAX_PLATFORMS": "cpu"}
    command = [PYTHON, "-c" if code else "-m", *arguments]
    return subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True, timeout=90)


def address_flags(endpoint: str) -> list[str]:
    host, port = endpoint.rsplit(":", 1)
    return [f"--server={host}", f"--port={port}"]


def test_load_tester_completes_its_64_requests(endpoint):
    run = jetstream("jetstream.tools.load_tester", *address_flags(endpoint), "--max_tokens=20")
    assert run.returncode == 0, run.stderr
    assert set(re.findall(r"Completed (\d+)", run.stdout)) == {str(number) for number in range(64)}


def test_requester_prints_an_answer(endpoint):
    if jetstream("import jetstream.engine.token_utils", code=True).returncode:
        pytest.skip(f"{PYTHON} lacks what JetStream's requester imports (jax, flax, seqio, transformers)")
    tokenizer = "--tokenizer=unused"  # a required flag; read only to tokenise on the client's side
    run = jetstream("jetstream.tools.requester", *address_flags(endpoint), tokenizer, "--text=AB", "--max_tokens=8")
    assert run.returncode == 0, run.stderr
    assert "The 0th Response: " in run.stdout
    assert run.stdout.partition("The 0th Response: ")[2].strip()


def test_our_messages_are_those_of_its_stubs():
    """In one process with JetStream's stubs, which declare the same names, and in either order of import.

    Fields of our own have numbers from 1001 on, which JetStream's clients ignore.
    """
    script = """
import {first}, {second}
from astraea_jax.frontends.rpc import wire
from jetstream.core.proto import jetstream_pb2 as theirs
for name in ("DecodeRequest", "DecodeResponse", "HealthCheckRequest", "HealthCheckResponse"):
    def fields(message):
        return [(f.number, f.name, f.type, f.containing_oneof and f.containing_oneof.name, f.is_repeated,
                 fields(f.message_type) if f.message_type else None) for f in message.fields if f.number < 1001]
    assert fields(getattr(wire, name).DESCRIPTOR) == fields(getattr(theirs, name).DESCRIPTOR), name
"""
    modules = ("astraea_jax.frontends.rpc.wire", "jetstream.core.proto.jetstream_pb2")
    repository = str(Path(__file__).parents[2])
    checkout = os.environ["JETSTREAM_CHECKOUT"]
    for first, second in (modules, modules[::-1]):
        run = subprocess.run(
            [sys.executable, "-c", script.format(first=first, second=second)],
            env={**os.environ, "PYTHONPATH": os.pathsep.join((repository, checkout)), "PYTHONDONTWRITEBYTECODE": "1"},
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert run.returncode == 0, run.stderr
