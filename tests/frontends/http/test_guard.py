"""Before every route: keys, bounds, clients that are slow or vanish, and load that does not shut out health."""

import asyncio
import contextlib
import socket

import pytest
from support.engines import break_loop, held, settled, until
from support.http_server import MODEL, serving
from support.stub import stub_engine

from astraea_jax.errors import StartupError
from astraea_jax.frontends.http.connections import ConnectionLimits
from astraea_jax.frontends.http.guard import Bounds
from astraea_jax.frontends.http.tenants import Keys
from astraea_jax.frontends.http.waiting import Limits

KEY, ADMIN = "key-of-a-tenant", "key-of-the-admin"
CHAT = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4, "ignore_eos": True}
PATH = "/v1/chat/completions"
POST = "POST {path} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n{more}\r\n"


async def exchange(port: int, sent: bytes) -> bytes:
    """All that the server answers until it hangs up."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    with contextlib.suppress(ConnectionError):
        writer.write(sent)
        await writer.drain()
    try:
        return await reader.read()
    except ConnectionError:
        return b""
    finally:
        writer.close()


async def test_every_route_but_health_needs_the_key(chatty):
    async with serving(chatty, keys=Keys([KEY], [ADMIN])) as server:
        paths = [(path, method) for path, each in server.app.app.openapi()["paths"].items() for method in each]
        for path, method in [*paths, ("/openapi.json", "get"), ("/nowhere", "get")]:
            answer = await server.client.request(method, path)
            assert (answer.status_code in (200, 503)) == (path in ("/health", "/ready", "/status")), path
            assert answer.status_code in (200, 401, 503)
        for headers in ({"authorization": f"Bearer {KEY}"}, {"x-api-key": KEY}, {"x-api-key": ADMIN}):
            assert (await server.client.get("/v1/models", headers=headers)).status_code == 200
        for key in ("", "wrong-key", KEY[:-1], KEY + "x", "\xe9" * 20):
            answer = await server.client.get("/v1/models", headers={b"x-api-key": key.encode("latin-1")})
            assert answer.status_code == 401
            assert answer.json()["error"]["code"] == "invalid_api_key"


def test_keys_and_tenants():
    keys = Keys([KEY], [ADMIN])
    assert keys.tenant(KEY, "1.2.3.4") == keys.tenant(KEY, "5.6.7.8")
    assert keys.tenant(KEY, "", "salt").owner == keys.tenant(KEY, "").owner
    assert keys.tenant(KEY, "", "salt").salt != keys.tenant(KEY, "").salt
    assert keys.tenant(ADMIN, "").admin
    assert KEY not in str(keys.tenant(KEY, ""))
    open_door = Keys()
    assert open_door.tenant(None, "1.2.3.4").owner != open_door.tenant(None, "5.6.7.8").owner
    assert open_door.tenant(None, "1.2.3.4", "s") == open_door.tenant(None, "5.6.7.8", "s")


def test_keys_come_from_files(tmp_path):
    (tmp_path / "keys").write_text(f"# of the team\n{KEY}\n\nanother-long-key\n")
    keys = Keys.of([f"@{tmp_path / 'keys'}"], [])
    assert keys.tenant("another-long-key", "").owner != keys.tenant(KEY, "").owner
    for wrong in (["short"], [f"@{tmp_path / 'nothing'}"]):
        with pytest.raises(StartupError):
            Keys.of(wrong, [])
    with pytest.raises(StartupError):
        Keys.of([KEY], [KEY])


async def test_what_is_written_is_sent_at_once(chatty):
    async with serving(chatty) as server:
        assert (await server.client.get("/health")).status_code == 200
        [connection] = server.server._server.server_state.connections
        sock = connection.transport.get_extra_info("socket")
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"", 400),
        (b"{", 400),
        (b"[]", 400),
        (b"[" * 100_000, 400),
        (b'{"messages": "\xff"}', 400),
        (b'{"messages": [{"role": "user", "content": "\\ud800"}]}', 400),
        (b'{"temperature": NaN, "messages": [{"role": "user", "content": "a"}]}', 400),
        (b" " * 300_000, 413),
    ],
    ids=lambda value: str(value)[:24],
)
async def test_bodies_that_cannot_be_read(chatty, body, status):
    async with serving(chatty, bounds=Bounds(body_bytes=200_000)) as server:
        headers = {"content-type": "application/json", "x-request-id": "mine-1"}
        for path in (PATH, "/v1/completions", "/tokenize"):
            answer = await server.client.post(path, content=body, headers=headers)
            assert answer.status_code == status
            assert answer.json()["error"]["message"]
            assert answer.headers["x-request-id"] == "mine-1"

        async def chunks():
            yield body

        assert (await server.client.post(PATH, content=chunks(), headers=headers)).status_code == status


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (b"", b" 408 "),
        (b"GET /health HT", b" 408 "),
        (b"GET /health HTTP/1.1\r\nhost: x\r\n", b" 408 "),
        (POST.format(path=PATH, more="content-length: 100\r\n").encode() + b'{"mess', b" 408 "),
        (POST.format(path=PATH, more="transfer-encoding: chunked\r\n").encode() + b"5\r\n{", b" 408 "),
        (b"GET /" + b"a" * 40_000 + b" HTTP/1.1\r\n\r\n", b" 431 "),
        (b"GET / HTTP/1.1\r\nx: " + b"a" * 40_000, b" 431 "),
        (b"GET / HTTP/1.1\r\n" + b"x: y\r\n" * 10_000 + b"\r\n", b" 431 "),
        (b"\x16\x03\x01\x02\x00\x01", b" 400 "),
        (POST.format(path=PATH, more="content-length: -5\r\n").encode(), b" 400 "),
        (b"GET /v1/models\xff HTTP/1.1\r\nhost: x\r\n\r\n", b" 400 "),
    ],
    ids=lambda value: str(value)[:40],
)
async def test_half_sent_and_broken_requests_are_answered(chatty, sent, status):
    """A client that is slow, too; to whoever is not, a slow machine is no cause to say so."""
    limit_s = 0.2 if status == b" 408 " else 600.0
    async with serving(chatty, bounds=Bounds(body_s=limit_s), connections=ConnectionLimits(head_s=limit_s)) as server:
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        writer.write(sent)
        answer = b""
        with contextlib.suppress(ConnectionError):
            answer = await reader.readuntil(b"\r\n\r\n")
        writer.close()
        assert status in answer.split(b"\r\n")[0]
    await settled(chatty)


@pytest.mark.parametrize(
    ("path", "overloaded", "draining"),
    [
        (PATH, ("rate_limit_error", 429), ("server_error", 503)),
        ("/v1/messages", ("rate_limit_error", 429), ("overloaded_error", 529)),
        ("/v1/messages/count_tokens", ("rate_limit_error", 429), None),
    ],
)
async def test_each_api_says_come_again_in_its_own_words(chatty, path, overloaded, draining):
    async with serving(chatty, limits=Limits(choices=1)) as server:
        body = {"model": MODEL, **CHAT}
        server.door.waiting.enter("", 1)
        refused = [(await server.client.post(path, json=body), overloaded)]
        server.door.waiting.leave("", 1, 0)
        server.door.draining = True
        if draining:
            refused.append((await server.client.post(path, json=body), draining))
        for answer, expected in refused:
            assert (answer.json()["error"]["type"], answer.status_code) == expected
            assert int(answer.headers["retry-after"]) >= 1


async def test_one_address_cannot_take_all_connections(chatty):
    async with serving(chatty, connections=ConnectionLimits(per_address=4)) as server:
        idle = [await asyncio.open_connection("127.0.0.1", server.port) for _ in range(4)]
        assert b" 503 " in await exchange(server.port, b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n")
        for _, writer in idle:
            writer.close()
            await writer.wait_closed()
        answer = await exchange(server.port, b"GET /health HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
        assert b" 200 " in answer


async def test_overload_is_refused_before_a_prompt_is_made_and_health_still_answers(chatty):
    async with serving(chatty, limits=Limits(choices=3)) as server:
        with held(chatty, 0):
            taken = [asyncio.create_task(server.client.post(PATH, json=CHAT)) for _ in range(3)]
            await until(lambda: server.door.waiting.choices == 3)
            for more in ({}, {"n": 2}, {"stream": True}):
                refused = await server.client.post(PATH, json={**CHAT, **more})
                assert refused.status_code == 429
                assert int(refused.headers["retry-after"]) >= 1
                assert refused.json()["error"]["type"] == "rate_limit_error"
            assert (await server.client.get("/ready")).status_code == 200
        assert [answer.status_code for answer in await asyncio.gather(*taken)] == [200] * 3
        assert server.door.waiting.choices == 0
    await settled(chatty)


async def test_prompt_tokens_that_wait_are_bounded_times_the_choices(chatty):
    async with serving(chatty, limits=Limits(tokens=100)) as server:
        with held(chatty, 0):
            first = asyncio.create_task(server.client.post(PATH, json=CHAT))
            await until(lambda: server.door.waiting.tokens)
            assert (await server.client.post(PATH, json={**CHAT, "n": 60})).status_code == 429
        assert (await first).status_code == 200
    await settled(chatty)


async def test_who_waits_too_long_is_told_to_come_again(chatty):
    async with serving(chatty, limits=Limits(wait_s=0.05)) as server:
        with held(chatty, 0):
            for stream in (False, True):
                answer = await server.client.post(PATH, json={**CHAT, "stream": stream})
                assert answer.status_code == 429
    await settled(chatty)


async def test_a_server_that_stops_finishes_what_runs_and_refuses_what_comes(chatty):
    async with serving(chatty) as server:
        with held(chatty, 1) as engine:
            running = asyncio.create_task(server.client.post(PATH, json=CHAT))
            await engine.still()
            stopping = asyncio.create_task(server.server.stop(60))
            await until(lambda: server.door.draining)
            assert (await server.client.post(PATH, json=CHAT)).status_code == 503
            assert (await server.client.get("/ready")).status_code == 503
            assert (await server.client.get("/health")).status_code == 200
        assert (await running).status_code == 200
        assert await stopping == 0
    await settled(chatty)


async def test_what_the_end_of_a_server_cuts_is_counted_and_told(chatty):
    async with serving(chatty) as server:
        with held(chatty, 1) as engine:
            running = asyncio.create_task(server.client.post(PATH, json=CHAT))
            await engine.still()
            assert await server.server.stop(0) == 1
            assert (await running).status_code == 503
    await settled(chatty)


@pytest.mark.parametrize(
    ("path", "body", "event"),
    [
        (PATH, CHAT, b'data: {"error":{'),
        ("/v1/completions", {"prompt": "Hello", "ignore_eos": True}, b'data: {"error":{'),
        ("/v1/messages", {"model": MODEL, "messages": CHAT["messages"]}, b"event: error\n"),
        ("/v1/responses", {"model": MODEL, "input": "Hello"}, b"event: response.failed\n"),
    ],
)
async def test_a_stream_that_the_end_of_a_server_cuts_is_told(chatty, path, body, event):
    many = {"max_output_tokens": 400} if "input" in body else {"max_tokens": 400}
    async with serving(chatty) as server:
        with held(chatty, 3) as engine:
            async with server.client.stream("POST", path, json={**body, **many, "stream": True}) as answer:
                await engine.still()
                assert await server.server.stop(0) == 1
                received = await answer.aread()
    assert event in received
    assert b"the server was shut down" in received
    await settled(chatty)


async def test_an_engine_that_dies_answers_everybody_at_once():
    engine, runner = stub_engine()
    engine.start()
    runner.go.clear()
    async with serving(engine) as server:
        body = {"prompt": [1, 2, 3], "max_tokens": 20, "ignore_eos": True}
        running = [
            asyncio.create_task(server.client.post("/v1/completions", json={**body, "stream": stream}))
            for stream in (False, True)
        ]
        await until(lambda: engine.in_progress == 2)
        break_loop(engine, ZeroDivisionError("a secret"))
        runner.go.set()
        for answer in await asyncio.gather(*running):
            assert answer.status_code == 503 or b'"code":"not_serving"' in answer.content
            assert b"a secret" not in answer.content
        late = await server.client.post("/v1/completions", json=body)
        assert (late.status_code, "retry-after" in late.headers) == (503, True)
        assert (await server.client.get("/health")).status_code == 503
        assert (await server.client.get("/metrics")).status_code == 200
