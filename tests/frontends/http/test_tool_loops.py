"""Agents written with the official clients do real tasks: the bundled model calls their tools."""

from __future__ import annotations

import json
from typing import Any

import pytest
from anthropic import AsyncAnthropic
from openai import AsyncOpenAI
from support.http_server import MODEL

from astraea_jax.agents.tools import tool
from astraea_jax.lab.shop import SYSTEM, Task, make_tasks

TASKS = make_tasks(seed=3, split="test", count=3)


def schemas(task: Task) -> list[dict[str, Any]]:
    return [tool(function).schema()["function"] for function in task.tools()]


async def run(task: Task, name: str, arguments: object) -> str:
    [function] = [function for function in task.tools() if function.__name__ == name]
    return str(function(**arguments))


@pytest.mark.parametrize("streamed", [False, True])
async def test_anthropics_client_does_tasks(server, streamed):
    async with AsyncAnthropic(base_url=server.url, api_key="none") as client:
        for task in TASKS:
            tools = [
                {"name": f["name"], "description": f["description"], "input_schema": f["parameters"]}
                for f in schemas(task)
            ]
            messages: list[Any] = [{"role": "user", "content": task.question}]
            asked: dict[str, Any] = {
                "model": MODEL,
                "max_tokens": 200,
                "system": SYSTEM,
                "tools": tools,
                "messages": messages,
            }
            stop_reason: str | None = "tool_use"
            while stop_reason == "tool_use":
                if streamed:
                    async with client.messages.stream(**asked, extra_body={"temperature": 0}) as stream:
                        message = await stream.get_final_message()
                else:
                    message = await client.messages.create(**asked, extra_body={"temperature": 0})
                messages.append({"role": "assistant", "content": [block.to_dict() for block in message.content]})
                results = [
                    {"type": "tool_result", "tool_use_id": use.id, "content": await run(task, use.name, use.input)}
                    for use in message.content
                    if use.type == "tool_use"
                ]
                messages.append({"role": "user", "content": results})
                stop_reason = message.stop_reason
            assert stop_reason == "end_turn"
            assert task.is_right(message.content[-1].text)


@pytest.mark.parametrize("stored", [False, True])
async def test_openais_client_does_tasks(server, stored):
    async with AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
        for task in TASKS:
            tools = [{"type": "function", **function, "strict": False} for function in schemas(task)]
            asked: dict[str, Any] = {"model": MODEL, "instructions": SYSTEM, "tools": tools, "temperature": 0}
            told: list[Any] = [{"role": "user", "content": task.question}]
            response = await client.responses.create(**asked, input=told, store=stored)
            while calls := [item for item in response.output if item.type == "function_call"]:
                results = [
                    {
                        "type": "function_call_output",
                        "call_id": call.call_id,
                        "output": await run(task, call.name, json.loads(call.arguments)),
                    }
                    for call in calls
                ]
                told += [*(item.to_dict() for item in response.output), *results]
                later: dict[str, Any] = (
                    {"input": results, "previous_response_id": response.id} if stored else {"input": told}
                )
                async with client.responses.stream(**asked, **later, store=stored) as stream:
                    response = await stream.get_final_response()
            assert task.is_right(response.output_text)


async def test_a_call_can_be_required(server):
    tools: list[Any] = [{"type": "function", **function, "strict": False} for function in schemas(TASKS[0])]
    async with AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
        response = await client.responses.create(
            model=MODEL, input="Hello", tools=tools, tool_choice={"type": "function", "name": "stock"}, temperature=0
        )
    assert [item.name for item in response.output if item.type == "function_call"] == ["stock"]
