"""What commands say that end soon, each in a process that forks from one which has imported what they import.

That takes seconds, and is most of what a command does whose flags are wrong.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import sys
import tempfile
from collections.abc import Sequence

from support.scripts import ROOT

LIMIT_S = 300.0
_forks = multiprocessing.get_context("forkserver")
_forks.set_forkserver_preload(["astraea_jax.frontends.http.server", "astraea_jax.frontends.rpc.server"])


def say(script: str, *arguments: str) -> tuple[int, str]:
    """The exit status of a script in Python, and what it wrote to either stream."""
    with tempfile.NamedTemporaryFile() as written:
        process = _forks.Process(target=_run, args=([script, *arguments], dict(os.environ), written.name))
        process.start()
        process.join(LIMIT_S)
        process.kill()  # if it still runs
        process.join()
        assert process.exitcode is not None
        return process.exitcode, written.read().decode()


def _run(command: Sequence[str], environment: dict[str, str], written: str) -> None:
    with open(written, "ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(ROOT)
    sys.argv = [*command]
    runpy.run_path(command[0], run_name="__main__")
