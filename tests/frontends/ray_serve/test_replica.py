"""A replica as Serve calls it, with a real engine; only Serve's processes are not there."""

from __future__ import annotations

import dataclasses
import time
from types import SimpleNamespace

import httpx
import pytest
from support.engines import until
from support.sizes import SMALL

pytest.importorskip("ray.serve", reason="needs the [ray] extra (`make ray` installs it)")

from ray import serve

from astraea_jax.errors import EngineDead
from astraea_jax.frontends.http.tenants import owner_by_key
from astraea_jax.frontends.ray_serve.names import name_of
from astraea_jax.frontends.ray_serve.options import Options
from astraea_jax.frontends.ray_serve.replica import Replica
from astraea_jax.scheduler.placement import Report

SIZES = {each.name: getattr(SMALL, each.name) for each in dataclasses.fields(SMALL)}


class Kept(Replica):
    """A replica that is not ended by the collector, since nobody would wait for that."""

    def __del__(self):
        pass


@pytest.fixture
async def make_replica(random_folder):
    made = []

    async def make(**options):
        replica = Kept.__new__(Kept)
        await Kept.__init__(replica, Options(str(random_folder), engine=SIZES, **options))
        made.append(replica)
        return replica

    yield make
    for replica in made:
        replica._engine.shutdown(0)


def client(replica):
    transport = httpx.ASGITransport(replica.__serve_build_asgi_app__())
    return httpx.AsyncClient(transport=transport, base_url="http://replica")


async def complete(replica, session, **headers):
    async with client(replica) as http:
        body = {"prompt": "abcdefgh" * 4, "max_tokens": 4, "temperature": 0}
        return await http.post("/v1/completions", json=body, headers={"x-session-id": session, **headers})


class Handle:
    """What a replica calls the others by."""

    def __init__(self, other):
        self._other, self.sessions = other, []

    def options(self, *, method_name=None, session_id=None):
        if session_id is not None:
            self.sessions.append(session_id)
        return self

    def remote(self, program):
        return self._other.take_over(program)


async def test_a_replica_reports_what_its_engine_does(make_replica):
    replica = await make_replica()
    assert (await complete(replica, "s")).status_code == 200
    replica.check_health()
    first, second = replica.record_routing_stats(), replica.record_routing_stats()
    assert (first["number"], second["number"], first["taken"]) == (1, 2, [])
    assert Report.from_fields(first).pool > 0
    assert all(isinstance(value, float) for value in replica.record_autoscaling_stats().values())


async def test_keys_and_names_hold(make_replica):
    key = "a-long-random-key"
    replica = await make_replica(api_keys=[key], served_model_names=["mine"])
    assert (await complete(replica, "s")).status_code == 401
    assert (await complete(replica, "s", authorization=f"Bearer {key}")).json()["model"] == "mine"


async def test_an_application_may_have_any_prefix_and_a_share_of_the_traffic(make_replica):
    replica = await make_replica()
    replica.reconfigure({"split": {"share": 0.1, "route_prefix": "/next"}})
    assert replica.record_routing_stats()["split"] == {"share": 0.1, "route_prefix": "/next"}
    transport = httpx.ASGITransport(replica.__serve_build_asgi_app__(), root_path="/next")
    async with httpx.AsyncClient(transport=transport, base_url="http://replica") as http:
        assert (await http.get("/next/health")).status_code == 200
        assert (await http.get("/next/v1/models")).status_code == 200


async def test_an_engine_that_has_failed_is_not_healthy(make_replica):
    replica = await make_replica()
    replica._engine.shutdown(0)
    with pytest.raises(EngineDead):
        replica.check_health()
    assert (await complete(replica, "s")).status_code == 503


async def test_a_replica_that_stops_hands_its_programs_over(make_replica, monkeypatch):
    old, new = await make_replica(), await make_replica()
    texts = {session: (await complete(old, session)).json()["choices"][0]["text"] for session in "stu"}
    handle = Handle(new)
    here = SimpleNamespace(deployment="Engine", app_name="default")
    monkeypatch.setattr(serve, "get_replica_context", lambda: here)
    monkeypatch.setattr(serve, "get_deployment_handle", lambda deployment, app: handle)
    await Replica.__del__(old)
    names = sorted(name_of("peer:127.0.0.1", session) for session in "stu")
    assert sorted(handle.sessions) == sorted(new.record_routing_stats()["taken"]) == names
    assert not old._engine.live
    await until(lambda: new._engine.in_progress == 0)
    for session, text in texts.items():
        answer = (await complete(new, session)).json()
        assert answer["choices"][0]["text"] == text
        assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] > 0


async def test_a_replica_reports_which_sessions_have_ended(make_replica):
    """By digests; a session that has begun again has not ended, and one that was taken over before is there no more."""
    key = "a-long-random-key"
    replica = await make_replica(api_keys=[key])
    owner, auth = owner_by_key(key), {"authorization": f"Bearer {key}"}
    for session in ("kept", "ended", "again", "last"):
        await complete(replica, session, **auth, **({"x-session-final": "true"} if session == "last" else {}))
    replica._taken.append((time.monotonic(), name_of(owner, "ended")))
    async with client(replica) as http:
        for session in ("ended", "again"):
            assert (await http.delete(f"/v1/sessions/{session}", headers=auth)).status_code < 300
    await until(lambda: not any(replica._engine.knows(each, owner=owner) for each in ("ended", "again", "last")))
    await complete(replica, "again", **auth)
    stats = replica.record_routing_stats()
    assert sorted(stats["ended"]) == sorted(name_of(owner, session) for session in ("ended", "last"))
    assert not stats["taken"]
    assert (stats["keyed"], stats["session_ttl_s"]) == (True, replica._engine.config.session_ttl_s)
    assert "ended" not in str(stats["ended"])
    assert key not in str(stats)


async def test_where_nobody_takes_over_a_replica_ends_all_the_same(make_replica):
    replica = await make_replica()
    await complete(replica, "s")
    await Replica.__del__(replica)  # outside of Serve there are no others
    assert not replica._engine.live
