"""Autoscaling: as many replicas as hold the KV of live programs."""

from __future__ import annotations

import pytest

pytest.importorskip("ray.serve", reason="needs the [ray] extra (`make ray` installs it)")

from ray.serve.config import AutoscalingContext

from astraea_jax.frontends.ray_serve.autoscaling import kv_demand


def context(demands, pools, target=3):
    names = {f"replica-{i}" for i in range(max(len(demands), len(pools)))}
    metrics = {
        name: dict(zip(sorted(names), values)) for name, values in (("demand", demands), ("pool", pools)) if values
    }
    return AutoscalingContext(
        deployment_id=None,
        deployment_name="Engine",
        app_name="default",
        current_num_replicas=target,
        target_num_replicas=target,
        running_replicas=[],
        total_num_requests=0,
        total_queued_requests=0,
        aggregated_metrics=metrics,
        raw_metrics={},
        capacity_adjusted_min_replicas=1,
        capacity_adjusted_max_replicas=100,
        policy_state={},
        last_scale_up_time=None,
        last_scale_down_time=None,
        current_time=None,
        config=None,
    )


@pytest.mark.parametrize(
    ("demands", "pools", "wanted"),
    [
        ([800.0], [1000.0], 1),
        ([801.0], [1000.0], 2),
        ([1500.0, 1500.0], [1000.0, 1000.0], 4),  # 3,000 tokens, 800 to a replica
        ([0.0, 0.0], [1000.0, 1000.0], 1),
        ([1600.0, 0.0], [1000.0, 3000.0], 1),  # unequal replicas: by the mean pool
        ([1601.0, 0.0], [1000.0, 3000.0], 2),
        ([400.0], [1000.0, 1000.0], 1),  # one that has just started says nothing of its demand
    ],
)
def test_demand_decides_whatever_requests_are_in_progress(demands, pools, wanted):
    assert kv_demand(context(demands, pools)) == (wanted, {})


@pytest.mark.parametrize(("demands", "pools"), [([], []), ([5000.0], []), ([5000.0], [0.0])])
def test_without_reports_nothing_changes(demands, pools):
    assert kv_demand(context(demands, pools, target=5)) == (5, {})
