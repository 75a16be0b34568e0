"""Made-up families: what is claimed of them, and what tells how long their programs go on."""

from __future__ import annotations

import random

import numpy as np
import pytest

from astraea_jax.scheduler.simulation.experiment import draw
from astraea_jax.scheduler.simulation.families import CHANGES, FAMILIES
from astraea_jax.scheduler.simulation.workload import GENERATED


def lengths(programs):
    return np.array([len(p.requests) for p in programs])


def outputs(programs):
    return np.array([np.mean([r.output for r in p.requests]) for p in programs])


@pytest.mark.parametrize("name", [*FAMILIES, *CHANGES])
def test_programs_have_2_to_150_requests_each_continuing_the_one_before(name):
    programs = draw(name, 200, 0)
    assert name in GENERATED
    assert len(programs) == len({p.id for p in programs}) == 200
    assert 2 <= min(lengths(programs)) < max(lengths(programs)) <= 150
    for program in programs:
        for before, request in zip(program.requests, program.requests[1:], strict=False):
            assert request.cached == before.context


@pytest.mark.parametrize("name", [*FAMILIES, *CHANGES])
def test_equal_seeds_draw_equal_programs(name):
    assert draw(name, 50, 0) == draw(name, 50, 0) != draw(name, 50, 1)


@pytest.mark.parametrize(("name", "low", "high"), [("family-talk", -1.0, -0.5), ("family-long", -0.2, 0.2)])
def test_outputs_tell_how_long_programs_go_on_in_the_talking_family_only(name, low, high):
    programs = draw(name, 400, 0)
    assert low <= np.corrcoef(np.log(lengths(programs)), np.log(outputs(programs)))[0, 1] <= high


def test_phases_tell_that_the_end_is_near():
    rng = random.Random(0)
    programs = [FAMILIES["family-phased"](rng) for _ in range(300)]
    reads = [np.mean([r.tool == "read" for r in p[: len(p) // 4]]) for p in programs]
    late = [np.mean([r.tool == "read" for r in p[3 * len(p) // 4 :]]) for p in programs]
    assert np.mean(reads) > 2 * np.mean(late)


def test_tails_differ():
    spread = {name: np.std(np.log(lengths(draw(name, 400, 0)))) for name in ("family-short", "family-heavy")}
    assert spread["family-heavy"] > 1.5 * spread["family-short"]


@pytest.mark.parametrize("name", CHANGES)
def test_a_workload_changes_in_the_middle(name):
    programs = draw(name, 101, 0)
    before, after = CHANGES[name]
    assert programs == draw(before, 50, 0) + draw(after, 51, 0)
    assert 2 * lengths(programs[:50]).mean() < lengths(programs[50:]).mean()
