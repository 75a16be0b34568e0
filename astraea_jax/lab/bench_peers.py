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
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from absl import app, flags
from rich.console import Console

from astraea_jax.frontends.flags import run_main
from astraea_jax.lab.peer_engines import Load, Ready, Served, Setup
from astraea_jax.lab.peer_process import RECIPES, PeerError, PeerProcess
from astraea_jax.lab.record import Section, define_flags, publish
from astraea_jax.models import resolve
from astraea_jax.models.config import PUBLISHED, CheckpointError, ModelConfig, read_json

OURS = "astraea"


@dataclass(frozen=True)
class Figure:
    """A figure of a load that was served."""

    name: str
    of: Callable[[Served], float]
    digits: int


RATE = Figure("tok/s", lambda served: sum(map(len, served.tokens)) / served.seconds, 1)
TTFT = Figure("TTFT, s (less is better)", lambda served: statistics.median(served.ttft), 3)
JCT = Figure("mean JCT, s (less is better)", lambda served: statistics.mean(served.jct), 1)


@dataclass(frozen=True)
class Workload:
    """Programs that begin together, and what is looked at."""

    programs: int
    turns: int
    new: int
    """Tokens that each turn adds."""
    output: int
    figures: tuple[Figure, ...]
    wait_s: float = 0.0

    def load(self, vocab: int, seed: int) -> Load:
        """Draw random token ids."""
        tokens = np.random.default_rng(seed).integers(0, vocab, (self.programs, self.turns, self.new))
        return Load(tokens.tolist(), [self.output] * self.programs, self.wait_s)

    @property
    def longest(self) -> int:
        """Tokens of the longest context."""
        return self.turns * (self.new + self.output)

    def __str__(self) -> str:
        turns = f" x {self.turns} turns" if self.turns > 1 else ""
        return f"{self.programs}{turns} x ({self.new} in, {self.output} out)"


WORKLOADS = {
    "batch": Workload(32, 1, 128, 32, (RATE,)),
    "batch_long": Workload(32, 1, 128, 128, (RATE,)),
    "few": Workload(8, 1, 32, 64, (RATE,)),
    "one": Workload(1, 1, 512, 32, (RATE, TTFT)),
    "agents": Workload(16, 5, 170, 30, (JCT,), wait_s=0.2),
}

FLAGS = flags.FLAGS
flags.DEFINE_string("model", "smollm2-135m", f"Checkpoint folder, bundled name, or shape: {', '.join(PUBLISHED)}.")
flags.DEFINE_list("peers", ["vllm", "llama.cpp", "transformers"], f"Engines: some of {', '.join(RECIPES)}.")
flags.DEFINE_list("peer_python", [], "Python of an engine that has its own, as NAME=PATH.")
flags.DEFINE_list("workloads", ["batch", "few", "one", "agents"], f"Some of {', '.join(WORKLOADS)}.")
flags.DEFINE_integer("repeats", 3, "Repetitions of each workload.", lower_bound=1)
flags.DEFINE_string("dtype", "float32", "Dtype of weights, activations and KV.")
flags.DEFINE_integer("pool", 8192, "Tokens whose KV each engine holds; of the agents' 16,000 that is half.", 1)
flags.DEFINE_integer("host_mib", 2048, "MiB for KV of waiting programs, where an engine has such a tier.", 0)
flags.DEFINE_integer("timeout_s", 600, "Limit of a start, and of a load.", lower_bound=1)
flags.DEFINE_string("lock", None, "File to be locked while something is measured, for others who measure here.")
define_flags("bench_peers")

console = Console(stderr=True, markup=False, highlight=False)

Results = dict[str, dict[str, list[Served]]]
"""Engine -> workload -> what each repetition gave; an engine that failed has fewer."""


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


