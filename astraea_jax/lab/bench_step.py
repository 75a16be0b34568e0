"""Measures how fast the serving loop steps, beside the roofline of this machine.

The roofline is measured in the same run (`astraea_jax/lab/roofline.py`).

The device waits for the host only before steps that were dispatched after the one before had ended, and then for no
longer than the host's work; that bounds the gap.

  python scripts/bench_step.py                                      astraea-tiny, 64 programs of 256 tokens
  python scripts/bench_step.py --batch=32 --compare_transformers    the same weights in transformers, same machine
  python scripts/bench_step.py --batch=32 --spread=0.5 --compare_transformers    prompts of 128 to 384 tokens
  python scripts/bench_step.py --batch=16 --context=2000 --mixed=64  also steps with a prompt beside rows that decode
  python scripts/bench_step.py --batch=32 --extras                   also rows with penalties, a grammar, log-probs
  python scripts/bench_step.py --model=llama-3.2-1b --random_weights --batch=8 --context=128
"""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from absl import app, flags

from astraea_jax.engine.config import EngineConfig
from astraea_jax.engine.engine import Engine
from astraea_jax.engine.replicas import load_engine
from astraea_jax.engine.sampling import SamplingParams
from astraea_jax.engine.times import StepTimes
from astraea_jax.errors import StartupError
from astraea_jax.frontends.flags import MODEL, engine_flags, engine_title, run_main
from astraea_jax.frontends.progress import StartupDisplay
from astraea_jax.lab import mixed_step
from astraea_jax.lab.device_profile import Profile, traced
from astraea_jax.lab.mixed_step import MixedStep
from astraea_jax.lab.record import Section, define_flags, publish
from astraea_jax.lab.roofline import Roofline, Work
from astraea_jax.models import resolve
from astraea_jax.models.config import CheckpointError
from astraea_jax.models.published import PUBLISHED

FLAGS = flags.FLAGS
flags.DEFINE_string(
    "model", "astraea-tiny", "Checkpoint folder or bundled name; with --random_weights, a published shape."
)
flags.DEFINE_bool("random_weights", False, f"Random weights at a published shape: {', '.join(PUBLISHED)}.")
flags.DEFINE_integer("batch", 64, "Programs that decode at once.", lower_bound=1)
flags.DEFINE_integer("context", 256, "Prompt tokens of each program.", lower_bound=1)
flags.DEFINE_float(
    "spread",
    0.0,
    "Share by which prompts are shorter or longer than --context, evenly.",
    lower_bound=0.0,
    upper_bound=1.0,
)
flags.DEFINE_integer("steps", 128, "Decode steps to measure.", lower_bound=8)
flags.DEFINE_integer("prefill", 512, "Prompt tokens of the prefill measurement, one program alone.", lower_bound=1)
flags.DEFINE_integer(
    "mixed", 0, "Also measure steps with a prompt of so many tokens beside --batch - 1 rows.", lower_bound=0
)
flags.DEFINE_bool("extras", False, "Also measure rows that need more than plain sampling, in turns with plain ones.")
options = engine_flags(*MODEL, "max_step_tokens", max_step_tokens=512)
flags.DEFINE_bool(
    "compare_transformers", False, "Also time transformers' generate() on this checkpoint ([parity] extra)."
)
flags.DEFINE_bool("profile", False, "Also trace a few decode steps: kernel launches, idle gaps, where the time goes.")
flags.DEFINE_string("compile_cache", None, "Folder where compiled steps are kept for the next run.")
define_flags("bench_step")


PROFILED = 8
"""Decode steps that are traced."""
TURNS = 5
"""Measurements of plain rows and of each kind of extras, one after the other; the median counts."""


class AnyText:
    """A grammar that allows everything, so what it costs is the engine's part: no mask is computed."""

    finished = free = False  # not free, so that its mask is asked for

    def matcher(self) -> AnyText:
        return self

    def fill(self, row: np.ndarray) -> None:
        row[:] = -1

    def accept(self, token: int) -> bool:
        return True


