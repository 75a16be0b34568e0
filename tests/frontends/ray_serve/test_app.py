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
        ({"processes": True}, "processes is True"),
        ({"engine": None}, "engine is None; it must be a mapping"),
        ({"engine": ["max_seqs"]}, "engine is .*; it must be a mapping"),
        ({"engine": {3: 3}}, "engine has 3"),
        ({"engine": {"max_seqs": "64"}}, "max_seqs is '64'; it must be an integer"),
        ({"engine": {"max_queued": None}}, "max_queued is None"),
        ({"engine": {"policy": "fast"}}, "policy is 'fast'"),
        ({"api_keys": None}, "api_keys is of type NoneType; it must be a list of texts, \\[\\] for none"),
        ({"api_keys": [12345678]}, "api_keys is of type list; it must be a list of texts"),
        ({"allowed_hosts": "gpu.example"}, "allowed_hosts is 'gpu.example'; it must be a list"),
        ({"max_wait_s": "long"}, "max_wait_s is 'long'"),
        ({"max_wait_s": float("nan")}, "max_wait_s is nan"),
        ({"model": None}, "model is None"),
        ({"revision": 1.1}, "revision 1.1"),
        ({"deployment": 2}, "deployment is 2; it must be a mapping"),
        ({"deployment": {"num_replicas": -1}}, "deployment: "),
        ({"deployment": {"replicas": 2}}, "deployment: "),
    ],
)
def test_what_cannot_be_is_refused_where_it_is_written(given, told):
    with pytest.raises(StartupError, match="(?s)" + told):
        ray_serve.app(**given)


@pytest.mark.parametrize("name", ["api_keys", "admin_keys"])
def test_keys_are_in_no_message(name):
    """Neither in errors nor in what logs make of the options."""
    secret = "sk-1234567890"
    for wrong in (secret, [secret, 1]):
        with pytest.raises(StartupError) as refused:
            ray_serve.app(**{name: wrong})
        assert secret not in str(refused.value)
    assert secret not in repr(Options(**{name: [secret]}))


def test_sizes_that_are_left_to_the_devices_may_be_written_so():
    assert Options(engine={"max_seqs": None}).at_once == Options().at_once
