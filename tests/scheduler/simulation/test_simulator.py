"""The simulated loop: exact where it can be counted by hand, and the same however many steps it takes at once."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from astraea_jax.scheduler.costs import StepCosts
from astraea_jax.scheduler.policies import make_policy
from astraea_jax.scheduler.program import Program
from astraea_jax.scheduler.simulation import simulator
from astraea_jax.scheduler.simulation.engine import Sizes
from astraea_jax.scheduler.simulation.experiment import Cell, alone_s, interval, ratio_interval, simulate, summary
from astraea_jax.scheduler.simulation.machines import MACHINES, Machine
from astraea_jax.scheduler.simulation.oracle import Oracle
from astraea_jax.scheduler.simulation.simulator import Simulator, prompt_of
from astraea_jax.scheduler.simulation.trace import TraceProgram, TraceRequest
from astraea_jax.scheduler.simulation.workload import generate, with_arrivals

SECOND = Machine(StepCosts(1.0, 0.0, 0.0, 0.0), kv_bytes=1.0, link_bytes_s=1e9, measured=False)
"""Every step takes a second."""


def run(programs, policy="fcfs", machine=SECOND, strategy=None, **sizes):
    sizes = {"pool_tokens": 10_000, "page_size": 16, **sizes}
    return Simulator(programs, make_policy(policy, strategy=strategy), machine, Sizes(**sizes), record_plans=True).run()


def test_one_program_counted_by_hand():
    # Prefill and the first token in a step, four more tokens, a tool of 2.5 s, a step and one token more.
    program = TraceProgram("p", (TraceRequest(0, 20, 5, "t", 2.5), TraceRequest(25, 7, 2)), arrival_s=3.0)
    outcome = run([program])
    (record,) = outcome.records
    assert record.spans == [(3.0, 3.0, 4.0, 8.0), (10.5, 10.5, 11.5, 12.5)]
    assert record.jct_s == 9.5
    assert outcome.stats.reused_tokens == 24  # of 25: the last was sampled, never fed back


def family(*, tool_s=1.0):
    """A program of a product, with a fork and a sub-agent that has the product's first page and a task of its own."""
    lineage = ((0, "product"), (16, "p"))
    fork = TraceProgram("fork", (TraceRequest(36, 4, 3),), lineage=(*lineage, (36, "fork")))
    other = TraceProgram("other", (TraceRequest(16, 10, 6),), lineage=(lineage[0], (16, "other")))
    requests = (TraceRequest(16, 16, 4, "agent", tool_s, children=(fork, other)), TraceRequest(36, 5, 2))
    return TraceProgram("p", requests, 0.0, lineage=lineage)


def test_who_begins_others_waits_for_them():
    outcome = run([family()])
    parent, fork, other = outcome.records
    assert fork.spans == [(4.0, 4.0, 5.0, 7.0)]
    assert other.spans == [(4.0, 4.0, 5.0, 10.0)]
    assert parent.spans == [(0.0, 0.0, 1.0, 4.0), (10.0, 10.0, 11.0, 12.0)]
    assert outcome.served == [parent]
    assert outcome.stats.reused_tokens == 32 + 16 + 35  # two whole pages, one, and all but what was sampled last
    late = run([family(tool_s=9.0)]).records[0]
    assert late.spans[1][0] == 13.0


def test_who_begins_others_goes_on_if_they_are_refused():
    fork, other = family().requests[0].children
    large = replace(other, requests=(TraceRequest(16, 5000, 6),))
    first, last = family().requests
    outcome = run([replace(family(), requests=(replace(first, children=(fork, large)), last))], pool_tokens=320)
    assert outcome.refused == 1
    assert outcome.records[0].spans[1][0] == 7.0


def test_live_contexts_count_nobodys_beginning():
    # 36 tokens of the parent, 16 of them the product's, from its first answer at 4 s to its end at 12 s.
    assert run([family()]).mean_live_context == pytest.approx((36 - 16) * 8 / 12)


def test_sessions_of_a_product_share_its_beginning():
    def member(name, when):
        return TraceProgram(name, (TraceRequest(64, 16, 2),), when, lineage=((0, "product"), (64, name)))

    alone = replace(member("c", 4.0), lineage=((0, "other product"), (64, "c")))
    assert run([member("a", 0.0), member("b", 2.0), alone]).stats.reused_tokens == 64


def test_jobs_of_a_chat_counted_by_hand():
    # As above; then an answer, a human who takes 100 s, and a job of one request: a step and two tokens more.
    program = TraceProgram(
        "p",
        (
            TraceRequest(0, 20, 5, "t", 2.5),
            TraceRequest(25, 7, 2, "human", 100.0, human=True),
            TraceRequest(34, 6, 3),
        ),
        arrival_s=3.0,
    )
    policy = make_policy("astraea")
    outcome = Simulator([program], policy, SECOND, Sizes(pool_tokens=10_000, page_size=16)).run()
    (record,) = outcome.records
    assert record.job_times == [9.5, 3.0]
    assert policy.predict.jobs.sum == 12.5
    assert policy.predict.turns.values == [1, 2]
    assert outcome.stats.finished == 1
    assert sum(policy.predict.waits.tools.seconds.counts) == sum(policy.predict.waits.humans.seconds.counts) == 1
    assert record.jct_s == 115.5 - 3.0


