"""Routes for operators: who sees what, what a hanging engine does to them, and the page as a browser shows it."""

from __future__ import annotations

import asyncio
import json
import re
from contextlib import asynccontextmanager
from dataclasses import replace

import httpx
import pytest
from support.browser import BROWSER, page_of
from support.engines import held, settled, until
from support.http_server import MODEL, serving
from support.stub import stub_engine

from astraea_jax.engine.sampling import SamplingParams
from astraea_jax.frontends import status
from astraea_jax.frontends.http.tenants import Keys
from astraea_jax.frontends.profiling import Profiler
from astraea_jax.scheduler.placement import Report

KEYS = Keys(["first-key", "second-key"], ["the-admin-key"])
PARAMS = SamplingParams(max_tokens=4, ignore_eos=True)
ADMIN = {"authorization": "Bearer the-admin-key"}
FIRST = {"authorization": "Bearer first-key"}


@asynccontextmanager
async def server(keys=None):
    engine, runner = stub_engine()
    await asyncio.to_thread(engine.start)
    try:
        async with serving(engine, keys=keys) as http:
            yield http
    finally:
        runner.go.set()
        engine.shutdown(0)


async def picture(http, headers=()):
    answer = await http.client.get("/status.json", headers=dict(headers))
    assert answer.status_code == 200, answer.text
    return answer.json()


async def run_sessions(http, *owners):
    for number, owner in enumerate(owners):
        await http.door.engine.generate([1, 2, 3], PARAMS, session=f"s{number}", owner=owner).text()
    await settled(http.door.engine)


async def test_metrics_come_as_prometheus_reads_them():
    async with server() as http:
        answer = await http.client.get("/metrics")
        assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
        assert f'astraea:num_requests_running{{model_name="{MODEL}",replica="0"}} 0.0' in answer.text


async def test_routers_read_how_loaded_it_is():
    async with server() as http:
        engine = http.door.engine
        idle = Report.from_fields((await http.client.get("/load")).json())
        assert (idle.pool, idle.free, idle.live, idle.demand, idle.draining) == (48, 48, 0, 0, False)
        await run_sessions(http, "a", "b")
        counted = {name: value for name, value in (await http.client.get("/load")).json().items() if type(value) is int}
        assert {"pool", "free", "live", "running", "waiting", "sessions", "draining"} <= counted.keys()
        waiting = Report.from_fields((await http.client.get("/load")).json())
        assert waiting.live == 4 + 2 * (3 + PARAMS.max_tokens - 4), "both have said the same, a page of which is full"
        assert 0 < waiting.demand < waiting.live, "it fades"
        assert (waiting.sessions, waiting.tool_waits, waiting.retained) == (2, 2, 48 - waiting.free)
        engine.drain()
        assert Report.from_fields((await http.client.get("/load")).json()).draining
        text = (await http.client.get("/metrics")).text
        assert f'astraea:draining{{model_name="{MODEL}",replica="0"}} 1.0' in text
        assert f'astraea:kv_live_tokens{{model_name="{MODEL}",replica="0"}} {waiting.live}.0' in text


@pytest.mark.parametrize("keys", [None, KEYS])
async def test_who_opens_the_server_in_a_browser_is_led_to_the_status_page(keys):
    async with server(keys) as http:
        answer = await http.client.get("/", headers={"accept": "text/html"})
        assert (answer.status_code, answer.headers["location"]) == (307, "/status")
        assert (await http.client.get("/", follow_redirects=True)).headers["content-type"].startswith("text/html")


@pytest.mark.parametrize("path", ["/metrics", "/load", "/status.json", "/start_profile", "/stop_profile"])
async def test_what_says_something_needs_a_key(path):
    async with server(KEYS) as http:
        method = http.client.post if "profile" in path else http.client.get
        assert (await method(path)).status_code == 401
        assert (await method(path, headers={"authorization": "Bearer wrong-key"})).status_code == 401
        if "profile" in path:
            assert (await method(path, headers=FIRST)).status_code == 401
        assert (await http.client.get("/status")).status_code == 200


