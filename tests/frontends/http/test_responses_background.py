"""OpenAI's own client and responses that go on in the background."""

from __future__ import annotations

import asyncio
from typing import Any

import openai
import pytest
from openai import AsyncOpenAI
from support.engines import held, settled, until
from support.http_server import MODEL, serving

from astraea_jax.errors import Overloaded
from astraea_jax.frontends.http.guard import Bounds
from astraea_jax.frontends.http.responses_background import BackgroundLimits
from astraea_jax.frontends.http.tenants import Keys

HELLO: dict[str, Any] = {"model": MODEL, "input": "Hello", "temperature": 0, "max_output_tokens": 8}
BACK: dict[str, Any] = {**HELLO, "background": True}
ENDED = ("completed", "incomplete", "failed", "cancelled")


@pytest.fixture
async def server(engine):
    async with serving(engine, bounds=Bounds(start_s=0.0, ping_s=0.01)) as server:
        yield server


@pytest.fixture
async def client(server):
    async with AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


async def ended(client: AsyncOpenAI, id: str):
    """Poll a response as OpenAI's guide does."""
    while (response := await client.responses.retrieve(id)).status not in ENDED:
        await asyncio.sleep(0.002)
    return response


async def test_a_response_goes_on_without_its_client(client, engine):
    whole = await client.responses.create(**HELLO)
    with held(engine, 3) as still:
        first = await client.responses.create(**BACK)
        assert (first.status, first.background, first.output) == ("queued", True, [])
        await still.still()
        while (now := await client.responses.retrieve(first.id)).status == "queued":
            await asyncio.sleep(0.002)
        assert now.status == "in_progress"
        with pytest.raises(openai.BadRequestError, match="still being written"):
            await client.responses.create(**HELLO, previous_response_id=first.id)
    last = await ended(client, first.id)
    assert (last.status, last.output_text, last.usage.output_tokens) == ("incomplete", whole.output_text, 8)
    after = await client.responses.create(**HELLO, previous_response_id=first.id)
    assert after.usage.input_tokens > last.usage.total_tokens
    await settled(engine)


async def test_a_stream_that_breaks_off_is_taken_up_again(client, engine):
    with held(engine, 3) as still:
        stream = await client.responses.create(**BACK, stream=True)
        seen = [await anext(stream) for _ in range(3)]
        assert [event.type for event in seen[:2]] == ["response.created", "response.queued"]
        id, after = seen[0].response.id, seen[-1].sequence_number
        await stream.close()
        await still.still()
        again = await client.responses.retrieve(id, stream=True, starting_after=after)
        still.more(100)
        rest = [event async for event in again]
    events = [*seen, *rest]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert [event.type for event in events].index("response.in_progress") == 2
    assert events[-1].response == await client.responses.retrieve(id)
    replayed = [event async for event in await client.responses.retrieve(id, stream=True)]
    assert replayed == events
    nothing = [event async for event in await client.responses.retrieve(id, stream=True, starting_after=10_000)]
    assert nothing == []
    await settled(engine)


async def test_a_response_is_cancelled_and_says_so(client, server, engine):
    with held(engine, 3) as still:
        stream = await client.responses.create(**BACK, stream=True)
        id = (await anext(stream)).response.id
        await still.still()
        cancelled = await client.responses.cancel(id)
        assert cancelled.status == "cancelled"
        *_, last = [event async for event in stream]
        assert (last.type, last.response.status) == ("response.incomplete", "cancelled")
    assert await client.responses.cancel(id) == cancelled == await client.responses.retrieve(id)
    assert not server.app.running
    await settled(engine)


async def test_one_that_has_ended_stays_as_it_is(client):
    first = await ended(client, (await client.responses.create(**BACK)).id)
    assert await client.responses.cancel(first.id) == first
    foreground = await client.responses.create(**HELLO)
    with pytest.raises(openai.BadRequestError, match="background"):
        await client.responses.cancel(foreground.id)
    with pytest.raises(openai.BadRequestError, match="without stream"):
        await client.responses.retrieve(foreground.id, stream=True)
    for id in ("resp_0", "x" * 300):
        with pytest.raises(openai.NotFoundError):
            await client.responses.cancel(id)


async def test_one_that_is_deleted_ends(client, server, engine):
    with held(engine, 2) as still:
        id = (await client.responses.create(**BACK)).id
        await still.still()
        await client.responses.delete(id)
        with pytest.raises(openai.NotFoundError):
            await client.responses.retrieve(id)
        assert not server.app.running
    await settled(engine)


