"""The application: its options, checked where they are written, and the deployment that comes of them."""

from __future__ import annotations

import pytest

pytest.importorskip("ray.serve", reason="needs the [ray] extra (`make ray` installs it)")

from astraea_jax.errors import StartupError
from astraea_jax.frontends import ray_serve
from astraea_jax.frontends.ray_serve.options import LARGEST_MAX_SEQS, Options


def deployment(application):
    return application._bound_deployment


def test_a_replica_takes_as_many_requests_as_its_engine_runs_and_queues():
    made = deployment(ray_serve.app(engine={"max_seqs": 8, "max_queued": 32, "data_parallel": 2}))
    assert made.max_ongoing_requests == 2 * (8 + 32)
    assert made.max_queued_requests == made.max_ongoing_requests
    assert Options().at_once == LARGEST_MAX_SEQS + 1024


def test_what_the_caller_says_of_the_deployment_counts():
    made = deployment(
        ray_serve.app("m", deployment={"num_replicas": 3, "ray_actor_options": {"num_gpus": 1}, "name": "Mine"})
    )
    assert (made.name, made.num_replicas, made.ray_actor_options["num_gpus"]) == ("Mine", 3, 1)


@pytest.mark.parametrize(
    "given",
    [
        {"autoscaling_config": {"min_replicas": 2, "max_replicas": 9}},
        {"num_replicas": "auto"},
        {"num_replicas": "auto", "autoscaling_config": {"max_replicas": 9}},
    ],
)
def test_autoscaling_goes_by_the_demand_for_kv(given):
    scaling = deployment(ray_serve.app(deployment=given))._deployment_config.autoscaling_config
    wanted = given.get("autoscaling_config", {})
    assert wanted.items() <= scaling.model_dump().items()
    assert scaling.policy.policy_function == "astraea_jax.frontends.ray_serve.autoscaling:kv_demand"


def test_requests_are_placed_by_our_router_and_replicas_report_every_second():
    router = deployment(ray_serve.app())._deployment_config.request_router_config
    assert router.request_router_class.endswith("ray_serve.router.ProgramRouter")
    assert router.request_routing_stats_period_s == 1.0


def test_a_config_file_says_the_same():
    args = {"model": "m", "processes": 2, "deployment": {"placement_group_bundles": [{"CPU": 1}, {"CPU": 1}]}}
    assert deployment(ray_serve.build(args)).init_args[0] == Options("m", processes=2)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"engine": {"max_seq": 3}}, "engine has max_seq"),
        ({"modle": "x"}, "there is no option modle"),
        ({"turn_continuity": "never"}, "turn_continuity is 'never'"),
        ({"call_format": "smoke"}, "call_format is 'smoke'"),
        ({"processes": 0}, "processes is 0"),
        ({"processes": 2}, "placement_group_bundles"),
        ({"api_keys": "secret"}, "api_keys is 'secret'; it must be a list"),
        ({"deployment": {"num_replicas": -1}}, "deployment: "),
        ({"deployment": {"replicas": 2}}, "deployment: "),
    ],
)
def test_what_cannot_be_is_refused_where_it_is_written(given, told):
    with pytest.raises(StartupError, match="(?s)" + told):
        ray_serve.app(**given)
