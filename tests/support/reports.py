"""What replicas say of themselves, for tests of placement."""

from astraea_jax.scheduler.placement import DECILES, Report

QUIET = Report(
    pool=100_000,
    free=100_000,
    retained=0,
    host_free=0,
    live=0,
    demand=0.0,
    running=0,
    waiting=0,
    tool_waits=0,
    wait_s=(0.0,) * DECILES,
    prefill_s=1e-4,
    step_s=0.01,
    restore_s=1e-5,
)
"""A replica that has nothing to do."""
