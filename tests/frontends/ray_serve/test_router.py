"""The request router, with Serve's own class around it and replicas that are played."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace

import pytest
from support.engines import WAIT_S
from support.reports import QUIET

pytest.importorskip("ray.serve", reason="needs the [ray] extra (`make ray` installs it)")

from ray import cloudpickle
from ray.serve._private.common import DeploymentHandleSource, DeploymentID, RequestMetadata
from ray.serve.config import RequestRouterConfig
from ray.serve.request_router import PendingRequest, ReplicaID, RunningReplica

from astraea_jax.frontends.ray_serve import proxies
from astraea_jax.frontends.ray_serve.app import ROUTER
from astraea_jax.frontends.ray_serve.names import NOBODY, caller_of, name_of
from astraea_jax.frontends.ray_serve.proxies import Asked, Requests
from astraea_jax.frontends.ray_serve.split import SPLITS

CARRIED = RequestRouterConfig(request_router_class=ROUTER).get_serialized_request_router_cls()
"""The class as Serve brings it to its processes."""
DEPLOYMENT = DeploymentID("Engine", "default")
BUSY = replace(QUIET, wait_s=tuple(float(i) for i in range(50, 60)))


class Replica(RunningReplica):  # type: ignore[misc]
    """A replica as a router sees it."""

    def __init__(self, name, stats=None):
        self._name, self.stats, self.queue = name, stats or {}, 0

    replica_id = property(lambda self: ReplicaID(self._name, DEPLOYMENT))
    routing_stats = property(lambda self: self.stats)
    max_ongoing_requests = property(lambda self: 4)

    async def get_queue_len(self, *, deadline_s):
        return self.queue


def report(number, of=QUIET, taken=(), ended=(), **more):
    named = {"taken": [*map(named_by_nobody, taken)], "ended": [*map(named_by_nobody, ended)]}
    return {**of.fields(), "number": number, **named, **more}


def named_by_nobody(session):
    return name_of(NOBODY.owner(True), session)


def request(id, session=None, method="__call__"):
    return PendingRequest([b""], {}, RequestMetadata(id, id, call_method=method, session_id=session or ""))


@pytest.fixture
async def router(monkeypatch):
    monkeypatch.setattr(proxies, "REQUESTS", Requests())
    router = cloudpickle.loads(CARRIED)(DEPLOYMENT, DeploymentHandleSource.REPLICA, use_replica_queue_len_cache=True)
    router.initialize_state()
    return router


def present(router, *names, **stats):
    replicas = [Replica(name, stats.get(name)) for name in names]
    router.update_replicas(replicas)
    return replicas


async def chosen(router, pending):
    """Name of the replica that a request goes to, by the loop of Serve's own class."""
    replica = await asyncio.wait_for(router._choose_replica_for_request(pending), WAIT_S)
    router.on_request_routed(pending, replica.replica_id, None)
    return replica._name


def done(router, pending, name):
    router.on_request_completed(ReplicaID(name, DEPLOYMENT), pending.metadata.internal_request_id)


async def test_a_session_stays_where_it_is(router):
    present(router, "a", "b", "c")
    homes = {}
    for turn in range(4):
        for session in "stuvw":
            pending = request(f"{session}{turn}", session)
            name = await chosen(router, pending)
            assert homes.setdefault(session, name) == name
            done(router, pending, name)
    assert len(set(homes.values())) == 3


async def test_a_new_session_goes_where_it_need_not_wait(router):
    present(router, "a", "b", a=report(1, BUSY), b=report(1))
    assert [await chosen(router, request(str(i), str(i))) for i in range(3)] == ["b"] * 3


async def test_a_report_that_is_sent_again_is_not_new(router, monkeypatch):
    heard = []
    present(router, "a", a=report(1))
    monkeypatch.setattr(router._router, "report", lambda replica, report, now: heard.append(report))
    present(router, "a", a=report(1))
    assert not heard
    present(router, "a", a=report(2))
    assert len(heard) == 1


@pytest.mark.parametrize(
    "stats", [{"pool": 5}, {**QUIET.fields(), "free": float("nan")}, {**QUIET.fields(), "live": "many"}]
)
async def test_a_report_that_cannot_be_is_ignored(router, stats):
    present(router, "a", a={**stats, "number": 1})
    assert await chosen(router, request("1")) == "a"


