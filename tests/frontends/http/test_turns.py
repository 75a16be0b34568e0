"""Turns as every API begins them."""

import json
import re
from typing import Any

import pytest
from support.engines import settled
from support.http_server import MODEL

from astraea_jax.agents import formats
from astraea_jax.agents.parts import CallPart
from astraea_jax.agents.reply import CallBegan, CallDropped, CallEnded
from astraea_jax.agents.tools import tool
from astraea_jax.engine.sampling import SamplingParams
from astraea_jax.errors import RequestError
from astraea_jax.frontends.http import tool_turns
from astraea_jax.frontends.http.door import Door
from astraea_jax.frontends.http.tenants import Tenant
from astraea_jax.frontends.http.turns import ChatRequest

USER = {"role": "user", "content": "Hello"}
TENANT = Tenant("somebody", "")
WEATHER = {"type": "function", "function": {"name": "weather", "description": "", "parameters": {"type": "object"}}}


@pytest.fixture
def door(engine) -> Door:
    return Door(engine, formats.choose(engine.tokenizer), [MODEL])


async def test_every_choice_is_a_turn(door, engine):
    params = SamplingParams(max_tokens=5, seed=7, temperature=1.0, ignore_eos=True)
    turns = await door.begin(ChatRequest(messages=[USER], tenant=TENANT, params=params, n=3))
    assert door.waiting.tokens > 0
    deltas = [[delta async for delta in turn] for turn in turns]
    ids = [[token for delta in each for token in delta.token_ids] for each in deltas]
    assert [len(each) for each in ids] == [5, 5, 5]
    assert len({tuple(each) for each in ids}) == 3
    assert {turn.finish_reason for turn in turns} == {"length"}
    assert door.waiting.tokens == door.waiting.choices == 0
    await settled(engine)


async def test_a_turn_that_nobody_holds_is_cancelled(door, engine):
    turns = await door.begin(ChatRequest(messages=[USER], tenant=TENANT, n=2))
    await anext(turns[0])
    del turns
    await settled(engine)
    assert door.waiting.tokens == 0


async def test_a_session_with_a_request_in_progress_begins_another_program(door, engine):
    params = SamplingParams(max_tokens=4, ignore_eos=True)
    request = ChatRequest(messages=[USER], tenant=TENANT, params=params, session="agent")
    first = (await door.begin(request))[0]
    second = (await door.begin(request))[0]
    for turn in (second, first):
        assert [delta async for delta in turn]
        assert turn.finish_reason == "length"
    engine.end_session("agent", owner=TENANT.owner)
    await settled(engine)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"n": 0}, "n is 0"),
        ({"n": 65}, "n is 65"),
        ({"messages": []}, "no messages"),
        ({"messages": [USER, {"role": "assistant", "content": "I"}]}, "prefill"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, "image_url"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "cannot encode"),
        ({"tool_choice": "required"}, "no tools"),
        ({"tools": [WEATHER], "tool_choice": "wether"}, "none of the tools"),
    ],
    ids=str,
)
async def test_a_request_that_cannot_be_served_is_refused(door, change, named):
    with pytest.raises(RequestError, match=named):
        await door.begin(ChatRequest(**{"messages": [USER], "tenant": TENANT, **change}))
    assert door.waiting.tokens == door.waiting.choices == 0


async def test_ids_of_calls_are_those_that_the_chat_template_takes(engine):
    for name, is_right in (
        ("hermes", lambda id: id == "toolu_1"),
        ("mistral", re.compile(r"[A-Za-z0-9]{9}").fullmatch),
    ):
        door = Door(engine, formats.named(name), [MODEL])
        request = ChatRequest(messages=[USER], tenant=TENANT, tools=[WEATHER], call_ids=lambda: "toolu_1")
        reader = door._reader(request, "")
        reader.feed('{"name": "weather", "arguments": {}}')
        reader.finish()
        [call] = reader.reply.calls
        assert is_right(call.id)


BROKEN = '[TOOL_CALLS]weather[ARGS]{"city": }'
WHOLE = '[TOOL_CALLS]weather[ARGS]{"city": "Rome"}'


def saying(text: str) -> dict[str, Any]:
    """The constraint of a model that says just this."""
    return {"type": "lark", "lark": f"start: {json.dumps(text)}"}


async def test_the_first_call_that_is_complete_is_the_only_one(chatty):
    door = Door(chatty, formats.named("mistral"), [MODEL])
    request = ChatRequest(
        messages=[USER], tenant=TENANT, tools=[WEATHER], parallel_calls=False, constraint=saying(BROKEN + WHOLE + WHOLE)
    )
    [turn] = await door.begin(request)
    parts = [part async for delta in turn for part in delta.parts if isinstance(part, CallPart)]
    ended = [part for part in parts if isinstance(part, CallEnded)]
    assert {part.index for part in parts} == {0, 1}
    assert CallDropped(0) in parts
    assert [part.call for part in ended] == turn.reply.calls
    assert [call.arguments for call in turn.reply.calls] == [{"city": "Rome"}]
    await settled(chatty)


@pytest.mark.parametrize("early", [True, False])
async def test_calls_are_dropped_only_where_they_were_told_early(chatty, early):
    door = Door(chatty, formats.named("mistral"), [MODEL])
    request = ChatRequest(messages=[USER], tenant=TENANT, tools=[WEATHER], constraint=saying(BROKEN), early_calls=early)
    [turn] = await door.begin(request)
    parts = [part async for delta in turn for part in delta.parts if isinstance(part, CallPart)]
    assert [type(part) for part in (parts[:1] + parts[-1:])] == ([CallBegan, CallDropped] if early else [])
    assert (turn.reply.text, turn.finish_reason) == (BROKEN, "stop")
    await settled(chatty)


async def test_calls_of_the_server_stay_hidden_behind_dropped_ones_of_the_client(chatty, monkeypatch):
    monkeypatch.setattr(tool_turns, "MAX_STEPS", 3)

    @tool
    def price() -> int:
        """Price."""
        return 14

    own = "[TOOL_CALLS]price[ARGS]{}"
    door = Door(chatty, formats.named("mistral"), [MODEL], tools=[price])
    request = ChatRequest(messages=[USER], tenant=TENANT, tools=[WEATHER], constraint=saying(BROKEN + own))
    [turn] = await door.begin(request)
    parts = [part async for delta in turn for part in delta.parts if isinstance(part, CallPart)]
    assert [part.name for part in parts if isinstance(part, CallBegan)] == ["weather"] * 3
    assert [part.index for part in parts if isinstance(part, CallDropped)] == [0, 1, 2]
    assert not any(isinstance(part, CallEnded) for part in parts)
    await settled(chatty)