def test_an_oracle_looks_no_further_than_the_job():
    human = TraceRequest(0, 5, 10, "human", 50.0, human=True)
    truth = TraceProgram("p", (human, TraceRequest(15, 5, 10, "t", 1.0), TraceRequest(30, 5, 10)))
    oracle, program = Oracle([truth]), Program(1, 0.0, key="p")
    assert [oracle.remaining_turns(replace(program, turns=turn)) for turn in range(3)] == [1, 2, 1]


def test_prompts_repeat_what_the_trace_says():
    program = TraceProgram(
        "p",
        (TraceRequest(0, 10, 5, "t"), TraceRequest(15, 5, 5, "t"), TraceRequest(8, 4, 5, "t"), TraceRequest(17, 2, 1)),
    )
    texts = [list(prompt_of(program, i)) for i in range(4)]
    assert texts[1][:15] == list(range(15))
    assert texts[2][:8] == texts[1][:8]
    assert texts[2][8] != texts[1][8]
    assert texts[3][:12] == texts[2]
    assert run([TraceProgram("p", program.requests, 0.0)]).stats.reused_tokens == 14 + 8 + 16


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 1000), st.sampled_from(["fcfs", "program-fcfs", "sjf"]), st.booleans(), st.booleans())
def test_steps_taken_at_once_are_the_steps(seed, policy, tight, windowed):
    programs = [p.scaled(0.05) for p in generate("infercept-mix", 12, seed)]
    programs = with_arrivals(programs, 2.0, seed)
    pool = max(p.longest for p in programs) * (3 if tight else 30)
    machine, sizes = MACHINES["cpu-tiny"], {"pool_tokens": pool, "window_tokens": 40_000}
    if windowed:
        machine = replace(machine, window=100, layers=(1, 1))
    together = run(programs, policy, machine, **sizes)
    stride, simulator.STRIDE = simulator.STRIDE, 1
    try:
        one_by_one = run(programs, policy, machine, **sizes)
    finally:
        simulator.STRIDE = stride
    for a, b in zip(together.records, one_by_one.records, strict=True):
        assert a.jct_s == pytest.approx(b.jct_s, rel=1e-2 if tight else 1e-6, abs=0.02)
    assert together.steps == pytest.approx(one_by_one.steps, rel=0.02)


@pytest.mark.parametrize("policy", ["astraea", "fcfs", "cachettl", "thunderagent"])
def test_equal_studies_give_equal_plans(policy):
    cell = Cell("swe-batch", policy, programs=12, oversubscription=2.0)
    first, second = (simulate(cell, record_plans=True).plans for _ in range(2))
    assert first == second
    assert first


def test_equal_studies_give_equal_plans_in_every_process():
    code = (
        "from astraea_jax.scheduler.simulation.experiment import Cell, simulate\n"
        "from astraea_jax.scheduler.policies import SERVING\n"
        "study = [Cell('infercept-mix', policy, programs=12, residency='keep-lru') for policy in SERVING]\n"
        "print([simulate(cell, record_plans=True).plans for cell in study])"
    )
    first, second = (
        subprocess.run(
            [sys.executable, "-c", code], env={**os.environ, "PYTHONHASHSEED": seed}, capture_output=True, check=True
        ).stdout
        for seed in ("1", "2")
    )
    assert first == second
    assert len(first) > 50_000


def test_a_program_larger_than_the_pool_is_refused_and_the_others_go_on():
    small = TraceProgram("s", (TraceRequest(0, 20, 5),), 0.0)
    large = TraceProgram("l", (TraceRequest(0, 20, 5, "t", 1.0), TraceRequest(25, 5000, 5)), 0.0)
    outcome = run([small, large], pool_tokens=320)
    assert outcome.refused == 1
    assert outcome.stats.finished == 2
    assert outcome.stats.free_pages == 20


def test_transfers_take_their_time():
    # Two programs of 320 tokens in a pool that holds one: the first moves to the host while it waits for its tool.
    machine = Machine(SECOND.steps, kv_bytes=1e6, link_bytes_s=64e6, measured=False)  # 5 s for 320 tokens
    first = TraceProgram("a", (TraceRequest(0, 310, 2, "t", 20.0), TraceRequest(312, 4, 2)), 0.0)
    second = TraceProgram("b", (TraceRequest(0, 300, 5),), 4.0)
    sizes = {"pool_tokens": 336, "host_tokens": 10_000, "staging_tokens": 10_000}
    outcome = run([first, second], machine=machine, strategy="infercept", **sizes)
    a, b = outcome.records
    assert outcome.stats.recomputed_tokens == 0
    assert outcome.stats.offloaded_pages == 20  # all of it is copied together
    assert outcome.stats.restored_pages == 18  # two pages stayed on the device as well
    assert b.spans[0][1] == 4.0
    submitted, scheduled, token, _ = a.spans[1]
    assert submitted == pytest.approx(22.0)
    assert scheduled == pytest.approx(26.5, abs=0.1)  # the way back takes four and a half seconds
    assert token == pytest.approx(27.5, abs=0.1)
    dropped = run([first, second], machine=machine, pool_tokens=336)
    assert dropped.stats.recomputed_tokens > 250


