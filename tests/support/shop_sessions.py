"""Agents of the shop over HTTP, and what they are told of how their turns went on."""

from __future__ import annotations

import json
from typing import Any

from astraea_jax.agents.tools import tool
from astraea_jax.lab.shop import make_tasks

TASK = make_tasks(seed=1, split="test", count=1)[0]
TOOLS = [tool(function) for function in TASK.tools()]
BASE: dict[str, Any] = {"model": "tiny", "tools": [one.schema() for one in TOOLS], "temperature": 0}
REPORT = {"astraea_report": True}
HELLO = [{"role": "user", "content": "Hello"}]


async def ask(server, messages, headers=None, path="/v1/chat/completions", **body) -> dict[str, Any]:
    """A turn and how it was resumed."""
    asked = {**BASE, **REPORT, "messages": messages, **body}
    answer = await server.client.post(path, json=asked, headers=headers)
    assert answer.status_code == 200, answer.text
    content: dict[str, Any] = answer.json()
    assert answer.headers["x-cached-tokens"] == str(content["usage"]["prompt_tokens_details"]["cached_tokens"])
    return content


async def answered(turn: dict[str, Any]) -> list[dict[str, Any]]:
    """The turn as a client sends it back, its arguments written anew, and the results of its tools."""
    message = turn["choices"][0]["message"]
    results = []
    for call in message.get("tool_calls", ()):
        arguments = json.loads(call["function"]["arguments"])
        call["function"]["arguments"] = json.dumps(arguments, separators=(" , ", " : "))
        one = next(each for each in TOOLS if each.name == call["function"]["name"])
        results.append({"role": "tool", "tool_call_id": call["id"], "content": await one.call(arguments)})
    return [message, *results]


async def shop(server, **more) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """An agent's whole job: its turns, and the messages in the end."""
    messages, turns = list(TASK.messages()), []
    while not turns or turns[-1]["choices"][0]["finish_reason"] == "tool_calls":
        turns.append(await ask(server, messages, **more))
        messages += await answered(turns[-1])
    return turns, messages


def report_of(turn):
    return turn["usage"]["astraea"]
