"""The serving step compiled for a TPU that is not here, through the script: what it says and what it refuses.

Each program takes a processor most of a minute, so this is the shortest choice that shows every gate at work: the
smallest decode step over four devices, and the transfers. `python scripts/compile_ahead.py` compiles the rest.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.ahead
SCRIPT = Path(__file__).parents[2] / "scripts" / "compile_ahead.py"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True, timeout=380)


@pytest.mark.serves("pallas", "compiled", "tensor parallelism", "KV to the host and back")
def test_a_step_on_four_chips_and_the_transfers_pass_their_gates(tmp_path):
    done = run(
        *("--target=v6e", "--model=llama-3.2-1b", "--tp=4", "--attention=pallas"),
        *("--program=decode-least,offload,restore", f"--json={tmp_path / 'figures.json'}"),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    step, offload, restore = json.loads((tmp_path / "figures.json").read_text())["programs"]
    sums = step["collectives"].get("all-reduce", 0) + step["collectives"].get("all-gather", 0)
    assert (sums, step["collectives"]["all-to-all"]) == (2 * 16 + 2, 1)
    assert step["aliased"] >= restore["aliased"] > 10e9  # the last tokens, too
    assert offload["collectives"] == restore["collectives"] == {}


def test_a_model_that_does_not_fit_is_said_to_be_so():
    done = run("--target=v5e", "--model=llama-3.1-8b", "--tp=1", "--attention=pallas")
    assert done.returncode == 0, done.stderr
    assert "does not fit: v5e llama-3.1-8b tp=1: 16.1 GB of weights" in done.stdout
