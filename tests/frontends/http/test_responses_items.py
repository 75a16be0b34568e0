"""Input items: listed in pages, and quoted by their ids."""

from __future__ import annotations

from typing import Any

import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai import AsyncOpenAI
from support.http_server import MODEL, serving

from astraea_jax.errors import RequestError
from astraea_jax.frontends.http.responses_input import conversation
from astraea_jax.frontends.http.responses_items import listed, page, resolved
from astraea_jax.frontends.http.responses_schema import ResponsesRequest
from astraea_jax.frontends.http.tenants import Keys

FEW: dict[str, Any] = {"model": MODEL, "max_output_tokens": 4, "temperature": 0}
TALK: list[dict[str, Any]] = [
    {"role": "user", "content": "How much?"},
    {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "Hm."}]},
    {"role": "assistant", "content": "Look:"},
    {"type": "function_call", "call_id": "c1", "name": "price", "arguments": "{}"},
    {"type": "function_call_output", "call_id": "c1", "output": "5"},
    {"role": "developer", "content": [{"type": "input_text", "text": "Be brief."}]},
]


@pytest.fixture
async def client(engine):
    async with (
        serving(engine) as server,
        AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client,
    ):
        yield client


async def test_the_items_of_a_chain_are_listed_in_pages(client):
    first = await client.responses.create(**FEW, input="Hello")
    second = await client.responses.create(
        **FEW, input=[{"role": "user", "content": "And?"}], previous_response_id=first.id
    )
    pages = await client.responses.input_items.list(second.id, order="asc", limit=1)
    items = [item async for item in pages]
    assert [(item.role, item.content[0].text) for item in items] == [
        ("user", "Hello"),
        ("assistant", first.output_text),
        ("user", "And?"),
    ]
    assert items[1].id == first.output[0].id
    assert [item.id async for item in client.responses.input_items.list(second.id)] == [i.id for i in items[::-1]]
    after = await client.responses.input_items.list(second.id, order="asc", after=items[0].id, limit=1)
    assert (after.first_id, after.last_id, after.has_more) == (items[1].id, items[1].id, True)
    for wrong in ({"after": "msg_0"}, {"limit": 0}, {"limit": 101}, {"order": "up"}):
        with pytest.raises(openai.BadRequestError):
            await client.responses.input_items.list(second.id, **wrong)
    with pytest.raises(openai.NotFoundError):
        await client.responses.input_items.list("resp_0")


async def test_an_item_is_quoted_by_its_id(client):
    first = await client.responses.create(**FEW, input="Hello")
    [asked] = (await client.responses.input_items.list(first.id)).data
    quoted = [
        {"type": "item_reference", "id": asked.id},
        {"id": first.output[0].id},  # which the API allows, too
        {"role": "user", "content": "And?"},
    ]
    second = await client.responses.create(**FEW, input=quoted)
    third = await client.responses.create(**FEW, input="And?", previous_response_id=first.id)
    assert (second.output_text, second.usage.input_tokens) == (third.output_text, third.usage.input_tokens)
    await client.responses.delete(first.id)
    again = await client.responses.create(**FEW, input=quoted)  # the second response has them, too
    assert again.output_text == second.output_text


async def test_what_is_gone_or_somebody_elses_is_not_quoted(engine):
    async with serving(engine, keys=Keys(["first-secret", "second-secret"])) as server:
        mine = AsyncOpenAI(base_url=f"{server.url}/v1", api_key="first-secret", max_retries=0)
        yours = AsyncOpenAI(base_url=f"{server.url}/v1", api_key="second-secret", max_retries=0)
        async with mine, yours:
            kept = await mine.responses.create(**FEW, input="Hello")
            dropped = await mine.responses.create(**FEW, input="Hello", store=False)
            for client, id in ((yours, kept.output[0].id), (mine, dropped.output[0].id), (mine, "msg_0")):
                quoted = [{"type": "item_reference", "id": id}, {"role": "user", "content": "And?"}]
                with pytest.raises(openai.NotFoundError, match=id):
                    await client.responses.create(**FEW, input=quoted)


def test_every_item_is_read_again_as_it_was_listed():
    items = resolved(ResponsesRequest.model_validate({"model": "m", "input": TALK}).input, dict)
    shown = [listed(item) for item in items]
    assert [item["id"].split("_")[0] for item in shown] == ["msg", "rs", "msg", "fc", "fco", "msg"]
    assert shown[1]["id"] == "rs_1"
    by_id = {item["id"]: item for item in shown}
    references = [{"type": "item_reference", "id": id} for id in by_id]
    quoted = ResponsesRequest.model_validate({"model": "m", "input": references}).input
    assert conversation(resolved(quoted, by_id.__getitem__)) == conversation(items)


@given(st.integers(0, 12), st.integers(1, 5), st.sampled_from(["asc", "desc"]))
def test_pages_hold_every_item_once(length, limit, order):
    items = [{"id": str(i)} for i in range(length)]
    seen, after = [], None
    while True:
        found = page(items, after, limit, order)
        assert len(found["data"]) <= limit
        seen += found["data"]
        after = found["last_id"]
        if not found["has_more"]:
            break
    assert seen == (items if order == "asc" else items[::-1])


def test_an_item_that_is_not_there_begins_no_page():
    with pytest.raises(RequestError, match="none of the input items"):
        page([{"id": "a"}], "b", 1, "asc")