async def test_without_keys_nobody_takes_profiles():
    async with server() as http:
        assert (await http.client.post("/start_profile")).status_code == 401


async def test_a_key_sees_its_own_programs_and_the_admin_all():
    async with server(KEYS) as http:
        first, second = (KEYS.tenant(key, "").owner for key in ("first-key", "second-key"))
        await run_sessions(http, first, second, second)
        own, every = await picture(http, FIRST), await picture(http, ADMIN)
        assert [program["name"] for program in own["programs"]] == ["s0"]
        assert not own["everybody"]
        assert own["live_programs"] == 3
        assert {program["name"] for program in every["programs"]} == {"s0", "s1", "s2"}
        assert every["everybody"]


async def test_without_keys_names_are_their_owners():
    async with server() as http:
        mine = http.app.app.state.keys.tenant(None, "127.0.0.1").owner
        await run_sessions(http, mine, "somebody")
        assert {program["name"] for program in (await picture(http))["programs"]} == {"s0", None}


async def test_numbers_and_programs_of_one_moment():
    async with server() as http:
        with held(http.door.engine, 3):
            generation = http.door.engine.generate([1, 2, 3], SamplingParams(max_tokens=20, ignore_eos=True))
            await anext(generation)
            await until(lambda: http.door.engine.stats().running)
        seen = await picture(http)
        assert (seen["model"], seen["state"]) == (MODEL, "serving")
        [replica] = seen["replicas"]
        pages = sum(replica["device_pages"].values())
        assert pages == http.door.engine.layout.num_pages - 1
        for program in seen["programs"]:
            assert program["state"] in ("queued", "restoring", "prefill", "decode", "tool_wait", "human_wait")
            assert program["residency"] in ("device", "both", "host", "nowhere")


async def test_programs_shown_are_bounded(monkeypatch):
    monkeypatch.setattr(status, "SHOWN", 2)
    async with server() as http:
        await run_sessions(http, *["somebody"] * 5)
        seen = await picture(http)
        assert (len(seen["programs"]), seen["live_programs"]) == (2, 5)


async def test_who_asks_often_costs_the_loop_little(monkeypatch):
    monkeypatch.setattr(status, "FRESH_S", 1000.0)
    async with server() as http:
        looked, look = [], http.door.engine.look
        monkeypatch.setattr(http.door.engine, "look", lambda *arguments: looked.append(1) or look(*arguments))
        await asyncio.gather(*[picture(http) for _ in range(20)])
        assert len(looked) == 1


async def test_an_engine_that_hangs_is_seen_to_hang(monkeypatch):
    """And the picture that nobody waits for any more does it no harm."""
    monkeypatch.setattr(status, "ANSWER_S", 0.01)
    monkeypatch.setattr(status, "FRESH_S", 0.0)
    async with server() as http:
        with held(http.door.engine, 0) as control:
            generation = http.door.engine.generate([1, 2, 3], PARAMS)
            await control.still()
            seen = await picture(http)
            assert (seen["state"], seen["programs"]) == ("serving", None)
            assert (await http.client.get("/health")).status_code == 200
            assert (await http.client.get("/metrics")).status_code == 200
        await generation.text()
        await settled(http.door.engine)
        monkeypatch.setattr(status, "ANSWER_S", 60.0)
        assert (await picture(http))["programs"] is not None


async def test_an_engine_that_has_ended_says_so():
    async with server() as http:
        http.door.engine.shutdown(0)
        seen = await picture(http)
        assert (seen["state"], seen["programs"]) == ("dead", [])
        assert (await http.client.get("/health")).status_code == 503