EXTRAS: dict[str, dict[str, Any]] = {
    "plain": {},
    "frequency penalty": {"frequency_penalty": 0.1},
    "repetition penalty": {"repetition_penalty": 1.1},
    "a grammar": {"grammar": AnyText()},
    "20 log-probabilities": {"logprobs": 20},
}


@dataclass(frozen=True)
class Figures:
    decode_ms: float
    decode_floor_ms: float
    decode_tokens_s: float
    host_ms: float
    """Wall time of the host per step: the three below together."""
    host_cpu_ms: float
    """Processor time of the host per step."""
    plan_ms: float
    dispatch_ms: float
    commit_ms: float
    starved_share: float
    prefill_ms: float
    prefill_floor_ms: float
    prefill_tokens_s: float
    compile_s: float


def engine_config() -> EngineConfig:
    return options(max_seqs=FLAGS.batch, max_step_tokens=step_tokens(), compile_cache=FLAGS.compile_cache)


def loaded_engine(config: EngineConfig, display: StartupDisplay) -> Engine:
    span = max(max(context_lengths()) + output_tokens(), FLAGS.prefill + 1)
    (engine,) = load_engine(FLAGS.model, config, random_weights=FLAGS.random_weights, progress=display.loading).replicas
    if span > engine.model_config.max_position:
        raise app.UsageError(f"{span} tokens are needed, the model has {engine.model_config.max_position} positions")
    return engine


def step_tokens() -> int:
    return max(FLAGS.max_step_tokens, 2 * FLAGS.batch)


def output_tokens() -> int:
    """Output tokens of each program: for the steps measured, and for those until all prompts have been prefilled."""
    return FLAGS.steps + FLAGS.batch * FLAGS.context // (step_tokens() - FLAGS.batch) + 32


def context_lengths() -> list[int]:
    """Prompt tokens of each program."""
    low, high = (FLAGS.context * (1 + sign * FLAGS.spread) for sign in (-1, 1))
    return [max(1, round(n)) for n in np.linspace(low, high, FLAGS.batch)]


def prompt(length: int, vocab: int, salt: int) -> list[int]:
    return [(7 * i + salt) % vocab for i in range(length)]


async def decode(
    engine: Engine, extras: Mapping[str, Any], steps: int, watch: AbstractContextManager[Any] | None = None
) -> tuple[float, StepTimes]:
    """Seconds of at least ``steps`` steps in which every program decodes, and what the loop did in them.

    Args:
        engine: idle.
        extras: parameters of every program beyond plain sampling.
        steps: at most ``--steps``.
        watch: entered for these steps, if given.
    """
    vocab = engine.model_config.vocab_size
    params = SamplingParams(max_tokens=output_tokens(), ignore_eos=True, **extras)
    running = [aiter(engine.generate(prompt(n, vocab, i), params)) for i, n in enumerate(context_lengths())]
    for generation in running:  # all prompts are in
        await anext(generation)
    with watch or nullcontext():
        before, began = StepTimes(**asdict(engine.times)), time.perf_counter()
        while engine.times.steps - before.steps < steps:
            await asyncio.sleep(0.001)
        took, after = time.perf_counter() - began, StepTimes(**asdict(engine.times))
        for generation in running:
            generation.cancel()
        if watch:  # it watches every step until the device is idle
            while engine.times.steps > after.steps:
                after = StepTimes(**asdict(engine.times))
                await asyncio.sleep(0.1)
    spent = {name: getattr(after, name) - getattr(before, name) for name in asdict(before)}
    return took, StepTimes(**spent)


async def prefill(engine: Engine) -> float:
    """Shortest time to the first token of one program alone, in seconds."""
    times = []
    for salt in range(5):
        ids = prompt(FLAGS.prefill, engine.model_config.vocab_size, salt)
        began = time.perf_counter()
        await engine.generate(ids, SamplingParams(max_tokens=1, ignore_eos=True)).text()
        times.append(time.perf_counter() - began)
    return min(times)


