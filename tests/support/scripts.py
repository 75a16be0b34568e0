"""Running what a reader is told to run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def run(*command: str, status: int = 0) -> str:
    done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, timeout=380)
    assert done.returncode == status, done.stderr
    return done.stdout


def run_shell(script: str, folder: Path) -> str:
    """Run lines of a shell in ``folder``, where ``python`` is this one."""
    search = {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", "-e", "-c", script], cwd=folder, env=os.environ | search, capture_output=True, text=True, timeout=380
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
