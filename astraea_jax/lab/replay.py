"""Replay of traces against the real engine, and simulation of the same runs.

Prompt tokens are random, outputs have the trace's lengths, and tools sleep as long as they took. The simulator then
runs the same programs with step costs fitted to the engine's run.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from astraea_jax.engine.config import EngineConfig
from astraea_jax.engine.engine import Engine
from astraea_jax.engine.layout import GPU_PINNED_BYTES, Layout, staging_pages
from astraea_jax.engine.loading import load_model, random_model
from astraea_jax.engine.runner import Progress, Runner
from astraea_jax.engine.sampling import SamplingParams
from astraea_jax.errors import StartupError
from astraea_jax.models.published import PUBLISHED
from astraea_jax.scheduler.policies import make_policy
from astraea_jax.scheduler.simulation.engine import Sizes
from astraea_jax.scheduler.simulation.experiment import Prepared, everything, let_arrive
from astraea_jax.scheduler.simulation.machines import Machine
from astraea_jax.scheduler.simulation.simulator import Outcome, ProgramRecord, Simulator
from astraea_jax.scheduler.simulation.trace import TraceProgram
from astraea_jax.scheduler.transfer import HostTier

CALIBRATION = 4, 16
"""At least and at most so many programs, or else a quarter, run together without waiting for tools, to find out what
steps cost."""


async def replay(
    engine: Engine,
    programs: Sequence[TraceProgram],
    progress: Callable[[], None] = lambda: None,
    limit_s: float = math.inf,
) -> list[ProgramRecord]:
    """Run programs with arrival times against a started engine; times count from the call.

    After ``limit_s`` those that still run are cut off; their ``ended`` is below 0.
    """
    zero = time.monotonic()
    vocab = engine.model_config.vocab_size
    records = [ProgramRecord(program, program.arrival_s or 0.0) for program in programs]

    async def one(record: ProgramRecord) -> None:
        program = record.program
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

    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(None if math.isinf(limit_s) else limit_s):
            await asyncio.gather(*map(one, records))
    return records


@dataclass(frozen=True)
class Setting:
    """The set-up of an engine or of its simulation."""

    policy: str
    pool_tokens: int
    host_tier: bool = False
    """Whether there is a host tier, never full."""
    strategy: str | None = None


@dataclass(frozen=True)
class Replayed:
    """What became of programs on the real engine."""

    outcome: Outcome
    """Programs that were cut off end when they were."""
    machine: Machine
    """As the run's steps showed it."""
    cut: int
    """Programs that were cut off."""
    page_bytes: int


def _machine(engine: Engine) -> Machine:
    """The machine as an engine's steps and transfers show it."""
    transfers, page = engine.transfer_costs, engine.layout.page_bytes
    # Half a step passes until the next turn sees that a transfer has ended; the simulator has that, too.
    waits_s = engine.work.step_s.sum / max(engine.times.steps, 1) / 2
    return Machine(
        engine.step_costs.costs,
        page / engine.config.page_size,
        link_bytes_s=page / max(transfers.per_page_s, 1e-9),
        measured=True,
        lag_s=max(0.0, transfers.latency_s - waits_s),
    )


class SharedRunner(Runner):
    """A runner for one engine after the other: it compiles for the first, and its pages are enough for any."""

    def compile(self, progress: Progress = lambda done, total: None) -> None:
        """Compile everything, unless that has been done."""
        if not self._compiled:
            super().compile(progress)


