"""Programs that share beginnings: what they have in common with others, and what becomes of those that they begin."""

from __future__ import annotations

from itertools import combinations

import pytest

from astraea_jax.scheduler.simulation.experiment import WORKLOADS, draw
from astraea_jax.scheduler.simulation.sharing import SHARING, SUB_AGENTS
from astraea_jax.scheduler.simulation.simulator import prompt_of
from astraea_jax.scheduler.simulation.trace import everyone


def in_common(a, b):
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


@pytest.mark.parametrize("name", SHARING)
def test_equal_seeds_give_equal_programs(name):
    assert name in WORKLOADS
    assert draw(name, 20, 3) == draw(name, 20, 3) != draw(name, 20, 4)


@pytest.mark.parametrize("name", SHARING)
def test_lengths_are_those_of_the_workload_without(name):
    sharing = SHARING[name]
    for program, plain in zip(draw(name, 20, 0), draw(sharing.of, 20, 0), strict=True):
        assert [s.prompt for s in program.requests] == [s.prompt for s in plain.requests]
        assert [s.output for s in program.requests] == [s.output for s in plain.requests]
        assert program.shared == program.requests[0].cached == sharing.prefix


def test_programs_share_the_beginning_of_their_product_and_no_more():
    programs = draw("swe-shared", 30, 0)
    shared = [
        (a.lineage[0] == b.lineage[0], in_common(prompt_of(a, 0), prompt_of(b, 0)))
        for a, b in combinations(programs, 2)
    ]
    assert set(shared) == {(True, 12_000), (False, 0)}
    products = [program.lineage[0] for program in draw("swe-shared", 2000, 0)]
    sizes = sorted((products.count(product) for product in set(products)), reverse=True)
    assert len(sizes) == 12
    assert sizes[0] == pytest.approx(2000 / sum(1 / rank for rank in range(1, 13)), rel=0.15)


def test_sub_agents_begin_as_they_should():
    forks = tasks = 0
    for parent in draw("swe-sub-agents", 200, 0):
        for index, request in enumerate(parent.requests):
            assert bool(request.children) == (request.tool == "agent")
            assert len(request.children) in (0, *SUB_AGENTS)
            text = [*prompt_of(parent, index), *range(request.prompt, request.context)]
            for child in request.children:
                common = in_common(text, prompt_of(child, 0))
                assert common == child.shared in (request.context, 12_000)
                forks, tasks = forks + (common == request.context), tasks + (common == 12_000)
            for a, b in combinations(request.children, 2):
                assert in_common(prompt_of(a, 0), prompt_of(b, 0)) == a.shared
    assert forks > 50
    assert tasks > 50
    names = [program.id for program in everyone(draw("swe-sub-agents", 200, 0))]
    assert len(set(names)) == len(names)


def test_the_next_prompt_goes_on_from_the_answer():
    (program, *_) = draw("swe-shared", 1, 0)
    first = [*prompt_of(program, 0), *range(program.requests[0].prompt, program.requests[0].context)]
    assert prompt_of(program, 1)[: len(first)] == first