def test_windows_are_moved_and_take_their_part_of_the_time():
    # As above, but of six layers five see 32 tokens: of 20 pages three have a window page that moves.
    machine = Machine(SECOND.steps, kv_bytes=1e6, link_bytes_s=64e6, measured=False, window=32, layers=(1, 5))
    first = TraceProgram("a", (TraceRequest(0, 310, 2, "t", 20.0), TraceRequest(312, 4, 2)), 0.0)
    second = TraceProgram("b", (TraceRequest(0, 300, 5),), 4.0)
    sizes = {"pool_tokens": 336, "host_tokens": 10_000, "staging_tokens": 10_000, "window_tokens": 20_000}
    outcome = run([first, second], machine=machine, strategy="infercept", **sizes)
    stats = outcome.stats
    assert (stats.offloaded_pages, stats.offloaded_windows) == (20, 3)
    assert (stats.restored_pages, stats.restored_windows) == (18, 3)
    assert machine.bytes_of(16 * 38, 16 * 6) == 16 * (38 + 5 * 6) / 6 * 1e6
    submitted, scheduled, *_ = outcome.records[0].spans[1]
    assert scheduled - submitted == pytest.approx(16 * (18 + 15) / 6 / 64, abs=0.1)


def test_layers_with_a_window_attend_to_what_it_shows():
    # A second for each token of context, and one for each pair; two of three layers see 100 tokens.
    costs = StepCosts(base_s=0.0, per_prefill_s=0.0, per_token_s=0.0, per_context_s=1.0, per_pair_s=1.0)
    plain = Machine(costs, kv_bytes=1.0, link_bytes_s=1.0, measured=False)
    machine = replace(plain, window=100, layers=(1, 2))
    program = TraceProgram("p", (TraceRequest(0, 300, 2),), 0.0)
    assert alone_s(program, plain) == pytest.approx(300 + 300 * 150 + 301)
    pairs = (300 * 150 + 2 * (100 * 50 + 200 * 100)) / 3
    assert alone_s(program, machine) == pytest.approx(300 + pairs + (301 + 200) / 3)
    for one, tokens in ((plain, 300 + 300 * 150 + 301), (machine, 300 + pairs + (301 + 200) / 3)):
        record = run([program], machine=one, pool_tokens=1000, window_tokens=1000, max_step_tokens=512).records[0]
        assert record.jct_s == pytest.approx(tokens)


def test_steps_at_once_end_where_a_window_begins_to_hide():
    costs = StepCosts(base_s=1.0, per_prefill_s=0.0, per_token_s=0.0, per_context_s=1.0)
    machine = Machine(costs, kv_bytes=1.0, link_bytes_s=1.0, measured=False, window=50, layers=(0, 1))
    program = TraceProgram("p", (TraceRequest(0, 40, 30),), 0.0)
    record = run([program], machine=machine, pool_tokens=1000, window_tokens=4000).records[0]
    assert record.jct_s == pytest.approx(41 + sum(1 + min(n, 50) for n in range(41, 70)))


def test_summaries_hold_together():
    cell = Cell("infercept-mix", "fcfs", programs=30, residency="unlimited")
    row = summary(cell, simulate(cell))
    assert row["programs"] == 30
    assert row["p50_jct_s"] <= row["p90_jct_s"] <= row["p99_jct_s"]
    assert row["mean_jct_no_tool_s"] < row["mean_jct_s"]
    assert 0.9 < row["max_slowdown"] < 5
    assert row["recomputed_tokens"] == row["moved_bytes"] == 0


def test_intervals_cover_the_mean():
    low, high = interval([1.0, 2.0, 3.0, 4.0])
    assert 1.0 <= low < 2.5 < high <= 4.0


def test_ratios_of_paired_runs_have_intervals_of_runs_or_of_programs():
    rng = np.random.default_rng(0)
    bases = [rng.uniform(1, 9, 40) for _ in range(5)]
    ratio, low, high = ratio_interval([base / 2 for base in bases], bases)
    assert (ratio, low, high) == pytest.approx((0.5, 0.5, 0.5))
    for count in (1, 5):
        noisy = [base * rng.uniform(0.6, 1.0, 40) for base in bases[:count]]
        ratio, low, high = ratio_interval(noisy, bases[:count])
        assert low < ratio < high
        assert ratio == pytest.approx(0.8, abs=0.03)
        assert high - low < 0.15
