"""Replays on a real engine of the smallest size, one after the other on the same compiled steps."""

from __future__ import annotations

import numpy as np
import pytest
from rich.console import Console

from astraea_jax.engine.config import EngineConfig
from astraea_jax.errors import StartupError
from astraea_jax.lab.engine_study import Run, Study, told
from astraea_jax.lab.replay import Replayer, Setting
from astraea_jax.scheduler.simulation.experiment import Cell, Prepared, everything
from astraea_jax.scheduler.simulation.trace import TraceProgram, TraceRequest


def programs(count, tool_s, output=6):
    requests = (TraceRequest(0, 40, output, "search", tool_s), TraceRequest(40 + output, 10, output))
    return [TraceProgram(f"p{i}", requests, 0.0) for i in range(count)]


@pytest.fixture(scope="module")
def replayer():
    """What compiles once for all tests here."""
    config = EngineConfig(max_seqs=4, max_step_tokens=32, kv_bytes=2**23, max_context=128)
    found = Replayer("tiny-32k", config)
    found.compile()
    return found


def test_pools_of_several_sizes_share_what_is_compiled(replayer):
    executables = replayer._runner.executables
    for setting in (Setting("fcfs", 80), Setting("astraea", 400, True), Setting("fcfs", 80, True, "always-offload")):
        replayed = replayer.run(programs(6, 0.0), setting)
        stats = replayed.outcome.stats
        assert replayed.cut == 0
        assert len(replayed.outcome.records) == stats.finished == 6
        assert all(len(r.spans) == 2 and r.jct_s > 0 for r in replayed.outcome.records)
        assert stats.free_pages == setting.pool_tokens // 16
        assert stats.offloaded_pages or setting.strategy != "always-offload"
        assert setting.host_tier or not stats.offloaded_pages
        simulated = replayer.simulate(programs(6, 0.0), setting, replayed.machine)
        assert [len(r.spans) for r in simulated.records] == [2] * 6
    assert replayer._runner.executables == executables


def test_programs_that_are_cut_off_count_until_then(replayer):
    replayed = replayer.run(programs(3, 1000.0), Setting("fcfs", 400), limit_s=0.5)
    assert replayed.cut == 3
    assert all(r.jct_s >= 0.5 for r in replayed.outcome.records)
    setting = Setting("fcfs", 400)
    run = Run(Cell("x", "fcfs", programs=3), setting, Prepared(tuple(programs(3, 1000.0)), 100.0), replayed, 0.5)
    assert "at least: 3 of 3 programs were cut off" in told(run)
    (pair,) = Study(replayer, Console()).simulate([run])
    np.testing.assert_array_equal(pair.simulated_s, 0.5)
    assert [row["cut"] for row in pair.rows()] == [3, 3]


def test_what_does_not_fit_is_named(replayer):
    with pytest.raises(StartupError, match=r"'p0' has a context of 146 tokens, and this engine serves 128"):
        replayer.check(programs(1, 0.0, output=48))
    with pytest.raises(StartupError, match=r"a pool of 50000 tokens is wanted, and the device holds 8176"):
        replayer.run(programs(1, 0.0), Setting("fcfs", 50_000))


def test_memory_without_limit_holds_everything(replayer, monkeypatch):
    cells = [Cell("x", "fcfs", residency=name, programs=3, oversubscription=4.0) for name in ("keep-lru", "unlimited")]
    prepared = Prepared(tuple(programs(3, 0.0)), 150.0)
    study = Study(replayer, Console())
    monkeypatch.setattr(study, "_prepare", lambda _: prepared)
    short, ample = study.run(cells)
    assert short.setting.pool_tokens < ample.setting.pool_tokens == everything(prepared.programs)
    assert ample.replayed.outcome.stats.recomputed_tokens == 0
