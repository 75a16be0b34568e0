"""The middleware of Serve's HTTP proxies."""

from __future__ import annotations

import json

import httpx
import pytest
from starlette.requests import Request
from starlette.responses import JSONResponse

pytest.importorskip("ray.serve", reason="needs the [ray] extra (`make ray` installs it)")

from astraea_jax.frontends.http.errors import SEND_AGAIN
from astraea_jax.frontends.http.tenants import MAX_SALT, Keys
from astraea_jax.frontends.ray_serve import proxies
from astraea_jax.frontends.ray_serve.names import caller_of
from astraea_jax.frontends.ray_serve.proxies import GONE, REQUESTS, Asked, Front, Requests, middlewares
from astraea_jax.frontends.ray_serve.split import Split, Splits


async def echo(scope, receive, send):
    """An app that tells which headers it has got."""
    await JSONResponse(dict(Request(scope).headers))(scope, receive, send)


async def silent(scope, receive, send):
    """An app as Serve's is when the replica of a request has died: it says nothing."""


def cut(*events, kind="text/event-stream"):
    """An app as Serve's is when the replica of a stream dies."""

    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", kind.encode())]})
        for event in events:
            await send({"type": "http.response.body", "body": event, "more_body": True})

    return app


async def ask(app, path="/v1/chat/completions", headers=(), content=b""):
    async with httpx.AsyncClient(transport=httpx.ASGITransport(Front(app)), base_url="http://proxy") as client:
        return await client.post(path, headers=dict(headers), content=content)


@pytest.mark.parametrize(
    ("headers", "session", "parent"),
    [
        ({"x-session-id": "a"}, "a", None),
        ({"X-Dynamo-Session-ID": "b"}, "b", None),
        ({"x-claude-code-session-id": "c", "x-claude-code-agent-id": "7"}, "c/7", "c"),
        ({"x-session-affinity": "d", "x-parent-session-affinity": "e"}, "d", "e"),
        ({"x-session-id": "a", "x-parent-session-id": "p", "thread-id": "t"}, "a", "p"),
    ],
)
async def test_whatever_a_client_calls_its_session_the_proxy_knows_it(headers, session, parent):
    got = (await ask(echo, headers=headers)).json()
    assert got["x-session-id"] == session
    assert got.get("x-parent-session-id") == parent
    assert REQUESTS.get(got["x-request-id"]) == Asked(0, parent, caller_of({}, "127.0.0.1"))


async def test_what_is_remembered_of_a_caller_is_bounded():
    headers = {"authorization": "Bearer " + "k" * 10_000, "x-cache-salt": "s" * 10_000}
    caller = REQUESTS.get((await ask(echo, headers=headers)).json()["x-request-id"]).caller
    assert len(caller.by_key) < 100
    assert len(caller.without_key) < 200
    assert caller_of({"x-cache-salt": "s" * MAX_SALT}, "") != caller


async def test_a_request_without_a_session_gets_none():
    assert "x-session-id" not in (await ask(echo)).json()


async def test_a_name_that_cannot_be_is_left_to_the_replica():
    got = (await ask(echo, headers={"x-dynamo-session-id": "x" * 300})).json()
    assert "x-session-id" not in got


@pytest.mark.parametrize("path", ["/v1/sessions/a%2Fb", "/v1/sessions/a%2Fb/fork", "/v1/sessions/a%2Fb/replace_tail"])
async def test_calls_about_a_session_go_where_it_is(path):
    assert (await ask(echo, path)).json()["x-session-id"] == "a/b"


async def test_a_request_keeps_its_id_and_its_size_is_known():
    got = (await ask(echo, headers={"x-request-id": "mine"}, content=b"x" * 4000)).json()
    assert got["x-request-id"] == "mine"
    assert REQUESTS.get("mine").tokens == 1000


