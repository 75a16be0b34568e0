"""What the demo replays where memory is short."""

from __future__ import annotations

from dataclasses import replace
from itertools import groupby

from astraea_jax.lab.short_memory import WAYS, Shortage
from astraea_jax.scheduler.simulation.experiment import residency_of


def test_the_same_programs_run_both_ways_one_after_the_other():
    cells = Shortage(programs=5, seeds=3, context=2048).cells()
    groups = [list(found) for _, found in groupby(cells, lambda cell: replace(cell, policy="", residency="host"))]
    assert [[(cell.policy, cell.residency) for cell in group] for group in groups] == [list(WAYS)] * 3
    assert [{cell.seed for cell in group} for group in groups] == [{0}, {1}, {2}]
    assert {(cell.programs, cell.context) for cell in cells} == {(5, 2048)}


def test_only_one_way_has_host_memory():
    assert [residency_of(cell) for cell in Shortage(seeds=1).cells()] == [(False, "always-keep"), (True, "adaptive")]
