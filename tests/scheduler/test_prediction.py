"""Tests of what predictors learn against what made it."""

from __future__ import annotations

import random

import numpy as np
import pytest

from astraea_jax.scheduler.prediction import Predictor
from astraea_jax.scheduler.program import Program, Request
from astraea_jax.scheduler.simulation.oracle import Oracle
from astraea_jax.scheduler.simulation.trace import TraceProgram, TraceRequest


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


def test_programs_of_one_kind_are_told_apart_by_what_they_output():
    predictor, rng = Predictor(), random.Random(0)
    for number in range(400):
        output = rng.randint(100, 900)
        program, turns = Program(number, 0.0), max(1, 3000 // output)
        for turn in range(turns):
            request = Request(1, program, range(5), 1000, frozenset(), turn == turns - 1, 0.0, page_size=16)
            request.output, request.finish_reason = [0] * output, "stop"
            program.job.turns += 1
            program.job.output_tokens += output
            predictor.ended(request, 0.0)
    assert predictor._kind(2, 2 * 400) == predictor._kind(2, 2 * 600)
    assert predictor.turns_index(begun(2, 2 * 400)) > 1.2 * predictor.turns_index(begun(2, 2 * 600))


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
