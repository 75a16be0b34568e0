"""Generated programs against the published figures that they are made from."""

from __future__ import annotations

import numpy as np
import pytest

from astraea_jax.scheduler.simulation.trace import TraceError, TraceProgram, TraceRequest
from astraea_jax.scheduler.simulation.workload import (
    CLAUDE_CODE_TOOLS,
    SWE_TOOLS,
    generate,
    resample,
    scaled_to_fit,
    with_arrivals,
)


def quantile(values, q):
    return float(np.quantile(list(values), q))


def test_tool_times_have_their_quantiles():
    import random

    rng = random.Random(0)
    claude = [CLAUDE_CODE_TOOLS.draw(rng) for _ in range(50_000)]
    assert quantile(claude, 0.5) == pytest.approx(1.10, rel=0.05)
    assert quantile(claude, 0.9) == pytest.approx(2.03, rel=0.12)
    assert quantile(claude, 0.99) == pytest.approx(19.98, rel=0.1)
    swe = [SWE_TOOLS.draw(rng) for _ in range(50_000)]
    assert quantile(swe, 0.5) == pytest.approx(0.083, rel=0.1)
    assert np.mean(np.array(swe) < 1) == pytest.approx(0.8, abs=0.01)


def test_swe_batch_has_continuums_turns():
    turns = [len(p.requests) for p in generate("swe-batch", 2000, 0)]
    assert np.mean(turns) == pytest.approx(10.9, abs=0.2)
    assert np.std(turns) == pytest.approx(2.1, abs=0.2)


def test_infercept_mix_has_its_tools_and_contexts():
    programs = generate("infercept-mix", 3000, 0)
    assert max(p.longest for p in programs) <= 2048 + 2 * 80
    waits = {}
    for p in programs:
        for s in p.requests[:-1]:
            waits.setdefault(s.tool, []).append(s.tool_s)
    assert len(waits) == 6
    assert np.mean(waits["image"]) == pytest.approx(20.03, rel=0.05)
    assert np.mean(waits["qa"]) == pytest.approx(0.69, rel=0.05)
    assert np.mean([len(p.requests) - 1 for p in programs if p.requests[0].tool == "virtual-env"]) == pytest.approx(
        28.2, rel=0.06
    )


@pytest.mark.parametrize("name", ["infercept-mix", "swe-batch", "interactive", "swe-claude-tools"])
def test_equal_seeds_give_equal_programs(name):
    assert generate(name, 20, 3) == generate(name, 20, 3) != generate(name, 20, 4)


def test_unknown_workloads_list_the_known():
    with pytest.raises(ValueError, match="swe-batch"):
        generate("nothing", 1, 0)


def test_arrivals_are_poisson_unless_given():
    programs = generate("swe-batch", 3000, 0)
    arrived = with_arrivals(programs, 2.0, 0)
    gaps = np.diff([p.arrival_s for p in arrived])
    assert np.mean(gaps) == pytest.approx(0.5, rel=0.06)
    assert np.std(gaps) == pytest.approx(0.5, rel=0.1)
    fixed = TraceProgram("x", (TraceRequest(0, 1, 1),), 7.0)
    assert with_arrivals([fixed], 2.0, 0) == [fixed]


def test_resampling_takes_everyone_equally():
    programs = generate("swe-batch", 7, 0)
    drawn = resample(programs, 21, 0)
    assert len({p.id for p in drawn}) == 21
    assert {p.id.split("#")[0] for p in drawn[:7]} == {p.id for p in programs}


@pytest.mark.parametrize("longest", [300, 1000, 8192])
def test_programs_are_scaled_to_fit_and_no_further(longest):
    programs = generate("swe-batch", 20, 0)
    scaled = scaled_to_fit(programs, longest, 0.5)
    assert longest - 4 * max(len(p.requests) for p in programs) < max(p.longest for p in scaled) <= longest
    assert [p.tool_s for p in scaled] == pytest.approx([p.tool_s / 2 for p in programs])
    assert scaled_to_fit(programs, 10**6) == programs


def test_a_program_of_too_many_requests_to_fit_is_named():
    turns = tuple(TraceRequest(20 * i, 10, 10, "search" if i < 29 else None) for i in range(30))
    programs = [TraceProgram("short", (TraceRequest(0, 9, 9),)), TraceProgram("chatty", turns)]
    with pytest.raises(TraceError, match=r"'chatty' does not fit into 40 tokens: its 30 requests hold 60"):
        scaled_to_fit(programs, 40)
