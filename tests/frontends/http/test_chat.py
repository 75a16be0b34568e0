"""OpenAI's chats, with OpenAI's own client, against the bundled model."""

import asyncio
import json
from typing import Any

import openai
import pytest
from support.engines import held, settled, until

from astraea_jax.agents.tools import tool
from astraea_jax.lab.shop import make_tasks

TASK = make_tasks(seed=1, split="test", count=1)[0]
TOOLS = [tool(function) for function in TASK.tools()]
SCHEMAS = [one.schema() for one in TOOLS]
BASE: dict[str, Any] = {"model": "tiny", "messages": TASK.messages(), "tools": SCHEMAS, "temperature": 0}
HELLO: dict[str, Any] = {
    "model": "tiny",
    "messages": [{"role": "user", "content": "Hello"}],
    "temperature": 0,
    "max_tokens": 8,
}


async def run_agent(client, *, stream: bool, **more) -> Any:
    """The tool loop that every framework has."""
    messages = list(TASK.messages())
    while True:
        asked = {**BASE, "messages": messages, **more}
        if stream:
            message, reason = await streamed(client, asked)
        else:
            choice = (await client.chat.completions.create(**asked)).choices[0]
            message, reason = choice.message.model_dump(exclude_none=True), choice.finish_reason
        messages.append(message)
        if reason != "tool_calls":
            return message["content"], messages
        for call in message["tool_calls"]:
            one = next(each for each in TOOLS if each.name == call["function"]["name"])
            result = await one.call(json.loads(call["function"]["arguments"]))
            messages.append({"role": "tool", "tool_call_id": call["id"], "content": result})


async def streamed(client, asked) -> Any:
    """The message that a stream's chunks make."""
    content, calls, reason = "", {}, None
    async for chunk in await client.chat.completions.create(**asked, stream=True):
        choice = chunk.choices[0]
        content += choice.delta.content or ""
        for part in choice.delta.tool_calls or ():
            function = {"name": part.function.name, "arguments": ""}
            call = calls.setdefault(part.index, {"id": part.id, "type": "function", "function": function})
            call["function"]["arguments"] += part.function.arguments or ""
        reason = choice.finish_reason or reason
    message = {"role": "assistant", "content": content}
    return message | ({"tool_calls": [*calls.values()]} if calls else {}), reason


@pytest.mark.parametrize("stream", [False, True])
async def test_an_agent_answers_with_tools(client, chatty, stream):
    answer, messages = await run_agent(client, stream=stream)
    assert TASK.is_right(answer)
    assert sum(message["role"] == "tool" for message in messages) >= 2
    await settled(chatty)


async def test_a_session_keeps_its_tokens(client, chatty):
    before = chatty.stats().programs
    first = await client.chat.completions.create(**BASE, extra_body={"session_id": "shopper"})
    call = first.choices[0].message.tool_calls[0]
    messages = [*TASK.messages(), first.choices[0].message, {"role": "tool", "tool_call_id": call.id, "content": "14"}]
    second = await client.chat.completions.create(
        **{**BASE, "messages": messages}, extra_headers={"X-Session-ID": "shopper", "X-Session-Final": "true"}
    )
    cached = second.usage.prompt_tokens_details.cached_tokens
    assert cached >= first.usage.prompt_tokens
    await settled(chatty)
    assert chatty.stats().programs == before, "the session has ended"


