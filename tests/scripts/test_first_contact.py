"""The first minutes on a GPU, rehearsed without one: what of it runs here, at its smallest."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from support.scripts import ROOT


def rehearse(script: str, out: Path, *options: str) -> tuple[int, str]:
    """Exit status of a script in ``benchmarks``, and what it printed."""
    command = ["bash", ROOT / "benchmarks" / script, "--tiny", *options, out]
    environment = {**os.environ, "PYTHON": sys.executable, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    return done.returncode, done.stdout + done.stderr


def test_parts_fail_alone_and_leave_their_logs(tmp_path):
    """A machine without a driver says so in that part, and goes on."""
    status, said = rehearse("first_contact.sh", tmp_path, "--parts=driver,device,attention", "--revision=rehearsal")
    assert status == 1
    assert "driver            0  failed" in said
    assert "device" in said.split("part ")[-1]
    assert (tmp_path / "attention.log").read_text().count("reference") >= 1
    assert '"revision": "rehearsal"' in (tmp_path / "records.jsonl").read_text()


def test_wheels_that_cannot_be_used_are_told_of(tmp_path):
    (tmp_path / "broken-1-py3-none-any.whl").write_bytes(b"no archive")
    status, said = rehearse("first_contact.sh", tmp_path / "out", f"--wheels={tmp_path}", "--parts=device")
    assert status == 0
    assert "cannot be used; going on without" in said
    assert "CpuDevice" in said


def test_an_unknown_part_is_told(tmp_path):
    status, said = rehearse("first_contact.sh", tmp_path, "--parts=driver,bench_step")
    assert status == 1
    assert "no part is called bench_step; there are  driver packages device tests step attention" in said


def test_an_unknown_option_is_refused(tmp_path):
    status, said = rehearse("run_gpu.sh", tmp_path, "--all")
    assert status == 2
    assert "--parts=" in said
