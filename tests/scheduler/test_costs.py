"""Tests of learned costs against those that made the steps and transfers."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest

from astraea_jax.scheduler.costs import StepCosts, StepFit, TransferFit, prefilled_pairs
from astraea_jax.scheduler.plan import Plan


def step(rows: int, tokens: int, context: int) -> Plan:
    """A step of such sizes, for those who look at nothing else."""
    none = np.zeros(0, np.int32)
    return Plan([None] * rows, none, none, none, 0, rows, [], [], tokens, context, [], [], [])


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
    fit, rng = StepFit(), random.Random(0)
    truth = StepCosts(2e-3, 5e-3, 3e-5, 4e-8)
    for _ in range(2000):
        rows = rng.randint(1, 64)
        tokens = rows + rng.choice([0, 0, rng.randint(1, 500)])
        context = rng.randint(0, 100_000)
        seconds = truth.step_s(rows, tokens, context)
        assert seconds == pytest.approx(2e-3 + 5e-3 * (tokens > rows) + 3e-5 * tokens + 4e-8 * context)
        fit.observe(step(rows, tokens, context), seconds * rng.uniform(0.95, 1.05))
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


def test_costs_without_one_that_would_be_below_zero_still_add_up():
    """Where the pool is always full, more rows have no more context, and steps look as if context made them shorter."""
    fit, rng, took, steps = StepFit(), random.Random(0), [], []
    fit.forget = 1.0
    for _ in range(20 * StepFit.EVERY):
        rows = rng.randint(1, 16)
        steps.append((rows, rows, 9_000 - 100 * rows + rng.randint(0, 200)))
        took.append(1e-3 + 1e-4 * rows - 1e-7 * (steps[-1][2] - 9_000) + rng.uniform(0, 1e-5))
        fit.observe(step(*steps[-1]), took[-1])
    assert fit.costs.per_context_s == 0.0
    assert np.mean([fit.costs.step_s(*each) for each in steps]) == pytest.approx(np.mean(took), rel=1e-3)


@pytest.mark.parametrize("forget", [0.98, 1.0])
def test_costs_of_transfers_are_found(forget):
    fit, rng = TransferFit(), random.Random(0)
    fit.forget = forget
    for pages in [rng.randint(1, 500) for _ in range(1000)]:
        fit.observe(pages, (4e-3 + 1e-5 * pages) * rng.uniform(0.99, 1.01))
    assert fit.latency_s == pytest.approx(4e-3, rel=0.05)
    assert fit.per_page_s == pytest.approx(1e-5, rel=0.05)