async def test_profiles_are_written_one_at_a_time(tmp_path, monkeypatch):
    async with server(KEYS) as http:
        refused = await http.client.post("/start_profile", headers=ADMIN)
        assert (refused.status_code, "--profile_dir" in refused.text) == (400, True)
        state = http.app.app.state
        state.operator = replace(state.operator, profiler=Profiler(str(tmp_path)))
        assert (await http.client.post("/stop_profile", headers=ADMIN)).status_code == 400
        assert (await http.client.post("/start_profile", headers=ADMIN)).json() == {"folder": str(tmp_path)}
        assert (await http.client.post("/start_profile", headers=ADMIN)).status_code == 400
        assert (await http.client.post("/stop_profile", headers=ADMIN)).status_code == 200
        assert list(tmp_path.rglob("*.xplane.pb"))


async def test_a_profile_ends_by_itself(tmp_path):
    profiler = Profiler(str(tmp_path), most_s=0.01)
    await profiler.start()
    await until(lambda: list(tmp_path.rglob("*.xplane.pb")))
    await until(lambda: profiler._limit is None)


@pytest.mark.parametrize("more", [(), ("--admin_key=the-admin-key", "--nohttp"), ("--api_key=first-key",)])
def test_profiles_that_nobody_could_take_are_refused_at_the_start(serve_fails, random_folder, tmp_path, more):
    said = serve_fails(f"--model={random_folder}", f"--profile_dir={tmp_path / 'profiles'}", *more)
    assert "--profile_dir needs --admin_key" in said


def test_the_page_asks_nobody_else():
    """Or else it does not work where there is no network, and tells others who looks at it."""
    from astraea_jax.frontends.http.operations import PAGE, PAGE_HEADERS

    assert not re.search(r"(src|href)=|https?://|@import|url\(", PAGE)
    assert "default-src 'none'" in PAGE_HEADERS["content-security-policy"]
    assert "innerHTML" not in PAGE


needs_browser = pytest.mark.skipif(BROWSER is None, reason="there is no Chromium here")


@needs_browser
async def test_a_browser_shows_programs_pools_and_states():
    async with server() as http:
        mine = http.app.app.state.keys.tenant(None, "127.0.0.1").owner
        await http.door.engine.generate([1, 2, 3], PARAMS, session="<b>bold</b>", owner=mine).text()
        await run_sessions(http, "somebody")
        page = await page_of(f"{http.url}/status")
        assert 'class="badge serving"' in page
        assert "&lt;b&gt;bold&lt;/b&gt;" in page  # text, not an element
        assert "<b>bold</b>" not in page
        assert re.search(r'<span class="state tool_wait"[^>]*style="left: [\d.]+%; width: [\d.]+%', page)
        assert re.search(r'<span class="kv device"[^>]*style="left', page)
        assert re.search(r"\d+ of 12 pages", page)
        assert "2 live" in page


@needs_browser
async def test_a_browser_asks_for_the_key():
    async with server(KEYS) as http:
        page = await page_of(f"{http.url}/status", until_ms=1500)
        assert re.search(r'<form id="ask">', page)
        assert re.search(r'<main hidden="">', page)


def test_the_flags_of_a_server_reach_its_operator(serve, tmp_path):
    """Metrics under another prefix, the access log as JSON, the folder for profiles, and where the status page is."""
    flags = (
        *("--http", "--http_port=0", "--metrics_prefix=vllm:", "--log_format=json", "--access_log"),
        *(f"--profile_dir={tmp_path / 'profiles'}", "--admin_key=the-admin-key"),
    )
    with serve(*flags) as server:
        [url] = re.findall(r"status page: (\S+)/status", server.said)
        assert "vllm:num_requests_running" in httpx.get(f"{url}/metrics").text
        started = httpx.post(f"{url}/start_profile", headers={**ADMIN, "x-request-id": "mine"})
        assert started.json() == {"folder": str(tmp_path / "profiles")}
        while '"mine"' not in (line := server.process.stderr.readline()):
            assert line
        assert json.loads(line)["path"] == "/start_profile"
