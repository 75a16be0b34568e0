"""The serving step compiled for chips that are not here, through the script: what it says and what it refuses.

The shortest choice that shows every gate at work on each kind of chip: for TPUs Llama-3.1-8B's smallest decode step
over four devices, and the transfers; for GPUs, its largest decode and mixed step. `python scripts/compile_ahead.py`
compiles the rest.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.ahead
SCRIPT = Path(__file__).parents[2] / "scripts" / "compile_ahead.py"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True, timeout=380)


@pytest.mark.serves("pallas", "compiled", "tensor parallelism", "layers in one loop", "KV to the host and back")
def test_steps_on_four_chips_and_the_transfers_pass_their_gates(tmp_path):
    done = run(
        *("--target=v5e,v6e,7x", "--model=llama-3.1-8b", "--tp=4", "--attention=pallas"),
        *("--program=decode-least,offload,restore", f"--json={tmp_path / 'figures.json'}"),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    programs = json.loads((tmp_path / "figures.json").read_text())["programs"]
    assert len(programs) == 9
    for step, offload, restore in (programs[:3], programs[3:6], programs[6:]):
        assert step["case"]["scan"] is True
        sums = step["collectives"].get("all-reduce", 0) + step["collectives"].get("all-gather", 0)
        assert (sums, step["collectives"]["all-to-all"]) == (2 + 2, 1)  # of the loop, which counts once, and around it
        assert step["temp"] < 2**26 < step["aliased"]
        assert step["aliased"] >= restore["aliased"] > 8e9  # the last tokens, too
        assert offload["collectives"] == restore["collectives"] == {}


@pytest.mark.skipif(
    not all(importlib.util.find_spec(package) for package in ("jax_triton", "jax_cuda13_plugin")),
    reason="compiling for a GPU needs the [cuda] extra, on Python 3.12 or newer",
)
@pytest.mark.parametrize(("target", "models"), [("h200", ["llama-3.1-8b", "qwen3-4b"]), ("a100", ["qwen3-4b"])])
def test_steps_on_a_gpu_launch_little_and_never_branch(target, models, tmp_path):
    """What attention's kernels take of registers is looked at, too."""
    done = run(
        *(
            f"--target={target}",
            f"--model={','.join(models)}",
            "--tp=1",
            "--program=decode-most,mixed-most,offload,restore",
        ),
        f"--json={tmp_path / 'figures.json'}",
    )
    assert done.returncode == 0, done.stdout + done.stderr
    programs = json.loads((tmp_path / "figures.json").read_text())["programs"]
    assert [step["program"] for step in programs] == ["decode-most", "mixed-most", "offload", "restore"] * len(models)
    for decode, mixed, offload, restore in zip(*(programs[i::4] for i in range(4)), strict=True):
        assert offload["launches"] == 1 < restore["launches"]
        assert decode["case"]["attention"] == "triton"
        assert decode["launches"] > 0 < mixed["launches"]
        assert "attend_single" in decode["registers"]
        assert {"turn_and_write", "attend_tiles"} <= mixed["registers"].keys()


@pytest.mark.skipif(
    not all(importlib.util.find_spec(package) for package in ("jax_triton", "jax_cuda13_plugin")),
    reason="compiling for a GPU needs the [cuda] extra, on Python 3.12 or newer",
)
@pytest.mark.parametrize(
    ("model", "form", "programs"),
    [
        ("qwen3-coder-30b-a3b", None, ["decode-most", "mixed-most"]),
        ("qwen3-coder-30b-a3b", "fp8-block", ["decode-most"]),
        ("gpt-oss-20b", "mxfp4", ["decode-most", "mixed-most"]),
    ],
)
def test_mixtures_on_a_gpu_copy_no_expert_and_launch_little(model, form, programs, tmp_path):
    done = run(
        *("--target=h200", f"--model={model}", "--tp=1", f"--program={','.join(programs)}"),
        *(f"--json={tmp_path / 'figures.json'}", *([f"--quantize={form}"] if form else [])),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for step in json.loads((tmp_path / "figures.json").read_text())["programs"]:
        assert {"multiply_blocks", "attend_single"} <= step["registers"].keys()
        assert step["temp"] < 2**27 < step["aliased"]


def test_a_model_that_does_not_fit_is_said_to_be_so():
    done = run("--target=v5e", "--model=llama-3.1-8b", "--tp=1", "--attention=pallas")
    assert done.returncode == 0, done.stderr
    assert "does not fit: v5e llama-3.1-8b tp=1: 16.1 GB of weights" in done.stdout