async def test_the_proxy_knows_whose_session_it_is():
    """By the key, or where none counts by the salt or the address; without any keys in its memory."""
    key = "a-long-random-key"
    await ask(echo, headers={"x-request-id": "1", "authorization": f"Bearer {key}", "x-cache-salt": "mine"})
    caller = REQUESTS.get("1").caller
    assert caller.owner(True) == Keys([key]).tenant(key, "127.0.0.1").owner
    assert caller.owner(False) == Keys().tenant(key, "127.0.0.1", "mine").owner
    assert key not in repr(REQUESTS.get("1"))
    await ask(echo, headers={"x-request-id": "2"})
    assert REQUESTS.get("2").caller.owner(True) == Keys().tenant(None, "127.0.0.1").owner


async def test_an_id_that_cannot_be_is_replaced():
    got = (await ask(echo, headers={"x-request-id": "no good"})).json()
    assert got["x-request-id"] != "no good"


async def test_a_replica_that_dies_before_it_answers_is_a_503_with_a_hint():
    answer = await ask(silent)
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
    assert answer.json()["error"]["message"] == GONE + SEND_AGAIN


async def test_anthropics_clients_are_told_in_their_words():
    answer = await ask(silent, "/v1/messages")
    assert (answer.status_code, answer.json()["error"]["type"]) == (529, "overloaded_error")


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/messages"])
async def test_a_stream_that_is_cut_ends_with_an_error(path):
    answer = await ask(cut(b"data: 1\n\n"), path)
    first, last = answer.text.strip().split("\n\n")
    assert first == "data: 1"
    assert json.loads(last.partition("data: ")[2])["error"]["message"] == GONE + SEND_AGAIN
    assert last.startswith("event: error\n") == (path == "/v1/messages")


async def test_a_body_that_is_no_stream_of_events_gets_none():
    assert (await ask(cut(b"[1, ", kind="application/json"))).text == "[1, "


async def test_an_answer_that_is_whole_is_not_touched():
    async def app(scope, receive, send):
        await JSONResponse({"error": 1}, 500)(scope, receive, send)

    answer = await ask(app)
    assert (answer.status_code, answer.json()) == (500, {"error": 1})


async def where(scope, receive, send):
    """An app that tells which path it has got."""
    await JSONResponse([scope["path"], scope["raw_path"].decode()])(scope, receive, send)


@pytest.mark.parametrize(
    ("path", "got"),
    [
        ("/v1/models", "/next/v1/models"),
        ("/next/v1/models", "/next/v1/models"),
        ("/-/healthz", "/-/healthz"),
    ],
)
async def test_a_version_takes_its_share(monkeypatch, path, got):
    splits = Splits()
    splits.put("next", Split(1.0, "/next"))
    monkeypatch.setattr(proxies, "SPLITS", splits)
    assert (await ask(where, path)).json() == [got, got]


async def test_tenants_whose_sessions_have_one_name_are_split_one_by_one(monkeypatch):
    splits = Splits()
    splits.put("next", Split(0.5, "/next"))
    monkeypatch.setattr(proxies, "SPLITS", splits)

    async def path_of(key):
        headers = {"x-session-id": "main", "authorization": f"Bearer {key}"}
        return (await ask(where, "/v1/models", headers=headers)).json()[0]

    paths = [await path_of(f"key-{i}") for i in range(40)]
    assert 5 < paths.count("/next/v1/models") < 35
    assert [await path_of(f"key-{i}") for i in range(40)] == paths


async def test_a_version_that_dies_is_told_of_in_the_words_of_its_api():
    assert (await ask(silent, "/next/v1/messages")).status_code == 529


async def test_what_is_no_request_passes():
    seen = []

    async def app(scope, receive, send):
        seen.append(scope["type"])

    await Front(app)({"type": "lifespan"}, None, None)
    assert seen == ["lifespan"]


def test_only_the_latest_requests_are_remembered():
    requests = Requests(most=2)
    for name in "abac":
        requests.put(name, Asked(ord(name)))
    assert [requests.get(name) for name in "abc"] == [Asked(97), None, Asked(99)]


def test_serve_gets_the_middleware_by_this_name():
    assert [str(each.cls) for each in middlewares()] == [str(Front)]
