"""Measures other engines beside ours: the same weights, token ids and greedy tokens, each in a process of its own.

The checkpoint is written here, as a Hugging Face folder (and GGUF for llama.cpp), with random weights unless --model is
a folder. All engines hold the KV of --pool tokens. Repetitions alternate between them, with other tokens each time;
those that are not measured are stopped. A ratio is that of one repetition, so that a machine that drifts does not
count. An engine that is not installed is named, with how to install it, and left out.

  python scripts/bench_peers.py                                     what is installed in this Python
  python scripts/bench_peers.py --peer_python=vllm=/envs/vllm/bin/python,llama.cpp=/envs/llama/bin/python
  python scripts/bench_peers.py --workloads=agents --repeats=1      one load only
"""

from __future__ import annotations

import contextlib
import fcntl
import multiprocessing
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np
from absl import app, flags
from rich.console import Console

from astraea_jax.frontends.flags import run_main
from astraea_jax.lab.peer_engines import Ready, Setup
from astraea_jax.lab.peer_process import RECIPES, PeerError, PeerProcess
from astraea_jax.lab.peer_tables import (
    OURS,
    WORKLOADS,
    Results,
    Workload,
    engines_section,
    figures_section,
    ratios_section,
)
from astraea_jax.lab.record import define_flags, publish
from astraea_jax.models import resolve
from astraea_jax.models.config import CheckpointError
from astraea_jax.models.config_file import read_json
from astraea_jax.models.families import read_config
from astraea_jax.models.published import PUBLISHED

FLAGS = flags.FLAGS
flags.DEFINE_string("model", "smollm2-135m", f"Checkpoint folder, bundled name, or shape: {', '.join(PUBLISHED)}.")
flags.DEFINE_list("peers", ["vllm", "llama.cpp", "transformers"], f"Engines: some of {', '.join(RECIPES)}.")
flags.DEFINE_list("peer_python", [], "Python of an engine that has its own, as NAME=PATH.")
flags.DEFINE_list("workloads", ["batch", "few", "one", "agents"], f"Some of {', '.join(WORKLOADS)}.")
flags.DEFINE_integer("repeats", 3, "Repetitions of each workload.", lower_bound=1)
flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16", "float16"], "Dtype of weights, activations and KV.")
flags.DEFINE_integer("pool", 8192, "Tokens whose KV each engine holds; of the agents' 16,000 that is half.", 1)
flags.DEFINE_integer("host_mib", 2048, "MiB for KV of waiting programs, where an engine has such a tier.", 0)
flags.DEFINE_integer("timeout_s", 600, "Limit of a start, and of a load.", lower_bound=1)
flags.DEFINE_string("lock", None, "File to be locked while something is measured, for others who measure here.")
define_flags("bench_peers")

console = Console(stderr=True, markup=False, highlight=False)


def write_checkpoint(shape: str, dtype: str, folder: Path) -> None:
    """Write random weights of a published shape, with the tokenizer of astraea-tiny."""
    from astraea_jax.models.checkpoint import BESIDE, random_decoder, save_hf

    save_hf(random_decoder(PUBLISHED[shape], np.dtype(dtype), seed=0), folder)
    for path in resolve("astraea-tiny").iterdir():
        if path.name in BESIDE and path.name != "config.json":
            shutil.copy(path, folder)


def checkpoint(folder: Path) -> Path:
    """The checkpoint to serve, copied or written into ``folder``."""
    made = folder / "model"
    if FLAGS.model not in PUBLISHED:
        return Path(shutil.copytree(resolve(FLAGS.model), made))
    writer = multiprocessing.get_context("spawn").Process(  # its device memory is free again afterwards
        target=write_checkpoint, args=(FLAGS.model, FLAGS.dtype, made)
    )
    writer.start()
    writer.join()
    if writer.exitcode:
        raise SystemExit("cannot measure: the checkpoint could not be written, as above")
    return made


def start(
    names: Iterable[str], setup: Setup, folder: Path, stack: contextlib.ExitStack
) -> tuple[dict[str, PeerProcess], dict[str, Ready | str]]:
    """Start engines one after the other; ``stack`` ends them.

    Returns:
        Those that run, and of each what it says or why it does not.
    """
    processes, states = {}, dict[str, Ready | str]()
    for name in names:
        console.print(f"{name}: starts")
        process = None
        try:
            process = PeerProcess(name, pythons().get(name, sys.executable), setup, folder)
            stack.callback(process.end)
            states[name] = process.ready(FLAGS.timeout_s)
            process.pause()
            processes[name] = process
        except PeerError as error:
            states[name] = str(error)
            console.print(f"{name}: {error}")
            if process is not None:
                process.end()
    return processes, states


