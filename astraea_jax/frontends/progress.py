"""Start-up progress on a terminal, while a model loads and compiles."""

from __future__ import annotations

import time

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

LINE_S = 10.0
"""Least seconds between two lines about the same thing in a log."""


class StartupDisplay:
    """Bars for loading (MB) and compilation (executables); plain lines where there is no terminal.

    Use as a context manager and pass :meth:`loading` and :meth:`compiling` as progress callbacks.
    """

    def __init__(self, *, enabled: bool = True):
        self._enabled = enabled
        self._console = Console(stderr=True)
        columns = (TextColumn("{task.description:<10}"), BarColumn(), TextColumn("{task.fields[count]}"))
        self._bars = Progress(
            *columns,
            TimeElapsedColumn(),
            console=self._console,
            disable=not (enabled and self._console.is_terminal),
        )
        self._tasks: dict[str, TaskID] = {}
        self._began = self._said = time.monotonic()

    def __enter__(self) -> StartupDisplay:
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Leave the bars as they are and give the terminal back; a second call does nothing."""
        self._bars.stop()

    def loading(self, done: int, total: int) -> None:
        """Bytes of weights read so far."""
        self._show("weights", done, total, f"{done / 1e6:.0f}/{total / 1e6:.0f} MB")

    def compiling(self, done: int, total: int) -> None:
        """Executables compiled so far: step shapes and sizes of transfers."""
        self._show("compile", done, total, f"{done}/{total} executables")

    def _show(self, name: str, done: int, total: int, count: str) -> None:
        if name not in self._tasks:
            self._tasks[name] = self._bars.add_task(name, total=total, count=count)
        self._bars.update(self._tasks[name], completed=done, total=total, count=count)
        now = time.monotonic()
        if self._enabled and not self._console.is_terminal and (done == total or now - self._said >= LINE_S):
            self._said = now
            self._console.print(f"{name}: {count}, {now - self._began:.0f} s after the start")
