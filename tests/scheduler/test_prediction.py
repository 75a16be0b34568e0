"""Tests of what predictors learn against what made it."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest

from astraea_jax.scheduler.costs import StepCosts, StepFit, prefilled_pairs
from astraea_jax.scheduler.plan import Plan
from astraea_jax.scheduler.prediction import Predictor
from astraea_jax.scheduler.program import Program, Request
from astraea_jax.scheduler.simulation.oracle import Oracle
from astraea_jax.scheduler.simulation.trace import TraceProgram, TraceRequest


def test_what_batching_saves_and_what_a_prefill_costs_in_context():
    costs = StepCosts(base_s=4e-3, per_prefill_s=6e-3, per_token_s=1.0, per_context_s=1e-6)
    assert costs.batching_saves(0) == 1.0
    assert costs.batching_saves(12_000) == pytest.approx(0.25)
    # A step over 12,000 tokens takes 16 ms, so each takes 1.33 us, and over 10 steps 13.3 us: 450 take 6 ms.
    assert costs.prefill_in_context(10, 12_000) == pytest.approx(450)
    assert costs.prefill_in_context(10, math.inf) == pytest.approx(600)
    nothing = StepCosts(0.0, 0.0, 0.0, 0.0)
    assert nothing.batching_saves(1000) == nothing.prefill_in_context(10, 1000) == 0.0


def test_step_costs_are_found_from_steps():
    fit, rng, none = StepFit(), random.Random(0), np.zeros(0, np.int32)
    truth = StepCosts(2e-3, 5e-3, 3e-5, 4e-8)
    for _ in range(2000):
        rows = rng.randint(1, 64)
        tokens = rows + rng.choice([0, 0, rng.randint(1, 500)])
        context = rng.randint(0, 100_000)
        seconds = truth.step_s(rows, tokens, context)
        assert seconds == pytest.approx(2e-3 + 5e-3 * (tokens > rows) + 3e-5 * tokens + 4e-8 * context)
        plan = Plan([None] * rows, none, none, none, 0, rows, [], [], tokens, context, [], [], [])
        fit.observe(plan, seconds * rng.uniform(0.95, 1.05))
    assert fit.costs.base_s == pytest.approx(2e-3, rel=0.1)
    assert fit.costs.per_prefill_s == pytest.approx(5e-3, rel=0.15)
    assert fit.costs.per_token_s == pytest.approx(3e-5, rel=0.1)
    assert fit.costs.per_context_s == pytest.approx(4e-8, rel=0.1)
    assert 2e-3 < fit.mean_step_s < 3e-2


def test_costs_of_attention_in_prefill_are_found_and_none_is_below_zero():
    fit, rng = StepFit(), random.Random(0)
    truth = StepCosts(0.0, 1e-3, 0.0, 4e-8, per_pair_s=2e-8)
    for _ in range(2000):
        rows, fresh = rng.randint(1, 32), rng.choice([0, 0, rng.randint(2, 500)])
        starts, counts = np.array([rng.randint(0, 8000) for _ in range(rows)]), np.ones(rows, np.int32)
        counts[-1] += fresh
        decodes = rows - 1 if fresh else rows
        plan = Plan(
            [None] * rows,
            counts,
            starts,
            counts,
            decodes,
            rows,
            [],
            [],
            int(counts.sum()),
            int(starts.sum()),
            [],
            [],
            [],
        )
        pairs = (fresh + 1) * (starts[-1] + (fresh + 1) / 2) if fresh else 0.0
        assert prefilled_pairs(plan) == pytest.approx(pairs)
        seconds = truth.step_s(rows, plan.tokens, plan.context, prefilled_pairs(plan))
        fit.observe(plan, seconds * rng.uniform(0.95, 1.05))
    assert fit.costs.per_pair_s == pytest.approx(2e-8, rel=0.05)
    assert fit.costs.per_context_s == pytest.approx(4e-8, rel=0.1)
    assert 0.0 <= fit.costs.base_s < 1e-4
    assert 0.0 <= fit.costs.per_token_s < 1e-6
    assert fit.costs.prefill_s(100, before=400) == pytest.approx(
        fit.costs.per_prefill_s + 100 * fit.costs.per_token_s + fit.costs.per_pair_s * 100 * 450
    )


def begun(turns, output_tokens=0) -> Program:
    """A program whose job has come so far."""
    program = Program(0, 0.0)
    program.job.turns, program.job.output_tokens = turns, output_tokens
    return program


def test_programs_that_output_much_are_told_from_those_that_output_little():
    predictor, rng = Predictor(), random.Random(0)
    programs = [(i, *rng.choice([(10, 12), (50, 6), (200, 3)])) for i in range(300)]
    for number, output, turns in programs:
        program = Program(number, 0.0)
        for turn in range(turns):
            request = Request(1, program, range(5), 500, frozenset(), turn == turns - 1, 0.0, page_size=16)
            request.output, request.finish_reason = [0] * output, "stop"
            program.job.turns += 1
            program.job.output_tokens += output
            predictor.ended(request, 0.0)
    little, middling, much = (predictor.remaining_turns(begun(2, 2 * output)) for output in (10, 50, 200))
    assert little == pytest.approx(10, rel=0.3)
    assert middling == pytest.approx(4, rel=0.3)
    assert much < 2  # 1, and what smoothing over turns adds
    new = predictor.remaining_turns(Program(0, 0.0))
    assert new == pytest.approx(7, rel=0.3)  # nothing is known of it yet: as everybody


def test_eta_by_kind_of_length():
    rng = np.random.default_rng(0)

    def eta(lengths):
        predictor = Predictor()
        for n in lengths:
            predictor.job_ended(begun(int(n)).job)
        return predictor.eta()

    assert eta([10] * 100) == pytest.approx(1.0)
    assert eta(rng.geometric(0.1, 3000)) == pytest.approx(0.0, abs=0.15)
    assert eta(np.clip(rng.lognormal(np.log(16), 1.75, 3000), 1, 1500)) < -0.05


def test_the_oracle_knows_and_its_noise_is_steady():
    truth = TraceProgram("p", (TraceRequest(0, 5, 40, "t", 3.0), TraceRequest(45, 5, 60)))
    request = Request(1, Program(1, 0.0, key="p"), range(5), 100, frozenset(), False, 0.0, page_size=16)
    exact = Oracle([truth])
    assert exact.output_tokens(request) == 40
    assert exact.wait_s(request.program) == 3.0
    assert exact.remaining_turns(request.program) == 2
    noisy = [Oracle([truth], 0.5, seed).output_tokens(request) for seed in range(400)]
    assert np.std(noisy) / 40 == pytest.approx(0.5, rel=0.15)
    assert Oracle([truth], 0.5, 7).output_tokens(request) == Oracle([truth], 0.5, 7).output_tokens(request)