def measure(
    processes: dict[str, PeerProcess], workloads: dict[str, Workload], vocab: int, states: dict[str, Ready | str]
) -> Results:
    """Run every workload on every engine, in turns; an engine that fails is ended, and ``states`` says why."""
    results: Results = {name: {workload: [] for workload in workloads} for name in processes}
    alive = list(processes)
    for repeat in range(FLAGS.repeats):
        for key, workload in workloads.items():
            load = workload.load(vocab, seed=repeat)
            first = repeat % max(1, len(alive))
            for name in [*alive[first:], *alive[:first]]:
                try:
                    with locked(), processes[name].running():
                        served = processes[name].serve(load, FLAGS.timeout_s)
                except PeerError as error:
                    ready = states[name]
                    which = f"{ready.version} " if isinstance(ready, Ready) else ""
                    states[name] = f"{which}failed at {key}: {error}"
                    console.print(f"{name}: {states[name]}")
                    processes[name].end()
                    alive.remove(name)
                    continue
                results[name][key].append(served)
                said = ", ".join(f"{f.of(served):.{f.digits}f} {f.name}" for f in workload.figures)
                console.print(f"{repeat + 1}/{FLAGS.repeats} {key}, {name}: {said}")
    return results


@contextlib.contextmanager
def locked() -> Iterator[None]:
    """Hold ``--lock``, if there is one."""
    if FLAGS.lock is None:
        yield
        return
    with open(FLAGS.lock, "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def chosen() -> dict[str, Workload]:
    """The workloads that the flags choose; all flags have been checked then."""
    for flag, given, known in (("peers", FLAGS.peers, RECIPES), ("workloads", FLAGS.workloads, WORKLOADS)):
        if not set(given) <= set(known):
            raise app.UsageError(f"--{flag}: {', '.join(given)}: not all of them are of {', '.join(known)}")
    pythons()
    if not FLAGS.workloads:
        raise app.UsageError(f"--workloads: give at least one of {', '.join(WORKLOADS)}")
    workloads = {name: WORKLOADS[name] for name in FLAGS.workloads}
    longest = max(workload.longest for workload in workloads.values())
    if longest > FLAGS.pool:
        raise app.UsageError(f"--pool: a context has up to {longest} tokens")
    if FLAGS.lock is not None:
        try:
            open(FLAGS.lock, "a").close()
        except OSError as error:
            raise app.UsageError(f"--lock: {FLAGS.lock}: {error.strerror}") from None
    return workloads


def main(_: list[str]) -> None:
    workloads = chosen()
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # as nohup has it
            signal.signal(number, lambda *_: sys.exit(1))  # so that what has been started is ended, too
    with tempfile.TemporaryDirectory(prefix="astraea-peers-") as made, contextlib.ExitStack() as stack:
        folder = Path(made)
        try:
            model = checkpoint(folder)
            vocab = read_config(read_json(model / "config.json")).vocab_size
        except CheckpointError as error:
            raise SystemExit(f"cannot measure: {error}") from None
        longest = max(workload.longest for workload in workloads.values())
        setup = Setup(str(model), FLAGS.dtype, 32, FLAGS.pool, min(FLAGS.pool, longest + 1), FLAGS.host_mib << 20)
        names = dict.fromkeys([OURS, *FLAGS.peers])
        processes, states = start(names, setup, folder, stack)
        if OURS not in processes:
            raise SystemExit(f"cannot measure: {states[OURS]}")
        results = measure(processes, workloads, vocab, states)
    report(results, workloads, states)


def report(results: Results, workloads: dict[str, Workload], states: dict[str, Ready | str]) -> None:
    """Print and record what was measured."""
    title = f"{FLAGS.model}, {FLAGS.dtype}, KV of {FLAGS.pool:,} tokens, n = {FLAGS.repeats}"
    sections = [
        figures_section(results, workloads, title),
        ratios_section(results, workloads),
        engines_section(results, states),
    ]
    figures = {
        "engines": {name: state if isinstance(state, str) else asdict(state) for name, state in states.items()},
        "results": {
            name: {
                key: {figure.name: [figure.of(run) for run in runs] for figure in workloads[key].figures}
                for key, runs in of_one.items()
            }
            for name, of_one in results.items()
        },
    }
    publish("bench_peers", sections, figures, console=Console(width=max(180, Console().width)))


def pythons() -> dict[str, str]:
    """``--peer_python`` as a dictionary."""
    given = [text.partition("=") for text in FLAGS.peer_python]
    for name, _, python in given:
        if name not in RECIPES or not python:
            raise app.UsageError(f"--peer_python: {name!r} must be one of {', '.join(RECIPES)}, with =PATH after it")
    return {name: python for name, _, python in given}


def run() -> None:
    """Run the benchmark."""
    run_main(main, __name__)


if __name__ == "__main__":
    run()
