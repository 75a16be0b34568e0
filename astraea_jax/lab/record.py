"""Records of benchmarks: tables, what they were measured on, and where that is written.

One line of JSON per run goes to a file beside the code, ``benchmarks/records/NAME.jsonl`` in a checkout; ``--record``
also writes the tables to ``benchmarks/RESULTS.md``.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import jax
from absl import flags, logging
from rich.console import Console
from rich.table import Table

from astraea_jax.lab.roofline import Roofline

ROOT = Path(__file__).resolve().parents[2]
"""Root of the checkout, if this is one."""
HEADING = "## Records"
OWN_FLAGS = ("json", "record", "revision")
"""Flags that say where a run is recorded; they are left out of its command."""


@dataclass(frozen=True)
class Section:
    """One table of a benchmark: leading columns name a row, the others are figures."""

    title: str
    columns: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    named: int = 1
    """Number of leading columns that name, aligned to the left."""

    def table(self) -> Table:
        """The table for a terminal."""
        table = Table(title=self.title, title_justify="left")
        for i, name in enumerate(self.columns):
            last = i == len(self.columns) - 1
            table.add_column(name, justify="left" if i < self.named else "right", no_wrap=not last)
        for row in self.rows:
            table.add_row(*row)
        return table

    def markdown(self) -> str:
        """The table as Markdown."""
        rule = ["---" if i < self.named else "---:" for i in range(len(self.columns))]
        cells = [[cell.strip().replace("|", "\\|") for cell in row] for row in (self.columns, *self.rows)]
        lines = ["| " + " | ".join(row) + " |" for row in (cells[0], rule, *cells[1:])]
        return "\n".join((f"{self.title}:", "", *lines))


@dataclass(frozen=True)
class Environment:
    """The machine and software of a run, and its command."""

    device: str
    """Kind of the device, as JAX names it."""
    platform: str
    devices: int
    processors: int
    python: str
    jax: str
    jaxlib: str
    astraea_jax: str
    revision: str
    """Revision of the code: git's, or that of ``--revision``, or "unknown"."""
    dirty: bool
    """Whether the checkout differs from the revision, outside ``benchmarks/``."""
    date: str
    """Date and time in UTC."""
    command: str

    @classmethod
    def here(cls) -> Environment:
        """The environment of this process; starts JAX's backend."""
        device = jax.devices()[0]
        revision, dirty = _revision(ROOT)
        return cls(
            device=device.device_kind,
            platform=device.platform,
            devices=jax.device_count(),
            processors=os.cpu_count() or 1,
            python=platform.python_version(),
            jax=jax.__version__,
            jaxlib=_version("jaxlib"),
            astraea_jax=_version("astraea-jax"),
            revision=flags.FLAGS.revision or revision or "unknown",
            dirty=dirty,
            date=datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M"),
            command=command(),
        )

    def __str__(self) -> str:
        return (
            f"{self.device} ({self.platform} x {self.devices}, {self.processors} processors), jax {self.jax}, "
            f"Python {self.python}, revision {self.revision}{', changed' if self.dirty else ''}, {self.date} UTC"
        )


def define_flags(name: str, values: flags.FlagValues = flags.FLAGS) -> None:
    """Define the flags that every benchmark has; called once, where the script defines its own."""
    inside = ROOT / "benchmarks"
    default = str(inside / "records" / f"{name}.jsonl") if inside.is_dir() else None
    flags.DEFINE_string("json", default, "File that gets one line of JSON per run; empty: none.", flag_values=values)
    flags.DEFINE_bool(
        "record", False, f"Also write the tables to benchmarks/RESULTS.md, under {HEADING[3:]}.", flag_values=values
    )
    flags.register_validator(
        "record", lambda on: not on or inside.is_dir(), f"there is no {inside} to write to", flag_values=values
    )
    flags.DEFINE_string("revision", None, "Revision of the code, where git does not know it.", flag_values=values)
    for flag in ("json", "record", "revision"):
        values.register_key_flag_for_module(sys.argv[0], values[flag])  # or else --help would not show it
    if values is flags.FLAGS:  # JAX logs every backend that it does not find
        logging.set_verbosity(logging.WARNING)


def publish(
    name: str,
    sections: Sequence[Section],
    figures: Mapping[str, object],
    roofline: Roofline | None = None,
    *,
    environment: Environment | None = None,
    console: Console | None = None,
) -> None:
    """Print a run, append it to ``--json``, and to RESULTS.md if ``--record`` says so.

    Args:
        name: of the benchmark.
        sections: for people.
        figures: for programs; what :mod:`json` can write.
        roofline: measured in the same run.
        environment: of the process that measured, if it was not this one.
        console: to print on, if not the usual one.

    Raises:
        OSError: a file cannot be written. It has been printed by then.
    """
    environment = environment or Environment.here()
    footing = [*([str(roofline)] if roofline else []), str(environment)]
    console = console or Console(width=max(120, Console().width))  # a pipe counts as 80 columns
    for section in sections:
        console.print(section.table())
    for line in footing:
        console.print(line, highlight=False, soft_wrap=True)
    if flags.FLAGS.json:
        record = {
            "benchmark": name,
            **asdict(environment),
            "floors": asdict(roofline) if roofline else None,
            "figures": dict(figures),
        }
        path = Path(flags.FLAGS.json)
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a") as file:
            file.write(json.dumps(record) + "\n")
    if flags.FLAGS.record:
        title = f"### {name}, {environment.device}, {environment.date[:10]}, {environment.revision}"
        parts = [title, f"`{environment.command}`", *(s.markdown() for s in sections), "; ".join(footing) + "."]
        results = ROOT / "benchmarks" / "RESULTS.md"
        results.write_text(with_entry(results.read_text(), "\n\n".join(parts)))


def with_entry(text: str, entry: str) -> str:
    """Markdown ``text`` with ``entry`` as the last one under the heading of records, which is added if missing."""
    if HEADING not in text.splitlines():
        text = f"{text.rstrip()}\n\n{HEADING}\n"
    at = f"\n{text}".index(f"\n{HEADING}\n")
    end = text.find("\n## ", at + len(HEADING))
    end = len(text) if end < 0 else end
    return f"{text[:end].rstrip()}\n\n{entry}\n{text[end:]}"


def command() -> str:
    """The command line that repeats this run, without the machine's own paths."""
    values = flags.FLAGS
    given = [values[name] for name in values if values[name].present and name == values[name].name]
    arguments = [text for flag in given if flag.name not in OWN_FLAGS for text in flag.serialize().splitlines()]
    program = Path(sys.argv[0])
    began = ["python", f"scripts/{program.name}"] if program.suffix == ".py" else program.name.split()
    return shlex.join([*began, *arguments])


def _revision(root: Path) -> tuple[str | None, bool]:
    """Git's revision of ``root`` (None if that is no checkout or git is absent), and whether files have changed."""

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True, timeout=30
        ).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() != root:
            return None, False  # installed into a folder of somebody else's checkout
        return git("rev-parse", "--short=12", "HEAD"), bool(git("status", "--porcelain", "--", ".", ":!benchmarks"))
    except (OSError, subprocess.SubprocessError):
        return None, False


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
