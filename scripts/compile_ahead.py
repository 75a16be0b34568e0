"""Cross-compiles the serving step for absent accelerators and checks memory, aliasing and collectives.

  python scripts/compile_ahead.py                                        v5e, v6e and 7x; Llama-3.1-8B and Qwen3-4B
  python scripts/compile_ahead.py --target=v6e --model=qwen3-4b --tp=4 --attention=pallas
  python scripts/compile_ahead.py --target=h200 --tp=1                   needs the [cuda] extra, and no GPU

The steps are those that the engine compiles at start-up (the extremes of their shapes), with its default sizes and as
many pages as a device holds; then the gather that offloads pages and the scatter that restores them. For TPUs libtpu
must be installed (the [tpu] extra; `make ahead` does it in a virtual environment of its own). For GPUs launches are
counted, and their kernels assembled. Exit status 1: a program does not compile, or does not pass a gate
(astraea_jax/lab/ahead.py).
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, astuple
from functools import partial
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
# libtpu would ask a metadata server which TPU this machine has, refuse a second process, and warn.
os.environ |= {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
os.environ |= {"TPU_ACCELERATOR_TYPE": "v5litepod-4", "TPU_WORKER_HOSTNAMES": "localhost"}
os.environ["JAX_TRITON_DUMP_DIR"] = tempfile.mkdtemp()  # read when jax-triton is imported

from absl import app, flags
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from astraea_jax.engine.config import KV_DTYPES
from astraea_jax.errors import StartupError
from astraea_jax.frontends.flags import run_main
from astraea_jax.kernels import BACKENDS
from astraea_jax.lab.ahead import EXECUTABLES, FORMS, TARGETS, Case, Figures, Unfit, compile_case
from astraea_jax.models.published import PUBLISHED

FLAGS = flags.FLAGS
flags.DEFINE_list("target", ["v5e", "v6e", "7x"], f"Some of {', '.join(TARGETS)}.")
flags.DEFINE_list("model", ["llama-3.1-8b", "qwen3-4b"], f"Some of {', '.join(PUBLISHED)}.")
flags.DEFINE_list("tp", ["1", "4"], "Devices that share the model.")
flags.DEFINE_enum("attention", None, list(BACKENDS), "Backend of attention; by default the one the engine would take.")
flags.DEFINE_bool("scan", None, "Run the layers as one loop; by default as the engine does, on TPUs.")
flags.DEFINE_enum("quantize", None, list(FORMS), "Form of the layers' weight matrices.")
flags.DEFINE_enum("kv_dtype", None, KV_DTYPES, "8-bit dtype of KV.")
flags.DEFINE_list("program", list(EXECUTABLES), f"Some of {', '.join(EXECUTABLES)}.")
flags.DEFINE_string("json", None, "Also write the figures to this file; those of other programs in it stay.")
flags.DEFINE_string("markdown", None, "Also write the table to this file, with all that --json has.")

COLUMNS = (
    *("target", "model", "tp", "weights", "KV", "attention", "layers", "program"),
    *("arguments GB", "aliased GB", "temp GB", "collectives", "launches", "s"),
)


def cases() -> list[Case]:
    """Cases that the flags name, in their order."""
    if unknown := sorted(
        {*FLAGS.target} - {*TARGETS} | {*FLAGS.model} - {*PUBLISHED} | {*FLAGS.program} - {*EXECUTABLES}
    ):
        raise app.UsageError(f"unknown: {', '.join(unknown)}")
    return [
        Case(target, model, int(tp), FLAGS.attention, FLAGS.scan, FLAGS.quantize, FLAGS.kv_dtype)
        for target in FLAGS.target
        for model in FLAGS.model
        for tp in FLAGS.tp
    ]


def row(figures: Figures) -> list[str]:
    """Make a row of the table; sizes are per device."""
    case, exchanges = figures.case, ", ".join(f"{n} {kind}" for kind, n in sorted(figures.collectives.items()))
    sizes = [f"{size / 1e9:.2f}" for size in (figures.arguments, figures.aliased)]
    layers = "loop" if case.scan else "unrolled"
    launches = "" if figures.launches is None else str(figures.launches)
    dtypes = [case.quantize or "bf16", case.kv_dtype or "bf16"]
    named = [case.target, case.model, str(case.tp), *dtypes, case.attention or "", layers, figures.program]
    return [*named, *sizes, f"{figures.temp / 1e9:.3f}", exchanges or "none", launches, f"{figures.seconds:.0f}"]


def markdown(done: list[Figures], unfit: dict[str, str]) -> str:
    lines = [COLUMNS, ["---"] * len(COLUMNS), *map(row, done)]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return "\n\n".join([table, *(f"Does not fit: {name}: {why}." for name, why in unfit.items())]) + "\n"


class FigureFile:
    """All figures: those that ``--json`` holds already, replaced where a program is compiled anew."""

    def __init__(self) -> None:
        self.programs: dict[tuple[Case, str], Figures] = {}
        self.unfit: dict[str, str] = {}
        if FLAGS.json and Path(FLAGS.json).exists():
            found = json.loads(Path(FLAGS.json).read_text())
            self.unfit = found["unfit"]
            for figures in found["programs"]:
                self.add(Figures(**{**figures, "case": Case(**figures["case"])}))

    def add(self, figures: Figures) -> None:
        self.programs[figures.case, figures.program] = figures

    def save(self) -> None:
        """Write the files that the flags name; after every program, since all together take long."""
        of_case = lambda figures: tuple(str(part) for part in astuple(figures.case))  # noqa: E731
        programs = sorted(self.programs.values(), key=of_case)  # stable: within a case they keep their order
        if FLAGS.json:
            record = {"programs": [asdict(figures) for figures in programs], "unfit": self.unfit}
            Path(FLAGS.json).write_text(json.dumps(record, indent=1) + "\n")
        if FLAGS.markdown:
            Path(FLAGS.markdown).write_text(markdown(programs, self.unfit))


def compile_all(console: Console) -> tuple[list[Figures], dict[str, str]]:
    """Compile every program that the flags ask for, and note why models do not fit."""
    done: list[Figures] = []
    unfit: dict[str, str] = {}
    file = FigureFile()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as bars:
        todo = cases()
        task = bars.add_task("compiling", total=len(todo) * len(FLAGS.program))
        for case in todo:
            name = f"{case.target} {case.model} tp={case.tp}"
            try:
                show = partial(_show, bars, task, name)
                for figures in compile_case(case, FLAGS.program, show):
                    done.append(figures)
                    file.add(figures)
                    bars.advance(task)
                    console.print(f"{name} {figures.program}: {figures.seconds:.0f} s")
                    for failure in figures.failures:
                        console.print(f"[red]{name} {figures.program}: {failure}")
                    file.save()
            except Unfit as error:
                unfit[name] = file.unfit[name] = str(error)
                bars.advance(task, len(FLAGS.program))
                file.save()
    return done, unfit


@contextlib.contextmanager
def cross_compiling() -> Iterator[None]:
    """Keep tokamax from asking the devices of this process for their features."""
    try:
        from tokamax._src import config
    except ImportError:
        yield
        return
    with config.cross_compile(True):
        yield


def _show(bars: Progress, task: TaskID, case: str, program: str) -> None:
    bars.update(task, description=f"{case} {program}")


def main(_: list[str]) -> None:
    atexit.register(shutil.rmtree, os.environ["JAX_TRITON_DUMP_DIR"])
    console = Console(stderr=True)
    try:
        with cross_compiling():
            done, unfit = compile_all(console)
    except StartupError as error:
        raise SystemExit(f"cannot compile: {error}") from None
    table = Table(*COLUMNS)
    for figures in done:
        table.add_row(*row(figures), style="red" if figures.failures else None)
    Console(width=180).print(table)
    for name, why in unfit.items():
        print(f"does not fit: {name}: {why}")
    sys.exit(any(figures.failures for figures in done))


if __name__ == "__main__":
    run_main(main)
