"""Calls in streams: arguments come as they are written, and the end of a call comes with its last token."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest
from support.engines import held, settled, until

from astraea_jax.agents.tools import tool
from astraea_jax.lab.shop import make_tasks

TASK = make_tasks(seed=1, split="test", count=1)[0]
TOOLS = [tool(function).schema() for function in TASK.tools()]
FUNCTIONS = [one["function"] for one in TOOLS]
[SYSTEM, USER] = [message["content"] for message in TASK.messages()]
CHAT = {"model": "tiny", "messages": TASK.messages(), "temperature": 0, "tools": TOOLS}
ASKED: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": CHAT,
    "/v1/responses": {
        "model": "tiny",
        "instructions": SYSTEM,
        "input": USER,
        "temperature": 0,
        "tools": [{"type": "function", **function} for function in FUNCTIONS],
        "store": False,
    },
    "/v1/messages": {
        "model": "tiny",
        "system": SYSTEM,
        "messages": [{"role": "user", "content": USER}],
        "temperature": 0,
        "max_tokens": 200,
        "tools": [
            {"name": one["name"], "description": one["description"], "input_schema": one["parameters"]}
            for one in FUNCTIONS
        ],
    },
}


class Arguments:
    """What a stream has told of the first call."""

    def __init__(self) -> None:
        self.pieces: list[str] = []
        self.ended = self.over = False

    def add(self, event: dict[str, Any]) -> None:
        """Take in an event of any of the APIs."""
        for choice in event.get("choices", ()):
            for call in choice["delta"].get("tool_calls", ()):
                self.pieces += [call["function"]["arguments"]] if call["index"] == 0 else []
            self.over = self.over or choice["finish_reason"] is not None
        kind = event.get("type")
        if kind == "response.function_call_arguments.delta":
            self.pieces.append(event["delta"])
        elif kind == "content_block_delta" and event["delta"]["type"] == "input_json_delta":
            self.pieces.append(event["delta"]["partial_json"])
        self.over = self.over or kind in ("response.completed", "message_stop")
        whole = kind == "response.output_item.done" and event["item"]["type"] == "function_call"
        self.ended = self.ended or whole or (kind == "content_block_stop" and bool(self.pieces))
        if "choices" in event:  # clients know it by the arguments
            self.ended = self.ended or is_whole("".join(self.pieces))


def is_whole(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except ValueError:
        return False


async def events_of(client: Any, path: str, **more: Any) -> AsyncIterator[dict[str, Any]]:
    async with client.stream("POST", path, json={**ASKED[path], "stream": True, **more}) as response:
        assert response.status_code == 200
        async for line in response.aiter_lines():
            if line.startswith("data: {"):
                yield json.loads(line.removeprefix("data: "))


async def tokens_until(client: Any, text: str) -> tuple[int, str]:
    """Tokens of the answer up to the end of a text, and the arguments of its first call."""
    answer = (await client.post("/v1/chat/completions", json={**CHAT, "logprobs": True})).json()["choices"][0]
    written, count = "", 0
    for entry in answer["logprobs"]["content"]:
        written, count = written + entry["token"], count + 1
        if text in written:
            break
    assert text in written
    return count, answer["message"]["tool_calls"][0]["function"]["arguments"]


async def advance(chatty: Any, engine: Any, tokens: int) -> None:
    """Let an engine go on until so many tokens are out in all, and stand still there."""
    while chatty.work.output_tokens < tokens:
        await engine.still()
        engine.more(1)
        await engine.still()
    assert chatty.work.output_tokens == tokens


@pytest.mark.parametrize("path", ASKED)
async def test_a_call_ends_with_its_last_token(server, chatty, path):
    """The engine stands still there: the token that ends the turn has not come."""
    begin, _ = await tokens_until(server.client, '"arguments": {"a')
    end, arguments = await tokens_until(server.client, "</tool_call>")
    await settled(chatty)
    told = Arguments()

    async def listen() -> None:
        async for event in events_of(server.client, path):
            told.add(event)

    before = chatty.work.output_tokens
    with held(chatty, 0) as engine:
        listening = asyncio.create_task(listen())
        await advance(chatty, engine, before + begin)
        await until(lambda: told.pieces)
        assert not told.ended
        await advance(chatty, engine, before + end)
        await until(lambda: told.ended)
        assert not told.over
        assert "".join(told.pieces) == arguments
    await listening
    assert told.over
    assert "".join(told.pieces) == arguments
    await settled(chatty)


@pytest.mark.parametrize("path", ASKED)
async def test_a_call_that_is_cut_off_is_never_whole(server, chatty, path):
    count, arguments = await tokens_until(server.client, '"arguments": {"')
    limit = {"/v1/responses": "max_output_tokens"}.get(path, "max_tokens")
    told, text = Arguments(), ""
    async for event in events_of(server.client, path, **{limit: count + 4}):
        told.add(event)
        text += json.dumps(event)
    assert told.over or "response.incomplete" in text
    assert told.pieces
    assert arguments.startswith("".join(told.pieces))
    assert not is_whole("".join(told.pieces))
    assert "tool_call>" in text
    await settled(chatty)