async def test_a_session_of_a_replica_that_dies_goes_on_elsewhere(router):
    present(router, "a", "b")
    first = request("1", "s")
    home = await chosen(router, first)
    router.on_replica_actor_died(ReplicaID(home, DEPLOYMENT))
    done(router, first, home)
    again = request("2", "s")
    assert await chosen(router, again) == {"a": "b", "b": "a"}[home]


async def test_a_replica_that_stops_gets_nothing_any_more(router):
    present(router, "a", "b")
    home = await chosen(router, request("1", "s"))
    other = {"a": "b", "b": "a"}[home]
    present(router, other)
    assert {await chosen(router, request(str(i), f"s{i}")) for i in range(2, 5)} == {other}


async def test_a_full_replica_is_passed_over_and_the_session_lives_elsewhere_then(router):
    replicas = {each._name: each for each in present(router, "a", "b")}
    first = request("1", "s")
    home = await chosen(router, first)
    done(router, first, home)
    replicas[home].queue = 4
    router.replica_queue_len_cache.update(replicas[home].replica_id, 4)
    second = request("2", "s")
    other = await chosen(router, second)
    assert other != home
    done(router, second, other)
    replicas[home].queue = 0
    router.replica_queue_len_cache.update(replicas[home].replica_id, 0)
    assert await chosen(router, request("3", "s")) == other


async def test_a_session_that_was_handed_over_is_found(router):
    slower = replace(QUIET, wait_s=(0.5,) * len(QUIET.wait_s))  # a stranger would go to the other one
    present(router, "a", "b", a=report(1, slower, taken=["s"]), b=report(1))
    assert await chosen(router, request("1", "s")) == "a"
    assert await chosen(router, request("2", "stranger")) == "b"


async def test_of_two_replicas_that_claim_a_session_one_has_it(router):
    present(router, "a", "b", a=report(1, taken=["s"]), b=report(1, taken=["s"]))
    first = request("1", "s")
    home = await chosen(router, first)
    done(router, first, home)
    present(router, "a", "b", a=report(2, taken=["s"]), b=report(2, taken=["s"]))
    assert await chosen(router, request("2", "s")) == home


async def test_a_child_begins_where_its_parent_is(router):
    present(router, "a", "b", "c", a=report(1), b=report(1), c=report(1))
    proxies.REQUESTS.put("1", Asked(20_000))
    first = request("1", "parent")
    home = await chosen(router, first)
    done(router, first, home)
    proxies.REQUESTS.put("2", Asked(20_100, parent="parent"))
    assert await chosen(router, request("2", "child")) == home


async def test_the_proxy_around_it_learns_of_a_split(router):
    present(router, "a", a={**report(1), "split": {"share": 1.0, "route_prefix": "/next"}})
    assert SPLITS.choose("s") == ("default", "/next")
    present(router, "a", a={**report(2), "split": None})
    assert SPLITS.choose("s") is None


async def test_an_ended_session_is_forgotten(router):
    present(router, "a", "b")
    first = request("1", "s")
    done(router, first, await chosen(router, first))
    end = request("2", "s", "End")
    done(router, end, await chosen(router, end))
    assert len(router._router) == 0


async def asked_by(router, id, session, caller):
    """Name of the replica of a request that a proxy has seen; the request has ended."""
    proxies.REQUESTS.put(id, Asked(100, caller=caller))
    pending = request(id, session)
    name = await chosen(router, pending)
    done(router, pending, name)
    return name


@pytest.mark.parametrize("keyed", [True, False])
async def test_sessions_of_one_name_and_two_tenants_have_nothing_in_common(router, keyed):
    """Agents of many tenants call theirs ``main``. Tenants are keys; on a server without keys, addresses or salts."""
    present(router, "a", "b", "c", "d", **{name: report(1, keyed=keyed) for name in "abcd"})
    callers = [caller_of({"authorization": f"Bearer key-{i}"}, "10.0.0.1") for i in range(4)]
    if not keyed:
        anything = {"authorization": "Bearer EMPTY"}
        callers = [caller_of(anything, f"10.0.0.{i}") for i in range(3)]
        callers.append(caller_of({**anything, "x-cache-salt": "mine"}, "10.0.0.1"))
    homes = [await asked_by(router, f"{i}", "main", caller) for i, caller in enumerate(callers)]
    assert sorted(homes) == ["a", "b", "c", "d"]
    assert len(router._router) == 4
    again = [await asked_by(router, f"again{i}", "main", caller) for i, caller in enumerate(callers)]
    assert again == homes


