"""The application: one deployment, whose replicas are engines, with defaults that suit them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ray import serve

from astraea_jax.errors import StartupError, shown
from astraea_jax.frontends.ray_serve.options import Options
from astraea_jax.frontends.ray_serve.replica import Replica

NAME = "Engine"
"""Name of the deployment."""
ROUTER = "astraea_jax.frontends.ray_serve.router.ProgramRouter"
POLICY = "astraea_jax.frontends.ray_serve.autoscaling:kv_demand"
REPORT_S = 1.0
"""Seconds between two reports of a replica. Serve's own period of 10 s is longer than most requests of agents."""
LONGEST_REQUEST_S = 600.0
"""Seconds that a replica which is stopped has for the requests that it runs, and to hand its programs over."""


def app(model: str = "astraea-tiny", *, deployment: Mapping[str, Any] | None = None, **options: Any) -> Any:
    """Return a Serve application.

    Args:
        model: see :class:`~.options.Options`.
        deployment: options of ``serve.deployment`` that differ from ours: ``num_replicas`` or ``autoscaling_config``,
            ``ray_actor_options`` (CPUs, GPUs, ``runtime_env``), ``placement_group_bundles``, ….
        options: the other fields of :class:`~.options.Options`.

    Raises:
        StartupError: an option is unknown, or cannot be.
    """
    chosen = Options.of({"model": model, **options})
    if not isinstance(deployment, Mapping | None):
        raise StartupError(f"deployment is {shown(deployment)}; it must be a mapping of options of serve.deployment")
    return _deployment(chosen, deployment or {}).bind(chosen)


def build(args: dict[str, Any]) -> Any:
    """Return the application that a config file describes: ``args`` are the arguments of :func:`app`."""
    return app(**args)


def _deployment(options: Options, given: Mapping[str, Any]) -> Any:
    chosen = {
        "name": NAME,
        "max_ongoing_requests": options.at_once,
        "max_queued_requests": options.at_once,
        "backpressure_config": {"status_code": 429, "retry_after_s": 1},
        "graceful_shutdown_timeout_s": LONGEST_REQUEST_S,
        "health_check_period_s": 5.0,
        "request_router_config": {"request_router_class": ROUTER, "request_routing_stats_period_s": REPORT_S},
        **given,
    }
    scaling = chosen.get("autoscaling_config", {} if chosen.get("num_replicas") == "auto" else None)
    if isinstance(scaling, Mapping):
        chosen["autoscaling_config"] = {"policy": {"policy_function": POLICY}, **scaling}
    bundles = chosen.get("placement_group_bundles") or [{}]
    if len(bundles) < options.processes:
        raise StartupError(
            f"processes is {options.processes}, and the placement group has {len(bundles)} bundles; give "
            "placement_group_bundles in deployment, one for each process"
        )
    try:
        return serve.deployment(serve.ingress()(Replica)).options(**chosen)
    except (TypeError, ValueError) as error:
        raise StartupError(f"deployment: {error}") from error
