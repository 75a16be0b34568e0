"""Workloads from published statistics: how many requests programs have, how long they are, how long tools take.

Every distribution names its source. Where the source leaves something open, our assumption says so. Those of
``families.py`` are made up.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace

from .distributions import LogNormal, Mixture
from .families import CHANGES, FAMILIES
from .trace import TraceError, TraceProgram, TraceRequest, chain

CLAUDE_CODE_TOOLS = Mixture((0.95, 0.05), (LogNormal(1.1, 0.45), LogNormal(8.0, 1.1)))
"""Claude Code on SWE-bench Pro, fitted to the quantiles of 16,886 calls in arXiv 2606.00866 (MORI): p50 1.10 s, p90
2.03 s, p99 19.98 s. The fit gives 1.13, 2.22 and 20.1 s; its mean is 1.9 s. The quantiles are quoted second-hand."""

SWE_TOOLS = Mixture((0.70, 0.26, 0.04), (LogNormal(0.05, 0.9), LogNormal(1.2, 0.6), LogNormal(40.0, 1.0)))
"""Fitted to coding-agent sessions recorded in yunwei37/agentcgroup (arXiv 2602.09345): 80 % below 1 s, p99 78 s."""

AUGMENTATIONS = {
    # name: (tool seconds, calls, context tokens), each (mean, spread)
    "math": ((9e-5, 6e-5), (3.75, 1.3), (1422, 738)),
    "qa": ((0.69, 0.17), (2.52, 1.73), (1846, 428)),
    "virtual-env": ((0.09, 0.014), (28.18, 15.2), (2185, 115)),
    "chatbot": ((28.6, 15.6), (4.45, 1.96), (753, 703)),
    "image": ((20.03, 7.8), (6.91, 3.93), (1247, 792)),
    "tts": ((17.24, 7.6), (6.91, 3.93), (1251, 792)),
}
"""InferCept (arXiv 2402.01869), Table 1; what it prints as variance is read as a spread."""


def infercept_mix(rng: random.Random) -> tuple[TraceRequest, ...]:
    """A: InferCept's six augmentations in equal shares, contexts of up to 2,048 tokens at the end.

    Assumption: requests output log-normally many tokens, median 60, sigma 0.9; what they do not output of the context
    is prompt, half of it in the first request.
    """
    name, (tool, calls, context) = rng.choice(sorted(AUGMENTATIONS.items()))
    turns = max(1, round(rng.gauss(*calls))) + 1
    total = min(2048.0, max(64.0, rng.gauss(*context)))
    outputs = [max(1, round(LogNormal(60, 0.9).draw(rng))) for _ in range(turns)]
    shrink = min(1.0, 0.5 * total / sum(outputs))
    outputs = [max(1, round(shrink * o)) for o in outputs]
    prompt = max(turns, round(total) - sum(outputs))
    later = max(1, prompt // (2 * turns))
    new = [max(1, prompt - later * (turns - 1)), *[later] * (turns - 1)]
    tools = [(name, max(0.0, rng.gauss(*tool))) for _ in range(turns - 1)]
    return chain(new, outputs, tools)


def swe_batch(rng: random.Random) -> tuple[TraceRequest, ...]:
    """B: coding agents in a batch.

    Turns from Continuum (arXiv 2511.02230, Table 2), the rest fitted to recorded sessions of yunwei37/agentcgroup:
    first context 14k tokens, growth log-normal.
    """
    turns = max(2, round(rng.gauss(10.9, 2.1)))
    outputs = [min(4000, max(1, round(LogNormal(130, 1.2).draw(rng)))) for _ in range(turns)]
    growth = [min(40000.0, LogNormal(430, 1.55).draw(rng)) for _ in range(turns - 1)]
    new = [14000, *(max(1, round(g - o)) for g, o in zip(growth, outputs, strict=False))]
    kinds = rng.choices(range(3), SWE_TOOLS.weights, k=turns - 1)
    tools = [(("edit", "shell", "agent")[k], SWE_TOOLS.components[k].draw(rng)) for k in kinds]
    return chain(new, outputs, tools)


def interactive(rng: random.Random) -> tuple[TraceRequest, ...]:
    """C: coding with a human in the loop, after TraceLab (arXiv 2606.30560): turns log-normal with median 16.

    Every ninth wait or so is the human's.

    The source's tails are cut so that a run of some hundred programs reaches a steady state: 60 turns instead of 1,500,
    waits of ten minutes instead of an hour, outputs of 4,000 tokens. Contexts that reach 120k tokens are compacted to
    30k (an assumption).
    """
    turns = min(60, max(1, round(LogNormal(16, 1.75).draw(rng))))
    requests: list[TraceRequest] = []
    held, cached, fresh = 0, 0, 14000
    for i in range(turns):
        output = min(4000, max(1, round(LogNormal(214, 1.6).draw(rng))))
        if rng.random() < 1 / 9:
            tool, wait = "human", min(600.0, LogNormal(85, 2.1).draw(rng))
        else:
            tool, wait = "tool", min(600.0, LogNormal(0.3, 2.9).draw(rng))
        last = i == turns - 1
        requests.append(TraceRequest(cached, fresh, output, None if last else tool, 0.0 if last else wait))
        held = cached + fresh + output
        growth = min(40000.0, LogNormal(875, 1.18).draw(rng))
        cached, fresh = held, max(1, round(growth - output))
        if cached + fresh > 120_000:
            cached, fresh = 14000, 16000
    return tuple(requests)


def chat(rng: random.Random) -> tuple[TraceRequest, ...]:
    """C with jobs: sessions as in :func:`interactive`, where a human's wait ends a job and the scheduler knows it."""
    return tuple(replace(request, human=request.tool == "human") for request in interactive(rng))


