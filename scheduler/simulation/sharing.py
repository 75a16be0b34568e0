"""Workloads whose programs begin alike, and begin further programs: sessions of agent products, and sub-agents.

All sessions of a product begin with its system prompt and its tools. A sub-agent is a program that another one begins
and waits for: a fork goes on from all that its parent has, any other has the product's beginning and a task of its own.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

from .trace import TraceProgram, TraceRequest
from .workload import swe_batch

PRODUCTS = 12
"""A: the fleet serves so many, and the one of rank r has 1/r times as many sessions as the first."""
SUB_AGENTS = (1, 2, 4)
"""A: begun at once, each number as often."""
FORKS = 0.5
"""A: share of the calls that fork."""
TASK, TURNS = 1500, (5.0, 2.0)
"""A: tokens of a sub-agent's task, and its turns (mean, spread)."""


@dataclass(frozen=True)
class Sharing:
    """How a workload whose programs share their beginnings comes from one whose do not."""

    of: str
    """The workload that has its programs' lengths and tools."""
    prefix: int
    """Tokens of its first prompts that all sessions of a product have."""
    agent_tool: str | None = None
    """The tool whose work sub-agents do instead; None: there are none."""


SHARING = {
    # Of the 43 recorded sessions all first prompts have 14,650 tokens or more: Claude Code's own system prompt and
    # tools, with some hundred tokens of the task.
    "claude-shared": Sharing("claude-code", 14_000),
    "claude-sub-agents": Sharing("claude-code", 14_000, "Task"),
    "swe-shared": Sharing("swe-batch", 12_000),
    "swe-sub-agents": Sharing("swe-batch", 12_000, "agent"),
}


def sharing_beginnings(programs: Sequence[TraceProgram], sharing: Sharing, seed: int) -> list[TraceProgram]:
    """Let programs be sessions of products, drawn at random, with sub-agents of their own."""
    rng = random.Random(f"sharing {seed}")
    weights = [1 / rank for rank in range(1, PRODUCTS + 1)]
    found = []
    for program in programs:
        (product,) = rng.choices(range(PRODUCTS), weights)
        first, *rest = program.requests
        shared = min(sharing.prefix, first.prompt - 1)
        lineage = ((0, f"product {product}"), (shared, program.id))
        requests = (replace(first, cached=shared, new=first.prompt - shared), *rest)
        program = replace(program, requests=requests, lineage=lineage)
        found.append(with_sub_agents(program, sharing.agent_tool, rng) if sharing.agent_tool else program)
    return found


def with_sub_agents(program: TraceProgram, tool: str, rng: random.Random) -> TraceProgram:
    """Let sub-agents do the work of a tool, at every call of it."""
    requests = list(program.requests)
    for index, request in enumerate(requests):
        if request.tool == tool:
            fork, count = rng.random() < FORKS, rng.choice(SUB_AGENTS)
            ids = [f"{program.id}/{index}.{i}" for i in range(count)]
            lineage = program.lineage if fork else program.lineage[:-1]
            at = request.context if fork else program.shared
            children = tuple(_sub_agent(name, (*lineage, (at, name)), rng) for name in ids)
            requests[index] = replace(request, tool_s=0.0, children=children)
    return replace(program, requests=tuple(requests))


def _sub_agent(name: str, lineage: tuple[tuple[int, str], ...], rng: random.Random) -> TraceProgram:
    """A: turns as in :func:`~.workload.swe_batch`, fewer of them, after a task."""
    turns, (shared, _) = max(1, round(rng.gauss(*TURNS))), lineage[-1]
    first, *rest = swe_batch(rng)[:turns]
    more = shared + TASK - first.prompt
    requests = [
        TraceRequest(shared, TASK, first.output, first.tool, first.tool_s),
        *(replace(request, cached=request.cached + more) for request in rest),
    ]
    requests[-1] = replace(requests[-1], tool=None, tool_s=0.0)
    return TraceProgram(name, tuple(requests), lineage=lineage)
