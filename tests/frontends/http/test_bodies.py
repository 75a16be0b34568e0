"""Bodies: counted before they are parsed, read off the event loop if long, and refused if they are not JSON."""

import asyncio
import json
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.engines import settled, until
from support.http_server import MODEL, serving

from astraea_jax.engine.encoding import TextPool
from astraea_jax.frontends.http import bodies
from astraea_jax.frontends.http.bodies import LONG_BODY, MAX_VALUES, has_more_values

PATH = "/v1/chat/completions"
HI = {"role": "user", "content": "Hi"}
CHAT = {"messages": [HI], "max_tokens": 1}
JSON = {"content-type": "application/json"}
LONG = json.dumps({**CHAT, "user": "x" * LONG_BODY}).encode()

text = st.text(st.sampled_from('a"\\[]{},:\n\u00e9') | st.characters(codec="utf-8"), max_size=8)
value = st.recursive(
    st.none() | st.booleans() | st.integers() | text,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(text, inner, max_size=4),
    max_leaves=20,
)


def counted(data: object) -> int:
    """Texts, names, lists and objects."""
    if isinstance(data, dict):
        return 1 + len(data) + sum(map(counted, data.values()))
    if isinstance(data, list):
        return 1 + sum(map(counted, data))
    return isinstance(data, str)


@given(value, st.booleans(), st.none() | st.integers(0, 2))
def test_values_are_counted_whatever_stands_in_texts(data, ascii_only, indent):
    body = json.dumps(data, ensure_ascii=ascii_only, indent=indent).encode()
    assert not has_more_values(body, counted(data))
    assert has_more_values(body, counted(data) - 1) or not counted(data)


@given(st.binary(), st.integers(0, 4))
def test_what_is_not_json_is_counted_without_harm(body, most):
    assert has_more_values(body, most) in (True, False)


