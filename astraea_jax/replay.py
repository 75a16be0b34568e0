"""Traces replayed against the real engine, and the simulator beside it.

Tokens of the prompts are drawn at random, outputs have the trace's lengths, tools sleep as long as they took. The
simulator then runs the same programs with the costs of the steps that the engine has just taken.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

from astraea_jax.config import EngineConfig
from astraea_jax.engine import Engine
from astraea_jax.sampling import SamplingParams
from astraea_jax.scheduler.costs import CostModel
from astraea_jax.scheduler.policies import make_policy
from astraea_jax.scheduler.prediction import Predictor
from astraea_jax.scheduler.simulator import Outcome, ProgramRecord, Simulator, Sizes
from astraea_jax.scheduler.trace import TraceProgram
from astraea_jax.scheduler.workload import with_arrivals

MODEL = "astraea-tiny"
SEQS, STEP_TOKENS, PAGE = 32, 256, 16


async def replay(
    engine: Engine, programs: Sequence[TraceProgram], progress: Callable[[], None] = lambda: None
) -> list[ProgramRecord]:
    """Run programs, which have arrivals, against a started engine; times count from the call."""
    zero = time.monotonic()
    vocab = engine.model_config.vocab_size

    async def one(program: TraceProgram) -> ProgramRecord:
        record = ProgramRecord(program, program.arrival_s or 0.0)
        rng = random.Random(program.id)
        text: list[int] = []
        await asyncio.sleep(max(0.0, zero + record.arrival - time.monotonic()))
        for segment in program.segments:
            del text[segment.cached :]
            text += [rng.randrange(vocab) for _ in range(segment.prompt - len(text))]
            params = SamplingParams(max_tokens=segment.output, ignore_eos=True)
            submitted = time.monotonic() - zero
            last = segment.tool is None
            generation = engine.generate(text, params, session=program.id, final=last)
            first = None
            async for delta in generation:
                first = first if first is not None else time.monotonic() - zero
                text += delta.token_ids
            ended = time.monotonic() - zero
            queue_s = generation.usage.queue_s if generation.usage is not None else 0.0
            record.queue_s += queue_s
            record.spans.append((submitted, submitted + queue_s, first or ended, ended))
            if segment.tool is not None:
                engine.tool_called(program.id, segment.tool)
                await asyncio.sleep(segment.tool_s)
        record.ended = time.monotonic() - zero
        progress()
        return record

    return list(await asyncio.gather(*(one(program) for program in programs)))


def fitting(programs: Sequence[TraceProgram], longest: int, tool_scale: float) -> list[TraceProgram]:
    """The same programs scaled so that the longest context is ``longest``, for models with short ones."""
    factor = min(1.0, longest / (max(p.longest for p in programs) + 2 * max(len(p.segments) for p in programs)))
    return [replace(p.scaled(factor, tool_scale), arrival_s=p.arrival_s) for p in programs]


def calibrate(programs: Sequence[TraceProgram]) -> CostModel:
    """What steps of the bundled model cost on this machine: a few programs are served, all at once."""
    engine = _engine("fcfs", None)
    try:
        asyncio.run(replay(engine, [replace(p.scaled(1.0, 0.0), arrival_s=0.0) for p in programs]))
        return _costs(engine)
    finally:
        engine.shutdown(grace_s=0)


def arriving(programs: Sequence[TraceProgram], costs: CostModel, load: float, seed: int) -> tuple[list[TraceProgram], float]:
    """Programs with arrivals at ``load``, and the context that is live in the mean with unlimited memory."""
    ample = sum(p.longest + 2 * PAGE for p in programs)
    ends = sorted(r.ended for r in simulated([replace(p, arrival_s=0.0) for p in programs], "fcfs", costs, ample).records)
    done = max(1, int(0.8 * len(programs)))
    arrived = with_arrivals(programs, load * done / ends[done - 1], seed)
    return arrived, simulated(arrived, "fcfs", costs, ample).mean_live_context


def simulated(programs: Sequence[TraceProgram], policy: str, costs: CostModel, pool_tokens: int) -> Outcome:
    """The same engine, simulated."""
    sizes = Sizes(pool_tokens, page_size=PAGE, max_seqs=SEQS, max_step_tokens=STEP_TOKENS)
    return Simulator(programs, make_policy(policy, Predictor()), costs, sizes).run()


def measured(
    programs: Sequence[TraceProgram], policy: str, pool_tokens: int, progress: Callable[[], None]
) -> tuple[list[ProgramRecord], CostModel]:
    """The real engine, with as many KV pages; and what its steps have cost."""
    engine = _engine(policy, pool_tokens)
    try:
        return asyncio.run(replay(engine, programs, progress)), _costs(engine)
    finally:
        engine.shutdown(grace_s=0)


def _costs(engine: Engine) -> CostModel:
    costs, token = engine.step_costs, engine.layout.page_bytes // PAGE
    fitted = (costs.base, costs.per_prefill, costs.per_token, costs.per_context)
    return CostModel(*fitted, token, link_bytes_s=1e9, measured=True)


def _engine(policy: str, pool_tokens: int | None) -> Engine:
    config = EngineConfig(max_seqs=SEQS, max_step_tokens=STEP_TOKENS, page_size=PAGE, policy=policy, max_queued=8192)
    engine = Engine.from_folder(MODEL, config)
    if pool_tokens is not None:
        pages = 1 + -(-pool_tokens // PAGE)
        engine = Engine.from_folder(MODEL, replace(config, kv_bytes=pages * engine.layout.page_bytes))
    engine.start()
    return engine