GENERATORS: dict[str, Callable[[random.Random], tuple[TraceRequest, ...]]] = {
    "infercept-mix": infercept_mix,
    "swe-batch": swe_batch,
    "interactive": interactive,
    "chat": chat,
    "swe-claude-tools": lambda rng: _with_tools(swe_batch(rng), CLAUDE_CODE_TOOLS, rng),
    **FAMILIES,
}
GENERATED = (*GENERATORS, *CHANGES)
"""Workloads that :func:`generate` knows."""


def generate(name: str, count: int, seed: int) -> list[TraceProgram]:
    """Draw ``count`` programs without arrivals.

    Raises:
        ValueError: no such workload; the message lists them.
    """
    if name in CHANGES:
        before, after = CHANGES[name]
        return generate(before, count // 2, seed) + generate(after, count - count // 2, seed)
    if name not in GENERATORS:
        raise ValueError(f"no workload is called {name!r}; there are {', '.join(GENERATED)}")
    rng = random.Random(f"{name} {seed}")
    return [TraceProgram(f"{name}-{i}", GENERATORS[name](rng)) for i in range(count)]


def resample(programs: Sequence[TraceProgram], count: int, seed: int) -> list[TraceProgram]:
    """Draw ``count`` programs from recorded ones, each as often as the others, in random order."""
    rng = random.Random(f"resample {seed}")
    drawn: list[TraceProgram] = []
    while len(drawn) < count:
        drawn += rng.sample(list(programs), len(programs))
    return [replace(p, id=f"{p.id}#{i}") for i, p in enumerate(drawn[:count])]


def scaled_to_fit(programs: Sequence[TraceProgram], longest: int, tool_scale: float = 1.0) -> list[TraceProgram]:
    """Scale all lengths so that the longest context has at most ``longest`` tokens, and the times of tools.

    Raises:
        TraceError: no length is below one token, so a program of so many requests does not fit; the message names it.
    """
    recorded = max(p.longest for p in programs)
    rounding = 2 * max(len(p.requests) for p in programs)
    factor = 1.0 if recorded <= longest else max(0.0, (longest - rounding) / recorded)
    found = [p if factor == tool_scale == 1.0 else p.scaled(factor, tool_scale) for p in programs]
    for program in found:
        if program.longest > longest:
            raise TraceError(
                f"program {program.id!r} does not fit into {longest} tokens: its {len(program.requests)} requests hold "
                f"{program.longest}, with every length divided by {1 / max(factor, 1e-9):.3g} and none below 1"
            )
    return found


def with_arrivals(programs: Sequence[TraceProgram], rate: float, seed: int) -> list[TraceProgram]:
    """Let programs arrive as a Poisson process, ``rate`` per second; those that have an arrival keep it."""
    rng = random.Random(f"arrivals {seed}")
    now, arriving = 0.0, []
    for program in programs:
        now += rng.expovariate(rate)
        arriving.append(replace(program, arrival_s=now if program.arrival_s is None else program.arrival_s))
    return arriving


def _with_tools(requests: tuple[TraceRequest, ...], times: Mixture, rng: random.Random) -> tuple[TraceRequest, ...]:
    """Replace the tool times of requests."""
    return tuple(s if s.tool is None else replace(s, tool="shell", tool_s=times.draw(rng)) for s in requests)