def many_messages(count: int) -> list[dict[str, object]]:
    """A long program of an honest agent: each message calls a tool or has its result in parts."""
    function = {"name": "search", "arguments": "{}"}
    called = {"role": "assistant", "content": "", "tool_calls": [{"id": "c", "type": "function", "function": function}]}
    found = {"role": "tool", "tool_call_id": "c", "content": [{"type": "text", "text": "x"}]}
    return [called, found] * (count // 2)


def tools(count: int, properties: int) -> list[dict[str, object]]:
    each = {f"p{i}": {"type": "string", "description": "what it is"} for i in range(properties)}
    return [{"type": "function", "function": {"name": "f", "parameters": {"properties": each}}}] * count


@pytest.mark.parametrize(
    "data",
    [
        {"messages": many_messages(10_000), "tools": tools(128, 30)},
        {"messages": [HI], "tools": tools(1000, 30)},
        {"prompt": [1] * 1_000_000},
        {"messages": [{"role": "user", "content": '"[{,' * 500_000}]},
    ],
    ids=["messages", "tools", "token ids", "text"],
)
def test_no_honest_body_has_too_many_values(data):
    assert not has_more_values(json.dumps(data).encode(), MAX_VALUES)


@pytest.mark.parametrize(
    "filler",
    [
        {f"{i:06x}": 1 for i in range(350_000)},
        [""] * 350_000,
        [[]] * 350_000,
        [{}] * 350_000,
    ],
    ids=["names", "texts", "lists", "objects"],
)
@pytest.mark.parametrize("path", [PATH, "/v1/messages", "/tokenize"])
async def test_a_body_of_too_many_values_is_refused_before_it_is_parsed(chatty, monkeypatch, path, filler):
    monkeypatch.setattr(bodies.pydantic_core, "from_json", None)
    async with serving(chatty) as server:
        answer = await server.client.post(path, content=json.dumps({"x": filler}, separators=(",", ":")), headers=JSON)
    assert (answer.status_code, str(MAX_VALUES) in answer.text) == (413, True)


@pytest.fixture
def held_reader(monkeypatch):
    """Lets bodies be parsed once it is set; notes the threads that have begun."""
    may, threads, read = threading.Event(), [], bodies._read

    def waits(*arguments):
        threads.append(threading.current_thread())
        assert may.wait(60)
        return read(*arguments)

    monkeypatch.setattr(bodies, "_read", waits)
    yield may, threads
    may.set()


async def test_others_are_answered_while_a_long_body_is_read(chatty, held_reader):
    may, threads = held_reader
    async with serving(chatty) as server:
        reading = asyncio.create_task(server.client.post(PATH, content=LONG, headers=JSON))
        await until(lambda: threads)
        assert threads[0] is not threading.current_thread()  # whose is the event loop
        for path in ("/health", "/ready", "/v1/models"):
            assert (await server.client.get(path)).status_code == 200
        may.set()
        assert (await reading).status_code == 200
    await settled(chatty)


async def test_clients_that_vanish_leave_the_pool_free(chatty, held_reader, monkeypatch):
    may, threads = held_reader
    monkeypatch.setattr(bodies, "BODIES", pool := TextPool(threads=1))
    async with serving(chatty) as server:
        tasks = [asyncio.create_task(server.client.post(PATH, content=LONG, headers=JSON)) for _ in range(3)]
        await until(lambda: pool._waiting.total == 3 * len(LONG))
        for task in tasks:
            task.cancel()
        await until(lambda: pool._waiting.total == len(LONG))  # the one that a thread has begun with
        may.set()
        await until(lambda: not pool._waiting)
        assert len(threads) == 1
    await settled(chatty)


async def test_bodies_that_wait_are_bounded(chatty, held_reader, monkeypatch):
    may, threads = held_reader
    monkeypatch.setattr(bodies, "BODIES", TextPool(threads=1, max_waiting=2 * len(LONG)))
    async with serving(chatty) as server:
        first = asyncio.create_task(server.client.post(PATH, content=LONG, headers=JSON))
        await until(lambda: threads)
        refused = await server.client.post(PATH, content=LONG, headers=JSON)
        assert (refused.status_code, int(refused.headers["retry-after"]) >= 1) == (429, True)
        may.set()
        assert (await first).status_code == 200
    await settled(chatty)


@pytest.mark.parametrize("size", [0, LONG_BODY])
async def test_long_bodies_are_checked_as_short_ones_are(chatty, size):
    async with serving(chatty) as server:
        wrong = {**CHAT, "temperature": 3, "user": "x" * size}
        answer = await server.client.post(PATH, json=wrong)
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "temperature")
        answer = await server.client.post(PATH, content=json.dumps(wrong)[:-1], headers=JSON)
        assert answer.status_code == 400
        assert "not valid JSON: EOF while parsing an object" in answer.json()["error"]["message"]
        answer = await server.client.post(PATH, json={**CHAT, "user": "x" * size})
        assert answer.json()["model"] == MODEL
    await settled(chatty)


@pytest.mark.parametrize(
    "content_type",
    ["application/x-www-form-urlencoded", "text/plain", "text/plain;application/json", "json", "", "application/jsonl"],
)
@pytest.mark.parametrize("path", [PATH, "/v1/completions", "/v1/messages", "/v1/responses", "/tokenize"])
async def test_a_body_that_is_not_called_json_is_told_so(chatty, path, content_type):
    async with serving(chatty) as server:
        headers = {"content-type": content_type} if content_type else {}
        answer = await server.client.post(path, content=json.dumps(CHAT).encode(), headers=headers)
        message = answer.json()["error"]["message"]
        assert answer.status_code == 415
        assert "content-type must be application/json" in message
        assert repr(content_type) in message or not content_type


@pytest.mark.parametrize("content_type", ["application/json; charset=utf-8", "APPLICATION/JSON", "application/x+json"])
async def test_kinds_of_json(chatty, content_type):
    async with serving(chatty) as server:
        answer = await server.client.post(PATH, content=json.dumps(CHAT), headers={"content-type": content_type})
        assert answer.status_code == 200
    await settled(chatty)


async def test_an_empty_body_is_told_so(chatty):
    async with serving(chatty) as server:
        answer = await server.client.post(PATH)
        assert (answer.status_code, "empty" in answer.json()["error"]["message"]) == (400, True)
