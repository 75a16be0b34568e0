"""Two replicas of the bundled model on a real Ray: what only processes can show. `make ray` runs it."""

from __future__ import annotations

import threading

import pytest

pytest.importorskip("ray.serve", reason="needs the [ray] extra (`make ray` installs it)")

from astraea_jax.lab.ray_fleet import deploy, local_fleet, run_agents
from astraea_jax.lab.shop import make_tasks

pytestmark = [pytest.mark.ray, pytest.mark.filterwarnings("default")]  # Ray's own are not ours to mend

ENGINE = {"max_seqs": 16, "max_step_tokens": 256, "kv_bytes": 16 * 2**20, "max_context": 1024}
TASKS = make_tasks(seed=1, split="test", count=24)
ATTEMPTS = 60
"""Half a second apart: somebody answers within that time, or something hangs."""


@pytest.fixture(scope="module")
def fleet():
    with local_fleet(2, ENGINE) as fleet:
        yield fleet


def texts(ended):
    return [each.result.text for each in ended]


async def test_agents_are_right_through_both_doors(fleet):
    over_http = await run_agents(fleet, TASKS, http=True)
    over_grpc = await run_agents(fleet, TASKS, http=False)
    assert all(each.right for each in over_http)
    assert texts(over_grpc) == texts(over_http)
    usages = [request.usage for each in over_http + over_grpc for request in each.result.requests[1:]]
    kept, prompts = (sum([getattr(usage, name) for usage in usages]) for name in ("cached_tokens", "prompt_tokens"))
    assert kept > 0.8 * prompts  # sessions are where their KV is


@pytest.mark.parametrize("http", [True, False])
async def test_a_replica_that_is_killed_loses_nobody(fleet, http):
    before = fleet.replicas()

    def kill(count):
        if count == 4:
            fleet.kill(before[0])

    ended = await run_agents(fleet, TASKS, http=http, attempts=ATTEMPTS, ended=kill)
    assert all(each.right for each in ended)
    assert before[0] not in fleet.replicas()


async def test_a_new_version_takes_over_without_a_failed_request(fleet):
    update = threading.Thread(target=deploy, args=(2, ENGINE), kwargs={"served_model_names": ["newer"]})
    old = set(fleet.replicas())
    update.start()
    try:
        http = True
        while update.is_alive():
            assert all(each.right for each in await run_agents(fleet, TASKS[:6], http=http))
            http = not http
    finally:
        update.join()
    assert not old & set(fleet.replicas())
