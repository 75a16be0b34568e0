"""Running what a reader is told to run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def run(*command: str) -> str:
    done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, timeout=380)
    assert done.returncode == 0, done.stderr
    return done.stdout


def run_shell(script: str, folder: Path) -> str:
    """Run lines of a shell in ``folder``, where ``python`` is this one."""
    search = {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", "-e", "-c", script], cwd=folder, env=os.environ | search, capture_output=True, text=True, timeout=380
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


ASK_STUDY = """
import importlib, json, sys
from absl import app, flags
from absl.testing import flagsaver
name = sys.argv[1]
study = importlib.import_module(f"astraea_jax.lab.{name}").study
for line in json.load(sys.stdin):
    with flagsaver.flagsaver():
        try:
            flags.FLAGS([name, *line.split()])
            print(json.dumps(f"{len(study())} cells"))
        except (app.UsageError, flags.Error) as error:
            print(json.dumps(str(error)))
"""


def check_studies(name: str, expected: dict[str, str]) -> None:
    """Assert that a study says of each line of flags what ``expected`` has; one process asks for all."""
    done = subprocess.run(
        [sys.executable, "-c", ASK_STUDY, name], cwd=ROOT, input=json.dumps([*expected]), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    for (line, words), said in zip(expected.items(), map(json.loads, done.stdout.splitlines()), strict=True):
        assert words in said, line