async def test_choices_usage_and_logprobs(client):
    asked = {**HELLO, "n": 3, "temperature": 1, "seed": 5, "logprobs": True, "top_logprobs": 2}
    whole = await client.chat.completions.create(**asked, extra_body={"ignore_eos": True})
    assert [choice.index for choice in whole.choices] == [0, 1, 2]
    assert whole.usage.completion_tokens == 24
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + 24
    for choice in whole.choices:
        assert choice.finish_reason == "length"
        entries = choice.logprobs.content
        assert len(entries) == 8
        assert all(len(entry.top_logprobs) == 2 and entry.logprob <= entry.top_logprobs[0].logprob for entry in entries)
    texts = ["", "", ""]
    usages = []
    chunks = await client.chat.completions.create(
        **asked, extra_body={"ignore_eos": True}, stream=True, stream_options={"include_usage": True}
    )
    async for chunk in chunks:
        usages += [chunk.usage] if chunk.usage else []
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
    assert texts == [choice.message.content for choice in whole.choices]
    assert [usage.completion_tokens for usage in usages] == [24]


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "calculator"}}], ids=str)
async def test_a_call_that_must_be_made_is_made(client, choice):
    whole = await client.chat.completions.create(**{**BASE, "max_tokens": 200, "temperature": 1}, tool_choice=choice)
    call = whole.choices[0].message.tool_calls[0]
    assert whole.choices[0].finish_reason == "tool_calls"
    assert call.function.name in (["calculator"] if choice != "required" else [each.name for each in TOOLS])
    assert isinstance(json.loads(call.function.arguments), dict)


async def test_without_tools_a_call_is_text(client):
    whole = await client.chat.completions.create(**BASE, tool_choice="none", max_tokens=20)
    assert whole.choices[0].message.tool_calls is None


async def test_the_answer_has_the_form_that_is_asked_for(client):
    schema = {
        "type": "object",
        "properties": {"n": {"enum": [1, 22]}},
        "required": ["n"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "number", "schema": schema}}
    asked = {**HELLO, "max_tokens": 400}
    whole = await client.chat.completions.create(**asked, response_format=form)
    assert json.loads(whole.choices[0].message.content)["n"] in (1, 22)
    chosen = await client.chat.completions.create(
        **asked, extra_body={"structured_outputs": {"choice": ["yes please", 'no "thanks"']}}
    )
    assert chosen.choices[0].message.content in ("yes please", 'no "thanks"')


@pytest.mark.parametrize(
    ("change", "status", "named"),
    [
        ({"model": "gpt-x"}, 404, "gpt-x"),
        ({"n": 65}, 400, "n"),
        ({"n": 0}, 400, "n"),
        ({"messages": []}, 400, "messages"),
        ({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}, 400, "prefill"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, 400, "image"),
        ({"messages": [{"role": "user", "content": "a" * 100_000}]}, 400, "context"),
        ({"tool_choice": "required"}, 400, "no tools"),
        ({"tools": SCHEMAS, "tool_choice": {"type": "function", "function": {"name": "buy"}}}, 400, "buy"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "nothing"}}}}, 400, ""),
        ({"extra_body": {"chat_template_kwargs": {"tokenize": True}}}, 400, "tokenize"),
        ({"extra_body": {"continue_final_message": True}}, 400, "prefill"),
        ({"logit_bias": {"99999": 1}}, 400, "99999"),
        ({"temperature": 3}, 400, "temperature"),
        ({"top_logprobs": 3}, 400, "logprobs"),
        ({"stop": ["x"] * 17}, 400, "stop"),
        ({"extra_body": {"session_id": "x" * 300}}, 400, "session_id"),
        ({"extra_body": {"min_tokens": 9}}, 400, "min_tokens"),
    ],
    ids=lambda value: str(value)[:50],
)
async def test_what_cannot_be_served_gets_one_clear_error(client, chatty, change, status, named):
    with pytest.raises(openai.APIStatusError) as caught:
        await client.chat.completions.create(**{**HELLO, **change})
    assert caught.value.status_code == status
    told: Any = caught.value.body
    assert named in told["message"]
    assert told["type"]
    await settled(chatty)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("steps", [0, 1, 3])
async def test_a_client_that_vanishes_frees_everything(client, server, chatty, stream, steps):
    with held(chatty, steps) as engine:
        asked = client.chat.completions.create(
            **{**HELLO, "max_tokens": 400}, stream=stream, extra_body={"ignore_eos": True}
        )

        async def read():
            answer = await asked
            if stream:
                async for _ in answer:
                    pass

        reading = asyncio.create_task(read())
        await until(lambda: chatty.in_progress)
        await engine.still()
        reading.cancel()
        await asyncio.wait([reading])
        await until(lambda: not server.app.running)
    await settled(chatty)
    assert (server.door.waiting.choices, server.door.waiting.tokens) == (0, 0)
