"""OpenAI's own client against the Responses API of a server."""

from __future__ import annotations

import openai
import pytest
from openai import AsyncOpenAI
from support.engines import held, settled
from support.http_server import MODEL, serving

from astraea_jax.frontends.http.tenants import Keys

HELLO = {"model": MODEL, "input": "Hello", "temperature": 0}
TOOL = {"type": "function", "name": "price", "parameters": {"type": "object", "properties": {}}, "strict": False}


@pytest.fixture
async def server(engine):
    async with serving(engine) as server:
        yield server


@pytest.fixture
async def client(server):
    async with AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


async def test_a_response(client, engine):
    response = await client.responses.create(
        **HELLO, instructions="Be brief.", max_output_tokens=6, metadata={"a": "b"}
    )
    assert (response.object, response.model, response.metadata) == ("response", MODEL, {"a": "b"})
    assert (response.status, response.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert response.output[0].type == "message"
    assert response.usage.output_tokens == 6
    again = await client.responses.create(**HELLO, instructions="Be brief.", max_output_tokens=6)
    assert again.output_text == response.output_text
    assert again.usage.input_tokens == response.usage.input_tokens
    assert again.usage.input_tokens_details.cached_tokens > 0
    await settled(engine)


async def test_a_stream_gives_the_same_response(client, engine):
    whole = await client.responses.create(**HELLO, max_output_tokens=8)
    events = [e async for e in await client.responses.create(**HELLO, max_output_tokens=8, stream=True)]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert events[0].type == "response.created"
    assert events[-1].type == "response.incomplete"
    assert events[-1].response.output_text == whole.output_text
    assert "".join(e.delta for e in events if e.type == "response.output_text.delta") == whole.output_text
    await settled(engine)


async def test_a_response_continues_another(client):
    first = await client.responses.create(**HELLO, max_output_tokens=4)
    second = await client.responses.create(
        model=MODEL,
        input="And?",
        previous_response_id=first.id,
        max_output_tokens=4,
        temperature=0,
        instructions="Be brief.",
    )
    assert second.previous_response_id == first.id
    spelled_out = await client.responses.create(
        model=MODEL,
        input=[
            {"role": "user", "content": "Hello"},
            {"role": "assistant", "content": first.output_text},
            {"role": "user", "content": "And?"},
        ],
        instructions="Be brief.",
        max_output_tokens=4,
        temperature=0,
    )
    assert (spelled_out.output_text, spelled_out.usage.input_tokens) == (second.output_text, second.usage.input_tokens)
    assert (await client.responses.retrieve(second.id)).output_text == second.output_text


async def test_what_is_gone_is_not_continued(client):
    kept = await client.responses.create(model=MODEL, input="Hello", max_output_tokens=1)
    await client.responses.delete(kept.id)
    dropped = await client.responses.create(model=MODEL, input="Hello", max_output_tokens=1, store=False)
    for id in (kept.id, dropped.id, "resp_0"):
        with pytest.raises(openai.NotFoundError, match="expired"):
            await client.responses.create(model=MODEL, input="And?", previous_response_id=id)
        with pytest.raises(openai.NotFoundError):
            await client.responses.retrieve(id)


async def test_responses_belong_to_the_tenant(engine):
    async with serving(engine, keys=Keys(["first-secret", "second-secret"])) as server:
        mine = AsyncOpenAI(base_url=f"{server.url}/v1", api_key="first-secret", max_retries=0)
        yours = AsyncOpenAI(base_url=f"{server.url}/v1", api_key="second-secret", max_retries=0)
        async with mine, yours:
            response = await mine.responses.create(model=MODEL, input="Hello", max_output_tokens=1)
            for call in (yours.responses.retrieve(response.id), yours.responses.delete(response.id)):
                with pytest.raises(openai.NotFoundError):
                    await call
            assert await mine.responses.retrieve(response.id)


@pytest.mark.parametrize(
    ("fields", "status"),
    [
        ({"model": "gpt-9"}, 404),
        ({"input": []}, 400),
        ({"input": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "I"}]}, 400),
        ({"input": [{"type": "item_reference", "id": "x"}]}, 404),
        ({"input": [{"type": "item_reference"}]}, 400),
        ({"input": [{"type": "computer_call", "id": "x"}]}, 400),
        ({"input": "x" * 4000}, 400),
        ({"tool_choice": {"type": "function", "name": "x"}, "tools": [TOOL]}, 400),
        ({"tool_choice": "required"}, 400),
        ({"background": True, "store": False}, 400),
        ({"input": "x" * 5_000_000}, 413),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_errors_have_openais_shape(server, fields, status, stream):
    body = {"model": MODEL, "input": "Hello", "max_output_tokens": 4, "stream": stream} | fields
    answer = await server.client.post("/v1/responses", json=body)
    assert answer.status_code == status, answer.text
    assert answer.json()["error"].keys() == {"message", "type", "param", "code"}


async def test_what_clients_send_beside_is_accepted(server):
    body = {
        "model": MODEL,
        "input": [{"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Hi"}]}],
        "max_output_tokens": 1,
        "include": ["reasoning.encrypted_content"],
        "prompt_cache_key": "x",
        "client_metadata": {"a": 1},
        "tools": [TOOL, {"type": "web_search"}, {"type": "namespace", "name": "n", "tools": [TOOL]}],
    }
    answer = await server.client.post("/v1/responses", json=body)
    assert answer.status_code == 200, answer.text
    assert [tool["name"] for tool in answer.json()["tools"]] == ["price"]


async def test_probabilities_of_the_text(client):
    response = await client.responses.create(
        model=MODEL, input="Hello", max_output_tokens=4, include=["message.output_text.logprobs"], top_logprobs=2
    )
    probabilities = response.output[0].content[0].logprobs
    assert len(probabilities) == 4
    assert all(len(one.top_logprobs) == 2 for one in probabilities)


async def test_a_session_that_ends_during_a_stream_is_a_failed_response(client, engine):
    named = {"extra_headers": {"x-session-id": "agent"}}
    with held(engine, 2) as state:
        stream = await client.responses.create(model=MODEL, input="Hello", stream=True, **named)
        await state.still()
        engine.end_session("agent", owner="peer:127.0.0.1")
    events = [event async for event in stream]
    assert events[-1].type == "response.failed"
    assert "session was ended" in events[-1].response.error.message
    assert [event.sequence_number for event in events] == list(range(len(events)))
    await settled(engine)


async def test_a_client_that_vanishes_frees_its_pages(client, engine):
    async with client.responses.stream(model=MODEL, input="Hello", tools=[TOOL]) as stream:
        await anext(aiter(stream))
    await settled(engine)
