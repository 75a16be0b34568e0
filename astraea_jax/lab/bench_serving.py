r"""Measures serving through the engine: throughput of many prompts, latencies under arrivals, and the time to start.

Prompts are random tokens, so that no prefix is shared, and outputs have the length asked for. Everything is printed
against a roofline measured in the same run (`astraea_jax/lab/roofline.py`). The first start compiles everything, the
second finds it in the compile cache. Each part, and each peer, runs in a process of its own and may fail alone. Where
prefill and decode share steps, what one reads and the other computes may overlap, so the floor is the larger of both.

  python scripts/bench_serving.py                                    astraea-tiny, 64 prompts of 128 tokens, 64 out
  python scripts/bench_serving.py --peers=transformers,torch         and the same load for others ([parity] extra)
  python scripts/bench_serving.py --model=llama-3.1-8b --random_weights --input=1024 --output=128 --prompts=256 \
      --max_seqs=128 --max_step_tokens=2048 --load=0.5,0.8           a published shape, on an accelerator
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import jax
from absl import app, flags
from rich.console import Console

from astraea_jax.engine.engine import Engine
from astraea_jax.engine.replicas import load_engine
from astraea_jax.errors import StartupError
from astraea_jax.frontends.flags import MODEL, engine_flags, engine_title, run_main
from astraea_jax.frontends.progress import StartupDisplay
from astraea_jax.lab.peer_engines import Load as PeerLoad
from astraea_jax.lab.peer_engines import Setup
from astraea_jax.lab.peer_process import PeerError, PeerProcess
from astraea_jax.lab.record import Environment, Section, command, define_flags, publish
from astraea_jax.lab.roofline import Roofline, Work
from astraea_jax.lab.serving_load import Latencies, Load, Slo, offline, online
from astraea_jax.models import resolve
from astraea_jax.models.config import CheckpointError, ModelConfig
from astraea_jax.models.config_file import read_json
from astraea_jax.models.families import read_config, to_hf
from astraea_jax.models.published import PUBLISHED

PEERS = ("transformers", "torch", "vllm", "sglang")
FLAGS = flags.FLAGS
flags.DEFINE_string("model", "astraea-tiny", "Checkpoint folder or bundled name; with --random_weights, a shape.")
flags.DEFINE_bool("random_weights", False, f"Random weights at a published shape: {', '.join(PUBLISHED)}.")
options = engine_flags(*MODEL, "max_seqs", "max_step_tokens", max_seqs=32, max_step_tokens=512)
flags.DEFINE_integer("prompts", 64, "Prompts of the offline run.", lower_bound=2)
flags.DEFINE_integer("input", 128, "Tokens of a prompt.", lower_bound=1)
flags.DEFINE_integer("output", 64, "Tokens generated for each prompt.", lower_bound=2)
flags.DEFINE_float("spread", 0.0, "Share by which --input and --output vary, evenly.", 0.0, 0.99)
flags.DEFINE_list("load", ["0.5", "0.8"], "Rates of arrival, as shares of the offline run's; empty: no online run.")
flags.DEFINE_list("rate", [], "Rates of arrival in requests per second, instead of --load.")
flags.DEFINE_integer("arrivals", None, "Prompts of each online run; by default as many as offline.", lower_bound=2)
flags.DEFINE_float("slo_ttft_ms", 1000.0, "Goodput counts requests whose first token came within this time.")
flags.DEFINE_float("slo_tpot_ms", 50.0, "Goodput counts requests whose later tokens took this long on average at most.")
flags.DEFINE_list("peers", [], f"Other engines that get the offline load, too: some of {', '.join(PEERS)}.")
flags.DEFINE_integer("timeout_s", 1200, "Limit for all parts together; one that exceeds its share is stopped.", 1)
define_flags("bench_serving")
flags.DEFINE_enum("part", None, ["start", "serve"], "Internal: the part that this process runs.")
flags.DEFINE_string("result", None, "Internal: file for the figures of that part.")
flags.DEFINE_string("compile_cache", None, "Internal: folder for compiled steps.")

ENTERED = time.time()
"""Time at which all imports were done."""


def model_config() -> ModelConfig:
    if FLAGS.random_weights:
        if FLAGS.model not in PUBLISHED:
            raise StartupError(f"no published shape is called {FLAGS.model!r}; there are {', '.join(PUBLISHED)}")
        return PUBLISHED[FLAGS.model]
    return read_config(read_json(resolve(FLAGS.model) / "config.json"))


def load(seed: int) -> Load:
    return Load.draw(FLAGS.prompts, FLAGS.input, FLAGS.output, FLAGS.spread, model_config().vocab_size, seed)


def longest() -> int:
    """Tokens of the longest context that may be drawn."""
    return sum(round(tokens * (1 + FLAGS.spread)) for tokens in (FLAGS.input, FLAGS.output))


def numbers(name: str) -> list[float]:
    """Parse a flag that is a list of numbers above 0."""
    try:
        found = [float(x) for x in FLAGS[name].value or ()]
    except ValueError:
        raise app.UsageError(f"--{name}: {FLAGS[name].value} are not all numbers") from None
    if not all(0 < x < float("inf") for x in found):
        raise app.UsageError(f"--{name}: all must be above 0")
    return found


def arrivals() -> int:
    return min(FLAGS.arrivals or FLAGS.prompts, FLAGS.prompts)


# -- the child process of a part ------------------------------------------------------------------------------------


def open_device() -> float:
    """Seconds until JAX has its device."""
    began = time.perf_counter()
    jax.devices()
    return time.perf_counter() - began


def start_engine(device_s: float) -> tuple[Engine, dict[str, float]]:
    """A started engine, and where the time went, in seconds."""
    config = options(max_queued=max(1024, FLAGS.prompts), compile_cache=FLAGS.compile_cache)
    with StartupDisplay() as display:
        began = time.perf_counter()
        (engine,) = load_engine(
            FLAGS.model, config, random_weights=FLAGS.random_weights, progress=display.loading
        ).replicas
        loaded = time.perf_counter()
        engine.start(display.compiling)
        compile_s = time.perf_counter() - loaded
    times = {"entered": ENTERED, "device_s": device_s, "weights_s": loaded - began, "compile_s": compile_s}
    return engine, {**times, "executables": engine.executables}


def serve() -> None:
    """The offline run, then the online ones; what there is so far is written down after each."""
    device_s = open_device()
    dtype = options().weight_dtype()
    roofline = Roofline.measure(dtype)  # now, while there is memory
    engine, start = start_engine(device_s)
    offline(engine, load(1).first(2))  # to warm up
    work = load(0)
    done = offline(engine, work)
    ideal = Work.of(engine.model_config, engine.config, engine.layout)
    decode = ideal.decode_bytes(work.decode_steps(FLAGS.max_seqs), work.read_tokens())
    alone = ideal.decode_bytes(1, FLAGS.input + FLAGS.output / 2)
    found: dict[str, Any] = {
        "start": start,
        "environment": asdict(Environment.here()),
        "floors": asdict(roofline),
        "dtype": dtype.name,
        "engine": engine_title(engine),
        "offline": {
            **asdict(done),
            "prefill_floor_s": roofline.matmul_s(ideal.prefill_operations([len(p) for p in work.prompts])),
            "decode_floor_s": roofline.read_s(decode),
        },
        "ttft_floor_s": roofline.matmul_s(ideal.prefill_operations([FLAGS.input])),
        "tpot_floor_s": roofline.read_s(alone),
        "online": [],
    }
    write_result(found)
    rates = numbers("rate") or [share * FLAGS.prompts / done.seconds for share in numbers("load")]
    slo = Slo(FLAGS.slo_ttft_ms / 1e3, FLAGS.slo_tpot_ms / 1e3)
    for i, rate in enumerate(rates):
        found["online"].append(asdict(online(engine, load(2 + i).first(arrivals()), rate, slo, seed=i)))
        write_result(found)
    engine.shutdown(grace_s=0)


def write_result(found: dict[str, Any]) -> None:
    written = Path(f"{FLAGS.result}.new")
    written.write_text(json.dumps(found))
    written.replace(FLAGS.result)  # whole or not at all: its reader may stop this process at any time


# -- the parent process ----------------------------------------------------------------------------------------------


def own_part(part: str, folder: Path, within_s: float) -> dict[str, Any] | str:
    """Figures of a part, its start-up times included; or why it failed."""
    result = folder / f"{part}.json"
    spawned = time.time()
    own = (f"--part={part}", f"--compile_cache={folder / 'cache'}", f"--result={result}")
    found = in_process([sys.executable, "-m", "astraea_jax.lab.bench_serving", *sys.argv[1:], *own], result, within_s)
    if isinstance(found, dict):
        start = found["start"]
        start["import_s"] = start.pop("entered") - spawned
        start["total_s"] = sum(start[name] for name in ("import_s", "device_s", "weights_s", "compile_s"))
    return found


def peer(name: str, dtype: str, folder: Path, within_s: float) -> dict[str, Any] | str:
    """Figures of another engine on the offline load; or why there are none."""
    until = time.monotonic() + within_s
    work = load(0)
    if name == "torch":
        return products(work, dtype, folder, within_s)
    total = sum(map(len, work.prompts)) + sum(work.outputs) + 256 * len(work.prompts)  # the rest of their last blocks
    setup = Setup(str(model_folder(folder, dtype)), dtype, FLAGS.max_seqs, total, longest() + 1, host_bytes=0)
    with contextlib.ExitStack() as stack:
        try:
            process = PeerProcess(name, sys.executable, setup, folder)
            stack.callback(process.end)
            ready = process.ready(within_s)
            began = time.monotonic()
            served = process.serve(PeerLoad([[prompt] for prompt in work.prompts], list(work.outputs)), until - began)
        except PeerError as error:
            return str(error)
    return {**asdict(ready), "seconds": served.seconds, "output_tokens": sum(map(len, served.tokens))}


def model_folder(folder: Path, dtype: str) -> Path:
    """The checkpoint, or a folder with nothing but the configuration if weights are random."""
    if not FLAGS.random_weights:
        return resolve(FLAGS.model)
    made = folder / "shape"
    made.mkdir(exist_ok=True)
    (made / "config.json").write_text(json.dumps({**to_hf(model_config()), "dtype": dtype}))
    return made


def products(work: Load, dtype: str, folder: Path, within_s: float) -> dict[str, Any] | str:
    """Figures of ``torch_products.py``; or why there are none."""
    if importlib.util.find_spec("torch") is None:
        return "not installed"
    spec = {"hf": to_hf(model_config()), "dtype": dtype, "inputs": [len(p) for p in work.prompts]}
    spec |= {"outputs": work.outputs, "max_seqs": FLAGS.max_seqs, "max_step_tokens": FLAGS.max_step_tokens}
    source, result = folder / "load.json", folder / "torch.json"
    source.write_text(json.dumps(spec))
    command = [sys.executable, "-m", "astraea_jax.lab.torch_products", str(source), str(result)]
    return in_process(command, result, within_s)


def in_process(arguments: list[str], result: Path, within_s: float) -> dict[str, Any] | str:
    """Run a command that writes ``result``; return its content, or why there is none."""
    status = 0
    process = subprocess.Popen(arguments, stdout=sys.stderr, start_new_session=True)
    try:
        status = process.wait(max(0.0, within_s))
    except subprocess.TimeoutExpired:
        sys.stderr.write(f"stopped after {within_s:.0f} s: {shlex.join(arguments)}\n")
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # and what it has started: it would keep the device's memory
        process.wait()
    if status or not result.exists():
        return f"failed with status {status}, as above" if status else f"nothing after {within_s:.0f} s"
    return json.loads(result.read_text())


# -- tables ---------------------------------------------------------------------------------------------------------


def offline_section(found: dict[str, Any]) -> Section:
    o = found["offline"]
    seconds, prefill, decode = o["seconds"], o["prefill_floor_s"], o["decode_floor_s"]
    share = lambda floor: (f"{floor:.3f} s", f"{floor / seconds:.1%}")  # noqa: E731
    floor = max(prefill, decode)
    rows = [
        ("all prompts", f"{seconds:.2f} s", *share(floor)),
        ("  prefill: its products", "", *share(prefill)),
        ("  decode: its reads", "", *share(decode)),
        ("  one after the other", "", *share(prefill + decode)),
        ("requests", f"{FLAGS.prompts / seconds:,.2f} /s", f"{FLAGS.prompts / floor:,.2f} /s", ""),
        ("output tokens", f"{o['output_tokens'] / seconds:,.0f} /s", f"{o['output_tokens'] / floor:,.0f} /s", ""),
        ("input and output", f"{(o['input_tokens'] + o['output_tokens']) / seconds:,.0f} /s", "", ""),
    ]
    spread = f" ± {FLAGS.spread:.0%}" if FLAGS.spread else ""
    title = f"{FLAGS.model}{', random weights' if FLAGS.random_weights else ''}, {found['engine']}: {FLAGS.prompts} "
    title += f"prompts at once, {FLAGS.input} in, {FLAGS.output} out{spread}, {FLAGS.max_seqs} running"
    return Section(title, ("", "measured", "floor", "floor / measured"), rows)


def peers_section(found: dict[str, Any], peers: dict[str, dict[str, Any] | str]) -> Section:
    o = found["offline"]
    rows = [("astraea_jax", f"{o['output_tokens'] / o['seconds']:,.0f}", "", f"{found['start']['total_s']:.1f} s", "")]
    for name, other in peers.items():
        if isinstance(other, str):
            rows.append((name, "", "", "", other))
        elif other["output_tokens"] != o["output_tokens"]:
            rows.append((name, "", "", "", f"made {other['output_tokens']} tokens, not {o['output_tokens']}"))
        else:
            rate = f"{other['output_tokens'] / other['seconds']:,.0f}"
            ratio = f"{other['seconds'] / o['seconds']:.2f}x"
            rows.append((name, rate, ratio, f"{other['start_s']:.1f} s", f"{other['version']}: {other['note']}"))
    return Section("The same prompts on others", ("", "output tokens/s", "we are", "start-up", "what"), rows)


def online_section(found: dict[str, Any], rates: int) -> Section:
    offline_rate = FLAGS.prompts / found["offline"]["seconds"]
    rows = []
    for run in found["online"]:
        rows.append(
            (
                f"{run['rate']:.2f}",
                f"{run['rate'] / offline_rate:.0%}",
                f"{run['requests_s']:.2f}",
                *(Latencies(**run[name]).text(1e3, 1) for name in ("ttft", "tpot", "itl")),
                Latencies(**run["e2e"]).text(1, 2),
                f"{run['good']:.0%}, {run['good_s']:.2f}/s",
            )
        )
    floors = (f"{1e3 * found[f'{name}_floor_s']:.2f}" for name in ("ttft", "tpot"))
    missing = rates - len(found["online"])
    rows += [("not measured", "", "no time", "", "", "", "", "")] * missing
    rows.append(("floor, alone", "", "", *floors, "", "", ""))
    columns = ("requests/s", "of offline", "done/s", "TTFT ms", "TPOT ms", "ITL ms", "E2E s", "goodput")
    title = (
        f"Poisson arrivals, {arrivals()} requests each: P50 / P90 / P99; goodput: TTFT within "
        f"{FLAGS.slo_ttft_ms:g} ms and TPOT within {FLAGS.slo_tpot_ms:g} ms"
    )
    return Section(title, columns, rows)


def start_section(starts: dict[str, dict[str, Any] | str]) -> Section:
    rows: list[tuple[str, ...]] = []
    for name, found in starts.items():
        if isinstance(found, str):
            rows.append((name, found, "", "", "", "", ""))
            continue
        s = found["start"]
        parts = ("import_s", "device_s", "weights_s", "compile_s", "total_s")
        rows.append((name, *(f"{s[part]:.2f} s" for part in parts), f"{s['executables']:.0f}"))
    columns = ("", "import", "device", "weights", "compile", "ready after", "executables")
    return Section("Start-up, with an empty compile cache and with what that left", columns, rows)


def main(_: list[str]) -> None:
    for name in FLAGS.peers:
        if name not in PEERS:
            raise app.UsageError(f"--peers: {name!r} is none of {', '.join(PEERS)}")
    rates = len(numbers("rate") or numbers("load"))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that what has been started is ended, too
    try:
        if longest() > model_config().max_position:
            raise StartupError(f"{longest()} tokens are needed, the model has {model_config().max_position} positions")
        if FLAGS.part == "start":
            write_result({"start": start_engine(open_device())[1]})
        elif FLAGS.part == "serve":
            serve()
    except (CheckpointError, StartupError) as error:
        raise SystemExit(f"cannot measure: {error}") from None
    if FLAGS.part is None:
        measure(rates)


def measure(rates: int) -> None:
    """Run every part, then print the tables; the online run goes through ``rates`` rates of arrival."""
    until = time.monotonic() + FLAGS.timeout_s
    left = lambda share: share * (until - time.monotonic())  # noqa: E731
    with tempfile.TemporaryDirectory(prefix="astraea-bench-") as made:
        folder = Path(made)
        first = own_part("start", folder, left(0.4))
        found = own_part("serve", folder, left(0.7 if FLAGS.peers else 1))
        if isinstance(found, str):
            raise SystemExit(f"cannot measure: {found}")
        peers = {}
        for i, name in enumerate(FLAGS.peers):
            peers[name] = peer(name, found["dtype"], folder, left(1 / (len(FLAGS.peers) - i)))
    sections = [offline_section(found)]
    if peers:
        sections.append(peers_section(found, peers))
    if rates:
        sections.append(online_section(found, rates))
    starts = {"first": first, "again": found}
    figures = {key: found[key] for key in ("dtype", "engine", "offline", "online", "ttft_floor_s", "tpot_floor_s")}
    figures["start"] = {key: s if isinstance(s, str) else s["start"] for key, s in starts.items()}
    environment = replace(Environment(**found["environment"]), command=command())
    publish(
        "bench_serving",
        [*sections, start_section(starts)],
        {**figures, "peers": peers},
        Roofline(**found["floors"]),
        environment=environment,
        console=Console(width=max(140, Console().width)),
    )


def run() -> None:
    """Run the benchmark."""
    run_main(main, __name__)


if __name__ == "__main__":
    run()