class Replayer:
    """A model on this machine, loaded and compiled once for the engines of all runs.

    Args:
        model: a published shape, which gets random weights, or a checkpoint folder, or ``"astraea-tiny"``.
        config: of every engine, except for what a :class:`Setting` says. Its pages hold the largest pool.

    Raises:
        StartupError, CheckpointError: it cannot be served here.
    """

    def __init__(self, model: str, config: EngineConfig):
        self._decoder, self._tokenizer, meshes = (random_model if model in PUBLISHED else load_model)(model, config)
        self._config, self._mesh = config, meshes[0]
        self._layout = layout = Layout.plan(config, self._decoder.config, meshes[0])
        pages = layout.num_pages - 1
        self.tokens = pages * config.page_size
        """Tokens of KV that the device holds."""
        transfers = replace(layout, host=HostTier(pages, staging_pages(pages, config.page_size), layout.layers))
        self._runner = SharedRunner.of(self._decoder, config, transfers, meshes[0])

    def check(self, programs: Sequence[TraceProgram]) -> None:
        """See that the model can hold these programs.

        Raises:
            StartupError: it cannot, or programs share text or begin others; the message names the program.
        """
        most = self._layout.max_context
        for program in programs:
            if program.lineage:
                raise StartupError(
                    f"program {program.id!r} shares its beginning with others, which only the simulator replays: use "
                    "--backend=sim, or a workload whose programs do not"
                )
            if program.longest > most:
                raise StartupError(
                    f"program {program.id!r} has a context of {program.longest} tokens, and this engine serves {most}: "
                    f"scale all lengths with --context={most} or less"
                )

    def compile(self, progress: Progress = lambda done, total: None) -> None:
        """Compile what all runs execute."""
        self._runner.compile(progress)

    def measure(self, programs: Sequence[TraceProgram], limit_s: float = math.inf) -> Machine:
        """Measure what steps cost here and now, with some of the programs at once."""
        least, most = CALIBRATION
        count = min(max(len(programs) // 4, least), most)
        some = [replace(p.scaled(1.0, 0.0), arrival_s=0.0) for p in programs[:count]]
        return self.run(some, Setting("fcfs", min(everything(some), self.tokens)), limit_s=limit_s).machine

    def let_arrive(self, programs: Sequence[TraceProgram], machine: Machine, load: float, seed: int) -> Prepared:
        """Let programs arrive at ``load`` times what the engine here works off."""
        return let_arrive(programs, machine, self._sizes(everything(programs)), load, seed)

    def simulate(self, programs: Sequence[TraceProgram], setting: Setting, machine: Machine) -> Outcome:
        """Run programs through a simulation of the engine."""
        policy = make_policy(setting.policy, strategy=setting.strategy)
        host = self._host_tokens(programs) if setting.host_tier else 0
        return Simulator(programs, policy, machine, self._sizes(setting.pool_tokens, host)).run()

    def run(
        self,
        programs: Sequence[TraceProgram],
        setting: Setting,
        progress: Callable[[], None] = lambda: None,
        limit_s: float = math.inf,
    ) -> Replayed:
        """Run programs through the real engine, for ``limit_s`` at most.

        Raises:
            StartupError: the pool is larger than what the device holds.
        """
        engine = Engine(
            *(self._decoder, self._tokenizer, self._engine_config(programs, setting), self._mesh),
            runner=lambda *_: self._runner,
        )
        for costs in (engine.step_costs, engine.transfer_costs):
            costs.forget = 1.0  # fit the whole run, not only its end, when few programs are left
        engine.start()
        began = time.monotonic()
        try:
            records = asyncio.run(replay(engine, programs, progress, limit_s))
        finally:
            took_s = time.monotonic() - began
            engine.shutdown(grace_s=0)
        cut = [record for record in records if record.ended < 0]
        for record in cut:
            record.ended = max(record.arrival, took_s)
            record.spans.append((record.arrival, record.ended, record.ended, record.ended))
        times, page = engine.times, engine.layout.page_bytes
        outcome = Outcome(
            records=records,
            stats=engine.stats(),
            makespan_s=max(record.ended for record in records),
            steps=times.steps,
            scheduler_s=times.plan_s + times.commit_s,
            mean_live_context=0.0,
            refused=0,
            page_size=self._config.page_size,
        )
        return Replayed(outcome, _machine(engine), len(cut), page)

    def _engine_config(self, programs: Sequence[TraceProgram], setting: Setting) -> EngineConfig:
        if setting.pool_tokens > self.tokens:
            raise StartupError(
                f"a pool of {setting.pool_tokens} tokens is wanted, and the device holds {self.tokens}: give more "
                "--kv_bytes, fewer --programs, a shorter --context or more --oversubscription"
            )
        return replace(
            self._config,
            policy=setting.policy,
            residency=setting.strategy,
            kv_bytes=self._bytes(setting.pool_tokens),
            host_kv_bytes=self._bytes(self._host_tokens(programs)) if setting.host_tier else 0,
            max_context=max(p.longest for p in programs),
        )

    def _bytes(self, tokens: int) -> int:
        return (1 + -(-tokens // self._config.page_size)) * self._layout.page_bytes

    def _host_tokens(self, programs: Sequence[TraceProgram]) -> int:
        """Tokens of a host tier that is never full, if as much may be pinned."""
        page = self._config.page_size
        return min(everything(programs), (GPU_PINNED_BYTES // self._layout.page_bytes - 1) * page)

    def _sizes(self, pool_tokens: int, host_tokens: int = 0) -> Sizes:
        page = self._config.page_size
        pages = -(-pool_tokens // page)
        return Sizes(
            page * pages,
            page_size=page,
            max_seqs=self._config.max_seqs,
            max_step_tokens=self._config.max_step_tokens,
            host_tokens=host_tokens,
            staging_tokens=page * staging_pages(pages, page),
        )