async def test_a_child_of_another_tenants_parent_is_a_stranger(router):
    present(router, "a", "b", "c", a=report(1), b=report(1), c=report(1))
    one, two = (caller_of({"x-api-key": f"key-{i}"}, "10.0.0.1") for i in range(2))
    proxies.REQUESTS.put("1", Asked(20_000, caller=one))
    first = request("1", "main")
    home = await chosen(router, first)
    done(router, first, home)
    proxies.REQUESTS.put("2", Asked(20_100, parent="main", caller=one))
    proxies.REQUESTS.put("3", Asked(20_100, parent="main", caller=two))
    assert await chosen(router, request("2", "child")) == home
    assert await chosen(router, request("3", "child")) != home


def report_at(router, monkeypatch, later, **stats):
    """Let reports of ``a`` come so many seconds later."""
    with monkeypatch.context() as patch:
        now = time.monotonic() + later
        patch.setattr(time, "monotonic", lambda: now)
        present(router, "a", "b", a=report(later, **stats))


async def test_a_session_that_has_ended_there_is_forgotten_if_the_report_is_not_a_late_one(router, monkeypatch):
    present(router, "b")
    other = request("0", "elsewhere")
    done(router, other, await chosen(router, other))
    present(router, "a", "b", b=report(1, BUSY))
    ended, running = request("1", "ended"), request("2", "runs")
    done(router, ended, await chosen(router, ended))
    assert await chosen(router, running) == "a"
    told = {"ended": ["elsewhere", "ended", "runs", "never heard of"]}
    report_at(router, monkeypatch, 5, **told)  # it may be older than the request: the session may have begun again
    assert len(router._router) == 3
    report_at(router, monkeypatch, 11)  # one that was to tell it is lost
    report_at(router, monkeypatch, 12, **told)
    known = {name for name in ("elsewhere", "ended", "runs") if router._router.home(named_by_nobody(name))}
    assert known == {"elsewhere", "runs"}


async def test_a_session_is_forgotten_when_replicas_forget_it(router, monkeypatch):
    present(router, "a", a=report(1, session_ttl_s=60.0))
    pending = request("1", "s")
    done(router, pending, await chosen(router, pending))
    running = request("2", "runs")
    await chosen(router, running)
    report_at(router, monkeypatch, 55)
    assert len(router._router) == 2
    report_at(router, monkeypatch, 65)
    assert len(router._router) == 1
    assert router._router.busy(named_by_nobody("runs"))


async def test_whatever_ends_or_is_given_up_leaves_nothing_behind(router):
    present(router, "a")
    running = request("1", "s")
    name = await chosen(router, running)
    given_up = request("2", "t")
    assert await router.choose_replicas(router._replicas_list, given_up)
    given_up.future.cancel()
    await asyncio.sleep(0)
    rejected = request("3", "u")
    assert await router.choose_replicas(router._replicas_list, rejected)
    done(router, rejected, name)
    done(router, running, name)
    assert not router._routed
    assert router._router.fleet.requests.tolist() == [0]
    done(router, running, name)  # nobody minds


async def test_who_gives_up_just_when_a_replica_is_found_keeps_nothing_busy(router, monkeypatch):
    """Serve has chosen, and is cancelled before it sends anything; nobody hears of the request any more."""
    present(router, "a")
    pending = request("1", "s")
    choosing = asyncio.ensure_future(router._choose_replica_for_request(pending))
    pending.future.add_done_callback(lambda _: choosing.cancel())
    with pytest.raises(asyncio.CancelledError):
        await choosing
    assert not pending.future.cancelled()
    present(router, "a")
    assert router._router.busy(named_by_nobody("s")), "it might still be sent"
    later = time.monotonic() + 61.0
    monkeypatch.setattr(time, "monotonic", lambda: later)
    present(router, "a")
    assert not router._routed
    assert not router._router.busy(named_by_nobody("s"))
    assert router._router.fleet.requests.tolist() == [0]


async def test_without_any_replica_that_takes_it_serve_waits(router):
    present(router, "a", a=report(1, replace(QUIET, draining=True)))
    assert await chosen(router, request("1", "s")) == "a"  # Serve has the last word
