"""Replay of traces against the real engine, and simulation of the same runs.

Prompt tokens are random, outputs have the trace's lengths, and tools sleep as long as they took. The simulator then
runs the same programs with step costs fitted to the engine's run.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from astraea_jax.engine.config import EngineConfig
from astraea_jax.engine.engine import Engine
from astraea_jax.engine.layout import staging_pages
from astraea_jax.engine.sampling import SamplingParams
from astraea_jax.kv_cache.arrays import page_bytes
from astraea_jax.models import resolve
from astraea_jax.models.config import ModelConfig, read_json
from astraea_jax.scheduler.policies import make_policy
from astraea_jax.scheduler.simulation.experiment import Prepared, everything, let_arrive
from astraea_jax.scheduler.simulation.machines import Machine
from astraea_jax.scheduler.simulation.simulator import Outcome, ProgramRecord, Simulator, Sizes
from astraea_jax.scheduler.simulation.trace import TraceProgram

MODEL = "astraea-tiny"
SEQS, STEP_TOKENS, PAGE = 32, 256, 16


async def replay(
    engine: Engine, programs: Sequence[TraceProgram], progress: Callable[[], None] = lambda: None
) -> list[ProgramRecord]:
    """Run programs with arrival times against a started engine; times count from the call."""
    zero = time.monotonic()
    vocab = engine.model_config.vocab_size

    async def one(program: TraceProgram) -> ProgramRecord:
        record = ProgramRecord(program, program.arrival_s or 0.0)
        rng = random.Random(program.id)
        text: list[int] = []
        await asyncio.sleep(max(0.0, zero + record.arrival - time.monotonic()))
        for request in program.requests:
            del text[request.cached :]
            text += [rng.randrange(vocab) for _ in range(request.prompt - len(text))]
            params = SamplingParams(max_tokens=request.output, ignore_eos=True)
            submitted = time.monotonic() - zero
            last = request.tool is None
            generation = engine.generate(text, params, session=program.id, final=last)
            first = None
            async for delta in generation:
                first = first if first is not None else time.monotonic() - zero
                text += delta.token_ids
            ended = time.monotonic() - zero
            queue_s = generation.usage.queue_s if generation.usage is not None else 0.0
            record.queue_s += queue_s
            record.spans.append((submitted, submitted + queue_s, first or ended, ended))
            if request.tool is not None:
                engine.waits(program.id, request.wait)
                await asyncio.sleep(request.tool_s)
        record.ended = time.monotonic() - zero
        progress()
        return record

    return list(await asyncio.gather(*(one(program) for program in programs)))


def scale_to_fit(programs: Sequence[TraceProgram], longest: int, tool_scale: float) -> list[TraceProgram]:
    """The same programs scaled so that the longest context is ``longest``, for models with short ones."""
    factor = min(1.0, longest / (max(p.longest for p in programs) + 2 * max(len(p.requests) for p in programs)))
    return [replace(p.scaled(factor, tool_scale), arrival_s=p.arrival_s) for p in programs]


def let_arrive_here(programs: Sequence[TraceProgram], machine: Machine, load: float, seed: int) -> Prepared:
    """Let programs arrive at ``load`` times what the engine here works off."""
    return let_arrive(programs, machine, _sizes(everything(programs)), load, seed)


@dataclass(frozen=True)
class Setting:
    """The set-up of an engine or of its simulation."""

    policy: str
    pool_tokens: int
    host_tier: bool = False
    """Whether there is a host tier, never full."""
    strategy: str | None = None


def simulate_engine(programs: Sequence[TraceProgram], setting: Setting, machine: Machine) -> Outcome:
    """Run programs through a simulation of the engine."""
    policy = make_policy(setting.policy, strategy=setting.strategy)
    sizes = _sizes(setting.pool_tokens, everything(programs) if setting.host_tier else 0)
    return Simulator(programs, policy, machine, sizes).run()


def measure_machine(programs: Sequence[TraceProgram]) -> Machine:
    """Measure what steps cost here and now, with some programs that all arrive at once in ample memory."""
    at_once = [replace(p, arrival_s=0.0) for p in programs[: 2 * SEQS]]
    return run_engine(at_once, Setting("fcfs", everything(at_once)))[1]


def run_engine(
    programs: Sequence[TraceProgram], setting: Setting, progress: Callable[[], None] = lambda: None
) -> tuple[Outcome, Machine]:
    """Run programs through the real engine; returns what became of them, and the machine as its steps showed it."""
    config = EngineConfig(
        max_seqs=SEQS,
        max_step_tokens=STEP_TOKENS,
        page_size=PAGE,
        policy=setting.policy,
        residency=setting.strategy,
        max_queued=8192,
    )
    model = ModelConfig.from_hf(read_json(resolve(MODEL) / "config.json"))
    page = page_bytes(model, config.backend(model), PAGE, config.page_dtype())
    bytes_of = lambda tokens: (1 + -(-tokens // PAGE)) * page  # noqa: E731
    host = bytes_of(everything(programs)) if setting.host_tier else 0
    engine = Engine.from_folder(MODEL, replace(config, kv_bytes=bytes_of(setting.pool_tokens), host_kv_bytes=host))
    engine.step_costs.forget = 1.0  # fit the whole run, not only its end, when few programs are left
    engine.start()
    try:
        records = asyncio.run(replay(engine, programs, progress))
    finally:
        engine.shutdown(grace_s=0)
    times = engine.times
    outcome = Outcome(
        records=records,
        stats=engine.stats(),
        makespan_s=max(record.ended for record in records),
        steps=times.steps,
        scheduler_s=times.plan_s + times.commit_s,
        mean_live_context=0.0,
        refused=0,
    )
    return outcome, Machine(engine.step_costs.costs, page / PAGE, link_bytes_s=1e9, measured=True)


def _sizes(pool_tokens: int, host_tokens: int = 0) -> Sizes:
    staging = PAGE * staging_pages(-(-pool_tokens // PAGE))
    return Sizes(
        pool_tokens,
        page_size=PAGE,
        max_seqs=SEQS,
        max_step_tokens=STEP_TOKENS,
        host_tokens=host_tokens,
        staging_tokens=staging,
    )
