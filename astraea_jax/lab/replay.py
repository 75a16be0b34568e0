"""Traces replayed against the real engine, and the simulator beside it.

Tokens of the prompts are drawn at random, outputs have the trace's lengths, tools sleep as long as they took. The
simulator then runs the same programs with the costs of the steps that the engine has just taken.
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
from astraea_jax.scheduler.policies import make_policy
from astraea_jax.scheduler.simulation.costs import CostModel
from astraea_jax.scheduler.simulation.experiment import Prepared, everything, prepared
from astraea_jax.scheduler.simulation.simulator import Outcome, ProgramRecord, Simulator, Sizes
from astraea_jax.scheduler.simulation.trace import TraceProgram

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
                engine.tool_called(program.id, request.tool)
                await asyncio.sleep(request.tool_s)
        record.ended = time.monotonic() - zero
        progress()
        return record

    return list(await asyncio.gather(*(one(program) for program in programs)))


def fitting(programs: Sequence[TraceProgram], longest: int, tool_scale: float) -> list[TraceProgram]:
    """The same programs scaled so that the longest context is ``longest``, for models with short ones."""
    factor = min(1.0, longest / (max(p.longest for p in programs) + 2 * max(len(p.requests) for p in programs)))
    return [replace(p.scaled(factor, tool_scale), arrival_s=p.arrival_s) for p in programs]


def arriving(programs: Sequence[TraceProgram], costs: CostModel, load: float, seed: int) -> Prepared:
    """Programs with arrivals, as :func:`prepare` would choose them for the engine here."""
    return prepared(programs, costs, _sizes(everything(programs)), load, seed)


@dataclass(frozen=True)
class Setting:
    """How an engine is set up, or simulated."""

    policy: str
    pool_tokens: int
    host: bool = False
    """A host tier that is never full."""
    strategy: str | None = None


def simulated(programs: Sequence[TraceProgram], setting: Setting, costs: CostModel) -> Outcome:
    """The same engine, simulated."""
    policy = make_policy(setting.policy, strategy=setting.strategy)
    sizes = _sizes(setting.pool_tokens, everything(programs) if setting.host else 0)
    return Simulator(programs, policy, costs, sizes).run()


def step_costs(programs: Sequence[TraceProgram]) -> CostModel:
    """What steps cost here and now: of some programs that all arrive at once, in ample memory."""
    at_once = [replace(p, arrival_s=0.0) for p in programs[: 2 * SEQS]]
    return measured(at_once, Setting("fcfs", everything(at_once)))[1]


def measured(
    programs: Sequence[TraceProgram], setting: Setting, progress: Callable[[], None] = lambda: None
) -> tuple[Outcome, CostModel]:
    """The real engine, and what its steps and transfers have cost."""
    config = EngineConfig(
        max_seqs=SEQS,
        max_step_tokens=STEP_TOKENS,
        page_size=PAGE,
        policy=setting.policy,
        residency=setting.strategy,
        max_queued=8192,
    )
    page_bytes = Engine.from_folder(MODEL, config).layout.page_bytes
    bytes_of = lambda tokens: (1 + -(-tokens // PAGE)) * page_bytes  # noqa: E731
    host = bytes_of(everything(programs)) if setting.host else 0
    engine = Engine.from_folder(MODEL, replace(config, kv_bytes=bytes_of(setting.pool_tokens), host_kv_bytes=host))
    engine.step_costs.forget = 1.0  # fit the whole run, not its end, when few are left
    engine.start()
    try:
        records = asyncio.run(replay(engine, programs, progress))
    finally:
        engine.shutdown(grace_s=0)
    times, fitted = engine.times, engine.step_costs
    outcome = Outcome(
        records=records,
        stats=engine.stats(),
        makespan_s=max(record.ended for record in records),
        steps=times.steps,
        scheduler_s=times.plan_s + times.commit_s,
        mean_live_context=0.0,
        refused=0,
    )
    costs = (fitted.base, fitted.per_prefill, fitted.per_token, fitted.per_context)
    return outcome, CostModel(*costs, page_bytes / PAGE, link_bytes_s=1e9, measured=True)


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