async def test_nobody_else_sees_cancels_or_deletes_it(engine):
    async with serving(engine, keys=Keys(["first-secret", "second-secret"])) as server:
        mine = AsyncOpenAI(base_url=f"{server.url}/v1", api_key="first-secret", max_retries=0)
        yours = AsyncOpenAI(base_url=f"{server.url}/v1", api_key="second-secret", max_retries=0)
        async with mine, yours:
            with held(engine, 2):
                id = (await mine.responses.create(**BACK)).id
                for call in (
                    yours.responses.retrieve(id),
                    yours.responses.cancel(id),
                    yours.responses.delete(id),
                    yours.responses.retrieve(id, stream=True),
                    yours.responses.input_items.list(id),
                ):
                    with pytest.raises(openai.NotFoundError):
                        await call
                assert (await mine.responses.retrieve(id)).status in ("queued", "in_progress")
            assert (await ended(mine, id)).status == "incomplete"
    await settled(engine)


async def test_what_goes_wrong_in_the_background_is_kept(client, engine):
    named = {"extra_headers": {"x-session-id": "agent"}}
    with held(engine, 3) as still:
        id = (await client.responses.create(**BACK, **named)).id
        await still.still()
        engine.end_session("agent", owner="peer:127.0.0.1")
    response = await ended(client, id)
    assert (response.status, response.error.code) == ("failed", "server_error")
    assert "session was ended" in response.error.message
    with pytest.raises(openai.BadRequestError, match="has failed"):
        await client.responses.create(**HELLO, previous_response_id=id)
    await settled(engine)


async def test_what_is_wrong_with_a_request_has_a_status(client, server):
    for fields in ({"store": False}, {"tool_choice": "required"}, {"input": "x" * 4000}, {"input": []}):
        with pytest.raises(openai.BadRequestError):
            await client.responses.create(**{**BACK, **fields})
    assert not server.app.running


async def test_they_are_bounded_in_number(client, server, engine):
    background = server.app.app.state.background
    background.limits = BackgroundLimits(running=4)
    with held(engine, 1):
        ids = [(await client.responses.create(**BACK)).id for _ in range(2)]
        with pytest.raises(openai.RateLimitError, match="background"):
            await client.responses.create(**BACK)
    for id in ids:
        await ended(client, id)
    await until(lambda: not server.app.running)
    assert (await client.responses.create(**BACK)).status == "queued"
    await settled(engine)


async def test_they_are_bounded_in_time(client, server, engine):
    server.app.app.state.background.limits = BackgroundLimits(run_s=0.05)
    with held(engine, 2):
        response = await ended(client, (await client.responses.create(**BACK)).id)
    assert response.status == "failed"
    assert "longer than" in response.error.message
    await settled(engine)


async def test_events_are_bounded_in_bytes(client, server, engine):
    server.app.app.state.background.limits = BackgroundLimits(record_bytes=2_000)
    id = (await client.responses.create(**BACK)).id
    assert (await ended(client, id)).status == "incomplete"
    with pytest.raises(openai.BadRequestError, match="are kept") as refused:
        await client.responses.retrieve(id, stream=True)
    first = int(str(refused.value).split("events after ")[1].split()[0])
    rest = [event async for event in await client.responses.retrieve(id, stream=True, starting_after=first)]
    assert rest[0].sequence_number == first + 1
    assert rest[-1].type == "response.incomplete"
    await settled(engine)


async def test_the_end_of_a_server_ends_them_and_says_so(client, server, engine):
    with held(engine, 3) as still:
        id = (await client.responses.create(**BACK)).id
        stream = await client.responses.retrieve(id, stream=True)
        await still.still()
        state = server.app.app.state
        owner = "peer:127.0.0.1"
        assert state.background.find(owner, id)
        assert await server.server.stop(0) == 2
        assert "shut down" in str([event async for event in stream][-1])
        response = state.responses.get(owner, id).response
    assert (response["status"], response["error"]["code"]) == ("failed", "server_error")
    assert "shut down" in response["error"]["message"]
    await settled(engine)


async def test_a_server_that_stops_lets_them_end(client, server, engine):
    with held(engine, 3) as still:
        id = (await client.responses.create(**BACK)).id
        await still.still()
        stopping = asyncio.create_task(server.server.stop(60))
        await until(lambda: server.door.draining)
    assert await stopping == 0
    assert server.app.app.state.responses.get("peer:127.0.0.1", id).response["status"] == "incomplete"
    await settled(engine)


async def test_a_place_is_free_again_if_nothing_comes_of_it(server):
    background = server.app.app.state.background
    background.limits = BackgroundLimits(running=1)

    async def begin():
        raise Overloaded("too much")

    for _ in range(3):
        with pytest.raises(Overloaded, match="too much"):
            await background.run("a", "resp_1", begin)