def start(names: Sequence[str], setup: Setup, folder: Path) -> tuple[dict[str, PeerProcess], dict[str, Ready | str]]:
    """Start engines one after the other; returns those that run, and of each what it says or why it does not."""
    processes, states = {}, dict[str, Ready | str]()
    for name in names:
        console.print(f"{name}: starts")
        process = None
        try:
            process = PeerProcess(name, pythons().get(name, sys.executable), setup, folder)
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
            for name in [*alive[repeat % len(alive) :], *alive[: repeat % len(alive)]]:
                try:
                    with locked(), processes[name].running():
                        served = processes[name].serve(load, FLAGS.timeout_s)
                except PeerError as error:
                    states[name] = f"failed at {key}: {error}"
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


# -- tables ---------------------------------------------------------------------------------------------------------


def spread(values: Sequence[float], digits: int) -> str:
    """Median, and the range if there are several."""
    if not values:
        return ""
    several = f" ({min(values):.{digits}f}-{max(values):.{digits}f})" if len(values) > 1 else ""
    return f"{statistics.median(values):.{digits}f}{several}"


def same_tokens(ours: Sequence[Served], theirs: Sequence[Served]) -> tuple[int, int]:
    """Programs that were given the same tokens, and all programs."""
    pairs = [pair for a, b in zip(ours, theirs) for pair in zip(a.tokens, b.tokens)]
    return sum(a == b for a, b in pairs), len(pairs)


def figures_section(results: Results, workloads: dict[str, Workload], title: str) -> Section:
    rows = [
        (
            f"{key}: {workload}",
            figure.name,
            *(spread([*map(figure.of, r[key])], figure.digits) for r in results.values()),
        )
        for key, workload in workloads.items()
        for figure in workload.figures
    ]
    return Section(f"{title}: medians (ranges)", ("", "", *results), rows, named=2)


def ratios_section(results: Results, workloads: dict[str, Workload]) -> Section:
    others = [name for name in results if name != OURS]
    rows = []
    for key, workload in workloads.items():
        for figure in workload.figures:
            ratios = [
                [figure.of(a) / figure.of(b) for a, b in zip(results[OURS][key], results[n][key])] for n in others
            ]
            rows.append((key, figure.name, *(spread(of_one, 2) for of_one in ratios)))
    return Section("Ours over theirs, by repetition: medians (ranges)", ("", "", *others), rows, named=2)


def engines_section(results: Results, states: dict[str, Ready | str]) -> Section:
    rows = []
    for name, state in states.items():
        ready = (state.version, f"{state.start_s:.0f} s", state.note) if isinstance(state, Ready) else ("", "", state)
        same, programs = np.sum(
            [same_tokens(results[OURS][key], runs) for key, runs in results.get(name, {}).items()] or [(0, 0)], axis=0
        )
        rows.append((name, ready[0], ready[1], f"{same} of {programs}" if programs and name != OURS else "", ready[2]))
    columns = ("", "version", "start", "programs with our tokens", "how, or why not")
    return Section("Engines", columns, rows)


def main(_: list[str]) -> None:
    for flag, given, known in (("peers", FLAGS.peers, RECIPES), ("workloads", FLAGS.workloads, WORKLOADS)):
        if not set(given) <= set(known):
            raise app.UsageError(f"--{flag}: {', '.join(given)}: not all of them are of {', '.join(known)}")
    pythons()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that what has been started is ended, too
    workloads = {name: WORKLOADS[name] for name in FLAGS.workloads}
    longest = max(workload.longest for workload in workloads.values())
    if longest > FLAGS.pool:
        raise app.UsageError(f"--pool: a context has up to {longest} tokens")
    with tempfile.TemporaryDirectory(prefix="astraea-peers-") as made, contextlib.ExitStack() as stack:
        folder = Path(made)
        try:
            model = checkpoint(folder)
            vocab = ModelConfig.from_hf(read_json(model / "config.json")).vocab_size
        except CheckpointError as error:
            raise SystemExit(f"cannot measure: {error}") from None
        setup = Setup(str(model), FLAGS.dtype, 32, FLAGS.pool, min(FLAGS.pool, longest + 1), FLAGS.host_mib << 20)
        names = [OURS, *(name for name in FLAGS.peers if name != OURS)]
        processes, states = start(names, setup, folder)
        for process in processes.values():
            stack.callback(process.end)
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
