"""How many replicas a fleet should have: as many as hold the KV of the programs that are alive.

Serve's own measure, requests in progress, is wrong for agents: a program in a tool wait has none, and yet wants its KV
kept. Its context counts here, fading while it waits (``Report.demand``).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

FULL = 0.8
"""Share of a replica's pool that live programs should fill; the rest is for what they grow by until another starts."""


def kv_demand(context: Any) -> tuple[int, dict[str, Any]]:
    """Return the number of replicas that is wanted, as a policy of Serve's autoscaler; its bounds and delays hold.

    Args:
        context: Serve's ``AutoscalingContext``, whose metrics are the reports of the replicas.
    """
    metrics: Mapping[str, Mapping[Any, float]] = context.aggregated_metrics or {}
    pools = [pool for pool in metrics.get("pool", {}).values() if pool > 0]
    if not pools:  # nobody has reported: there is nothing to go by
        return context.target_num_replicas, {}
    demand = sum(metrics.get("demand", {}).values())
    return max(1, math.ceil(demand / (FULL * sum(pools) / len(pools)))), {}
