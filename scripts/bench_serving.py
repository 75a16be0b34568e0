"""Serving through the engine: throughput of many prompts at once, latencies under arrivals, and the time to start.

Prompts are random tokens, so that no prefix is shared, and outputs have the length asked for. Everything is printed
against floors measured in the same run (`astraea_jax/roofline.py`). The first start compiles everything, the second
finds it in the compile cache. Each part, and each peer, runs in a process of its own and may fail alone.

  python scripts/bench_serving.py                                    astraea-tiny, 64 prompts of 128 tokens, 64 out
  python scripts/bench_serving.py --peers=transformers,torch         and the same load for others ([parity] extra)
  python scripts/bench_serving.py --model=llama-3.1-8b --random_weights --input=1024 --output=128 --prompts=256 \\
      --max_seqs=128 --max_step_tokens=2048 --load=0.5,0.8           a published shape, on an accelerator
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jax
from absl import app, flags, logging
from rich.console import Console
from serving_load import Latencies, Load, Slo, offline, online

from astraea_jax.config import DTYPES, EngineConfig
from astraea_jax.engine import Engine
from astraea_jax.errors import StartupError
from astraea_jax.models import resolve
from astraea_jax.models.config import PUBLISHED, CheckpointError, ModelConfig, read_json
from astraea_jax.progress import StartupDisplay
from astraea_jax.record import Environment, Section, define_flags, publish
from astraea_jax.roofline import Floors, decode_bytes, prefill_operations

PEERS = ("transformers", "torch", "vllm", "sglang")
FLAGS = flags.FLAGS
flags.DEFINE_string("model", "astraea-tiny", "Checkpoint folder or bundled name; with --random_weights, a shape.")
flags.DEFINE_bool("random_weights", False, f"Random weights at a published shape: {', '.join(PUBLISHED)}.")
flags.DEFINE_enum("dtype", None, DTYPES, "Of weights and KV; by default float32 on a CPU, bfloat16 elsewhere.")
flags.DEFINE_integer("prompts", 64, "Prompts of the offline run, and of each online one.", lower_bound=2)
flags.DEFINE_integer("input", 128, "Tokens of a prompt.", lower_bound=1)
flags.DEFINE_integer("output", 64, "Tokens made for it.", lower_bound=2)
flags.DEFINE_float("spread", 0.0, "Both are up to this much shorter or longer, evenly.", 0.0, 0.99)
flags.DEFINE_integer("max_seqs", 32, "Segments that run at once.", lower_bound=1)
flags.DEFINE_integer("max_step_tokens", 512, "Tokens of one step.", lower_bound=1)
flags.DEFINE_integer("kv_bytes", None, "Device memory for KV pages; by default what is free (512 MiB on a CPU).", 1)
flags.DEFINE_list("load", ["0.5", "0.8"], "Rates of arrival, as shares of the offline run's; empty: no online run.")
flags.DEFINE_list("rate", [], "Rates of arrival in requests per second, instead.")
flags.DEFINE_float("slo_ttft_ms", 1000.0, "Goodput counts requests whose first token came within this time,")
flags.DEFINE_float("slo_tpot_ms", 50.0, "and whose later ones took this long on average at most.")
flags.DEFINE_list("peers", [], f"Also the offline load on others, of {', '.join(PEERS)}.")
flags.DEFINE_integer("timeout_s", 600, "Of each part.", lower_bound=1)
define_flags("bench_serving")
flags.DEFINE_enum("part", None, ["start", "serve"], "What a process of this benchmark's own does.")
flags.DEFINE_string("result", None, "Where it writes what it found.")
flags.DEFINE_string("compile_cache", None, "Where it keeps compiled steps.")

console = Console(width=max(120, Console().width))


def model_config() -> ModelConfig:
    if FLAGS.random_weights:
        if FLAGS.model not in PUBLISHED:
            raise StartupError(f"no published shape is called {FLAGS.model!r}; there are {', '.join(PUBLISHED)}")
        return PUBLISHED[FLAGS.model]
    return ModelConfig.from_hf(read_json(resolve(FLAGS.model) / "config.json"))


def load(seed: int) -> Load:
    return Load.draw(FLAGS.prompts, FLAGS.input, FLAGS.output, FLAGS.spread, model_config().vocab_size, seed)


# -- in a process of its own --------------------------------------------------------------------------------------


def start_engine() -> tuple[Engine, dict[str, float]]:
    """A started engine, and where the time went, in seconds."""
    entered, began = time.time(), time.perf_counter()
    jax.devices()
    device_s = time.perf_counter() - began
    config = EngineConfig(
        max_seqs=FLAGS.max_seqs,
        max_step_tokens=FLAGS.max_step_tokens,
        kv_bytes=FLAGS.kv_bytes,
        dtype=FLAGS.dtype,
        max_queued=max(1024, FLAGS.prompts),
        compile_cache=FLAGS.compile_cache,
    )
    with StartupDisplay() as display:
        began = time.perf_counter()
        if FLAGS.random_weights:
            engine = Engine.with_random_weights(FLAGS.model, config)
        else:
            engine = Engine.from_folder(FLAGS.model, config, progress=display.loading)
        loaded = time.perf_counter()
        engine.start(display.compiling)
        compile_s = time.perf_counter() - loaded
    times = {"entered": entered, "device_s": device_s, "weights_s": loaded - began, "compile_s": compile_s}
    return engine, {**times, "executables": engine.executables}


def serve() -> dict[str, Any]:
    """The offline run, then the online ones."""
    dtype = EngineConfig(dtype=FLAGS.dtype).weight_dtype()
    engine, start = start_engine()
    c, work = engine.model_config, load(0)
    offline(engine, load(1).first(2))  # to warm up
    done = offline(engine, work)
    rates = [float(x) for x in FLAGS.rate] or [float(x) * FLAGS.prompts / done.seconds for x in FLAGS.load]
    slo = Slo(FLAGS.slo_ttft_ms / 1e3, FLAGS.slo_tpot_ms / 1e3)
    arrivals = [online(engine, load(2 + i), rate, slo, seed=i) for i, rate in enumerate(rates)]
    kv_token, item = engine.layout.page_bytes / engine.config.page_size, dtype.itemsize
    engine.shutdown(grace_s=0)
    floors = Floors.measure(dtype)
    alone = decode_bytes(c, item, kv_token, 1, FLAGS.input + FLAGS.output / 2)
    steps = work.decode_steps(FLAGS.max_seqs)
    return {
        "start": start,
        "environment": asdict(Environment.here()),
        "floors": asdict(floors),
        "dtype": dtype.name,
        "offline": {
            **asdict(done),
            "prefill_floor_s": floors.matmul_s(prefill_operations(c, [len(p) for p in work.prompts])),
            "decode_floor_s": floors.read_s(decode_bytes(c, item, kv_token, steps, work.read_tokens())),
        },
        "online": [asdict(run) for run in arrivals],
        "ttft_floor_s": floors.matmul_s(prefill_operations(c, [FLAGS.input])),
        "tpot_floor_s": floors.read_s(alone),
    }


# -- the process that was called -------------------------------------------------------------------------------------


def own_part(part: str, cache: Path, folder: Path) -> dict[str, Any] | str:
    """What a part found, with its start-up times complete; or why it failed."""
    command = [sys.executable, *sys.argv, f"--part={part}", f"--compile_cache={cache}"]
    spawned = time.time()
    found = in_process(command, folder / f"{part}.json", "--result=")
    if isinstance(found, str):
        return found
    start = found["start"]
    start["import_s"] = start.pop("entered") - spawned
    start["total_s"] = sum(start[name] for name in ("import_s", "device_s", "weights_s", "compile_s"))
    return found


def peer(name: str, dtype: str, folder: Path) -> dict[str, Any] | str:
    if importlib.util.find_spec(name) is None:
        return "not installed"
    work = load(0)
    spec = {
        "hf": model_config().to_hf(),
        "folder": None if FLAGS.random_weights else str(resolve(FLAGS.model)),
        "dtype": dtype,
        "prompts": work.prompts,
        "outputs": work.outputs,
        "max_seqs": FLAGS.max_seqs,
        "max_step_tokens": FLAGS.max_step_tokens,
    }
    (folder / "load.json").write_text(json.dumps(spec))
    script = Path(__file__).with_name("serving_peers.py")
    return in_process([sys.executable, str(script), name, str(folder / "load.json")], folder / f"{name}.json")


def in_process(command: list[str], result: Path, flag: str = "") -> dict[str, Any] | str:
    """Run ``command`` with the file for its result as last argument; the result, or why there is none."""
    try:
        done = subprocess.run([*command, f"{flag}{result}"], stdout=sys.stderr, timeout=FLAGS.timeout_s)
    except subprocess.TimeoutExpired:
        return f"not ended after {FLAGS.timeout_s} s"
    if done.returncode:
        return f"failed with status {done.returncode}; its reason is above"
    return json.loads(result.read_text())


# -- tables ---------------------------------------------------------------------------------------------------------


def offline_section(found: dict[str, Any], peers: dict[str, dict[str, Any] | str]) -> Section:
    o = found["offline"]
    seconds, floor = o["seconds"], max(o["prefill_floor_s"], o["decode_floor_s"])
    both = o["prefill_floor_s"] + o["decode_floor_s"]
    rows = [
        ("all prompts", f"{seconds:.2f} s", f"{floor:.3f} s", f"{floor / seconds:.1%}"),
        ("  floor of prefill: products", "", f"{o['prefill_floor_s']:.3f} s", f"{o['prefill_floor_s'] / seconds:.1%}"),
        ("  floor of decode: memory", "", f"{o['decode_floor_s']:.3f} s", f"{o['decode_floor_s'] / seconds:.1%}"),
        ("  both, one after the other", "", f"{both:.3f} s", f"{both / seconds:.1%}"),
        ("requests", f"{FLAGS.prompts / seconds:,.2f} /s", "", ""),
        ("output tokens", f"{o['output_tokens'] / seconds:,.0f} /s", f"{o['output_tokens'] / floor:,.0f} /s", ""),
        ("input and output", f"{(o['input_tokens'] + o['output_tokens']) / seconds:,.0f} /s", "", ""),
    ]
    for name, other in peers.items():
        if isinstance(other, str):
            rows.append((name, other, "", ""))
            continue
        if other["output_tokens"] != o["output_tokens"]:
            rows.append((name, f"made {other['output_tokens']} tokens, not {o['output_tokens']}", "", ""))
            continue
        rate, ratio = other["output_tokens"] / other["seconds"], other["seconds"] / seconds
        said = f"we are {ratio:.2f}x; version {other['version']}; {other['note']}"
        rows.append((name, f"{rate:,.0f} output tokens/s", "", said))
    spread = f" ± {FLAGS.spread:.0%}" if FLAGS.spread else ""
    title = f"{FLAGS.model}{', random weights' if FLAGS.random_weights else ''}, {found['dtype']}: {FLAGS.prompts} "
    title += f"prompts at once, {FLAGS.input} in, {FLAGS.output} out{spread}, {FLAGS.max_seqs} running"
    return Section(title, ("", "measured", "floor", "floor / measured"), rows)


def online_section(found: dict[str, Any]) -> Section:
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
    rows.append(("floor, alone", "", "", *floors, "", "", ""))
    columns = ("requests/s", "of offline", "done/s", "TTFT ms", "TPOT ms", "ITL ms", "E2E s", "goodput")
    title = (
        f"Poisson arrivals, {FLAGS.prompts} requests each: P50 / P90 / P99; goodput: TTFT within "
        f"{FLAGS.slo_ttft_ms:g} ms and TPOT within {FLAGS.slo_tpot_ms:g} ms"
    )
    return Section(title, columns, rows)


def start_section(starts: dict[str, dict[str, Any] | str]) -> Section:
    rows = []
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
    if not FLAGS["verbosity"].present:
        logging.set_verbosity(logging.WARNING)  # what JAX tells about backends that it did not find is noise here
    for name in FLAGS.peers:
        if name not in PEERS:
            raise app.UsageError(f"--peers: {name!r} is none of {', '.join(PEERS)}")
    try:
        longest = load(0).longest
        if longest > model_config().max_position:
            raise StartupError(f"{longest} tokens are needed, the model has {model_config().max_position} positions")
        if FLAGS.part:
            found = serve() if FLAGS.part == "serve" else {"start": start_engine()[1]}
            Path(FLAGS.result).write_text(json.dumps(found))
            return
    except (CheckpointError, StartupError) as error:
        raise SystemExit(f"cannot measure: {error}") from None
    with tempfile.TemporaryDirectory(prefix="astraea-bench-") as name:
        folder = Path(name)
        cold = own_part("start", folder / "cache", folder)
        found = own_part("serve", folder / "cache", folder)
        if isinstance(found, str):
            raise SystemExit(f"cannot measure: {found}")
        peers = {name: peer(name, found["dtype"], folder) for name in FLAGS.peers}
    starts = {"first": cold, "again": found}
    sections = [offline_section(found, peers), *([online_section(found)] if found["online"] else [])]
    sections.append(start_section(starts))
    figures = {key: found[key] for key in ("dtype", "offline", "online", "ttft_floor_s", "tpot_floor_s")}
    figures["start"] = {key: s if isinstance(s, str) else s["start"] for key, s in starts.items()}
    environment = Environment(**found["environment"])
    publish(
        "bench_serving",
        sections,
        {**figures, "peers": peers},
        Floors(**found["floors"]),
        environment=environment,
        console=console,
    )


if __name__ == "__main__":
    app.run(main)
