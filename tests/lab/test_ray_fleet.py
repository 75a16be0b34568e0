"""Agents that send failed requests again, in front of servers that fail."""

from __future__ import annotations

import json

import httpx
import pytest

from astraea_jax.engine.generation import Delta
from astraea_jax.errors import EngineDead, RequestError
from astraea_jax.lab import http_agents
from astraea_jax.lab.http_agents import run_http_agent

ANSWER = [
    {"choices": [{"finish_reason": "stop", "delta": {"content": "42"}}]},
    {
        "choices": [],
        "usage": {"prompt_tokens": 3, "completion_tokens": 1, "prompt_tokens_details": {"cached_tokens": 0}},
    },
]
ERROR = [{"choices": [{"finish_reason": None, "delta": {"content": "4"}}]}, {"error": {"message": "gone"}}]


def server(*answers):
    """A server that gives these answers, one after the other: a status, or the events of a stream."""
    left = list(answers)

    def answer(request):
        now = left.pop(0)
        if isinstance(now, int):
            return httpx.Response(now)
        return httpx.Response(200, text="".join(f"data: {json.dumps(event)}\n\n" for event in now))

    return httpx.AsyncClient(transport=httpx.MockTransport(answer), base_url="http://server/v1/")


@pytest.fixture(autouse=True)
def at_once(monkeypatch):
    monkeypatch.setattr(http_agents, "AGAIN_S", 0.0)


@pytest.mark.parametrize("failure", [503, 500, 429, ERROR])
async def test_a_request_that_fails_is_sent_again_with_its_whole_history(failure):
    async with server(failure, failure, ANSWER) as client:
        result = await run_http_agent(client, [{"role": "user", "content": "?"}], [], attempts=3)
    assert result.text == "42"


@pytest.mark.parametrize(("answers", "attempts"), [([503, 503], 2), ([400, ANSWER], 5), ([503], 1), ([ERROR], 1)])
async def test_it_is_not_sent_more_often_nor_if_it_is_at_fault_itself(answers, attempts):
    async with server(*answers) as client:
        with pytest.raises(httpx.HTTPError):
            await run_http_agent(client, [{"role": "user", "content": "?"}], [], attempts=attempts)


class Stream:
    """A stream that breaks off in its middle, or not."""

    usage = None

    def __init__(self, error):
        self._error = error

    async def __aiter__(self):
        yield Delta("4", (4,))
        if self._error is not None:
            raise self._error
        yield Delta("2", (2,), "stop")


async def seen(streams, attempts):
    ray_fleet = pytest.importorskip("astraea_jax.lab.ray_fleet", reason="needs the [ray] extra", exc_type=ImportError)
    left = iter(streams)
    return "".join([delta.text async for delta in ray_fleet.Insisted(lambda: next(left), attempts)])


async def test_of_a_stream_that_breaks_off_nothing_is_seen_twice():
    assert await seen([Stream(EngineDead("gone")), Stream(None)], attempts=2) == "42"
    assert await seen([Stream(None)], attempts=1) == "42"


@pytest.mark.parametrize(("error", "attempts"), [(EngineDead("gone"), 1), (RequestError("no"), 9)])
async def test_a_stream_that_is_not_sent_again_raises(error, attempts):
    with pytest.raises(type(error)):
        await seen([Stream(error)] * attempts, attempts)