def measure_mixed(engine: Engine) -> MixedStep:
    prompts = [prompt(n, engine.model_config.vocab_size, i) for i, n in enumerate(context_lengths()[1:])]
    return mixed_step.measure(engine, prompts, FLAGS.mixed, max(2, FLAGS.steps // (2 * mixed_step.WINDOW)))


def measure(engine: Engine, roofline: Roofline, compile_s: float) -> Figures:
    prefill_s = asyncio.run(prefill(engine))
    took, spent = asyncio.run(decode(engine, {}, FLAGS.steps))
    work = Work.of(engine.model_config, engine.config, engine.layout)
    step_bytes = work.decode_bytes(1, FLAGS.batch * (FLAGS.context + FLAGS.steps / 2))
    per_step = 1e3 / spent.steps
    return Figures(
        decode_ms=took * per_step,
        decode_floor_ms=1e3 * roofline.read_s(step_bytes),
        decode_tokens_s=spent.tokens / took,
        host_ms=(spent.plan_s + spent.dispatch_s + spent.commit_s) * per_step,
        host_cpu_ms=spent.cpu_s * per_step,
        plan_ms=spent.plan_s * per_step,
        dispatch_ms=spent.dispatch_s * per_step,
        commit_ms=spent.commit_s * per_step,
        starved_share=spent.starved / spent.steps,
        prefill_ms=1e3 * prefill_s,
        prefill_floor_ms=1e3 * roofline.matmul_s(work.prefill_operations([FLAGS.prefill])),
        prefill_tokens_s=FLAGS.prefill / prefill_s,
        compile_s=compile_s,
    )


def decode_with_extras(engine: Engine) -> dict[str, dict[str, float]]:
    """Milliseconds per decode step, and of the host's work on extras in it, for each of :data:`EXTRAS`."""
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in EXTRAS}
    for _ in range(TURNS):
        for name, extras in EXTRAS.items():
            took, spent = asyncio.run(decode(engine, extras, FLAGS.steps))
            found[name].append((1e3 * took / spent.steps, 1e3 * spent.resample_s / spent.steps))
    return {name: dict(zip(("decode_ms", "host_ms"), np.median(runs, 0).tolist())) for name, runs in found.items()}


def profile(engine: Engine) -> Profile:
    """What the device executed in a few decode steps."""
    with tempfile.TemporaryDirectory() as folder:
        _, spent = asyncio.run(decode(engine, {}, PROFILED, traced(folder)))
        return Profile.read(folder, spent.steps)


def extras_section(found: Mapping[str, Mapping[str, float]]) -> Section:
    """A table of what extras cost, beside the floor of the same rows without any."""
    floor = found["plain"]["decode_ms"]
    rows = [
        (name, f"{f['decode_ms']:.2f} ms", f"{floor:.2f} ms", f"{floor / f['decode_ms']:.0%}", f"{f['host_ms']:.2f} ms")
        for name, f in found.items()
    ]
    title = f"rows with extras, batch {FLAGS.batch}, median of {TURNS} turns"
    return Section(title, ("", "decode step", "plain", "plain / measured", "host work on extras"), rows)


def transformers_tokens_s(folder: Path, dtype: str) -> float:
    """Tokens per second of ``generate()`` with a static batch of the same prompts, its prefill left out."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
    lengths = context_lengths()
    ids, mask = torch.zeros((2, FLAGS.batch, max(lengths)), dtype=torch.long)
    for i, n in enumerate(lengths):  # padded on the left, as generate() wants
        ids[i, -n:] = torch.tensor(prompt(n, model.config.vocab_size, i))
        mask[i, -n:] = 1

    def run(tokens: int) -> float:
        began = time.perf_counter()
        with torch.inference_mode():
            model.generate(
                ids,
                attention_mask=mask,
                max_new_tokens=tokens,
                min_new_tokens=tokens,
                do_sample=False,
                pad_token_id=0,
            )
        return time.perf_counter() - began

    run(4)
    return FLAGS.batch * FLAGS.steps / (run(FLAGS.steps + 1) - run(1))


def sections(engine: Engine, f: Figures, rival: float | None) -> list[Section]:
    rows = [
        (
            "decode step",
            f"{f.decode_ms:.2f} ms",
            f"{f.decode_floor_ms:.2f} ms",
            f"{f.decode_floor_ms / f.decode_ms:.0%}",
        ),
        ("decode rate", f"{f.decode_tokens_s:,.0f} tokens/s", "", ""),
        (
            f"prefill of {FLAGS.prefill}",
            f"{f.prefill_ms:.2f} ms",
            f"{f.prefill_floor_ms:.2f} ms",
            f"{f.prefill_floor_ms / f.prefill_ms:.0%}",
        ),
        ("prefill rate", f"{f.prefill_tokens_s:,.0f} tokens/s", "", ""),
        (
            "host work per step",
            f"{f.host_ms:.2f} ms",
            "",
            f"plan {f.plan_ms:.2f}, dispatch {f.dispatch_ms:.2f}, commit {f.commit_ms:.2f}",
        ),
        ("  of processor time", f"{f.host_cpu_ms:.2f} ms", "", ""),
        (
            "host gap between steps",
            f"at most {f.starved_share * f.host_ms:.3f} ms",
            "",
            f"device idle before {f.starved_share:.1%} of steps",
        ),
        (
            "start-up: compile",
            f"{f.compile_s:.1f} s",
            "",
            f"{engine.executables} executables, cached ones included",
        ),
    ]
    if rival is not None:
        ratio = f"we are {f.decode_tokens_s / rival:.1f}x"
        rows.append(("transformers generate()", f"{rival:,.0f} tokens/s", "", ratio))
    title = f"{FLAGS.model}, batch {FLAGS.batch}, context {FLAGS.context} ± {FLAGS.spread:.0%}"
    title += f", {engine_title(engine)}"
    return [Section(title, ("", "measured", "floor", "floor / measured"), rows)]


def main(_: list[str]) -> None:
    with StartupDisplay() as display:
        try:
            config = engine_config()
            roofline = Roofline.measure(config.weight_dtype())
            if FLAGS.mixed and not 0 < FLAGS.batch - 1 <= step_tokens() - FLAGS.mixed:
                raise app.UsageError("--mixed needs a --batch of two or more, and room beside them in a step")
            engine = loaded_engine(config, display)
        except (CheckpointError, StartupError) as error:
            raise SystemExit(f"cannot measure: {error}") from None
        began = time.perf_counter()
        engine.start(display.compiling)
        compile_s = time.perf_counter() - began
    figures = measure(engine, roofline, compile_s)
    mixed = measure_mixed(engine) if FLAGS.mixed else None
    extras = decode_with_extras(engine) if FLAGS.extras else None
    profiled = profile(engine) if FLAGS.profile else None
    engine.shutdown(grace_s=0)
    rival = None
    if FLAGS.compare_transformers:
        rival = transformers_tokens_s(resolve(FLAGS.model), engine.layout.dtype.name)
    found = {
        **asdict(figures),
        "transformers_tokens_s": rival,
        "mixed": mixed and asdict(mixed),
        "extras": extras,
        "profile": profiled and asdict(profiled),
    }
    tables = sections(engine, figures, rival) + ([extras_section(extras)] if extras is not None else [])
    tables += [mixed.section()] if mixed is not None else []
    tables += [profiled.section()] if profiled is not None else []
    publish("bench_step", tables, found, roofline)


def run() -> None:
    """Run the benchmark."""
    run_main(main, __name__)
