"""Thoughts within a budget, through the clients of OpenAI and Anthropic, with a model that never stops thinking."""

from __future__ import annotations

import json
import logging
import shutil
from typing import Any

import openai
import pytest
from anthropic import AsyncAnthropic
from openai import AsyncOpenAI
from support.engines import settled
from support.http_server import MODEL, serving
from support.sizes import SMALL

from astraea_jax.engine.engine import Engine

HELLO: list[dict[str, Any]] = [{"role": "user", "content": "Hello"}]
OPENS = "{% if enable_thinking is not defined or enable_thinking %}<think>\n{% endif %}"


@pytest.fixture(scope="module")
def thinker(random_folder, tmp_path_factory):
    """The random model with a template that opens a thought, and tokens that begin and end one."""
    folder = tmp_path_factory.mktemp("thinker") / "model"
    shutil.copytree(random_folder, folder)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    like = tokenizer["added_tokens"][0]
    tokenizer["added_tokens"] += [like | {"id": 258, "content": "<think>"}, like | {"id": 259, "content": "</think>"}]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["chat_template"] = config["chat_template"].replace("assistant\n", "assistant\n" + OPENS)
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    engine = Engine.from_folder(folder, SMALL)
    engine.start()
    yield engine
    engine.shutdown(grace_s=0)


@pytest.mark.parametrize("budget", [0, 5])
async def test_anthropics_budget_is_kept(thinker, budget):
    asked: dict[str, Any] = {"model": MODEL, "max_tokens": 20, "messages": HELLO}
    thinking = {"type": "enabled", "budget_tokens": budget}
    more: dict[str, Any] = {"thinking": thinking, "extra_body": {"temperature": 0}}
    async with (
        serving(thinker) as server,
        AsyncAnthropic(base_url=server.url, api_key="none", max_retries=0) as client,
    ):
        free = await client.messages.create(**asked, thinking={"type": "adaptive"})
        assert [block.type for block in free.content] == ["thinking"]
        bounded = await client.messages.create(**asked, **more)
        async with client.messages.stream(**asked, **more) as stream:
            streamed = await stream.get_final_message()
    assert bounded.content[-1].type == "text"
    assert [(block.type, block.to_dict().get("text")) for block in streamed.content] == [
        (block.type, block.to_dict().get("text")) for block in bounded.content
    ]
    thought = "".join(block.thinking for block in bounded.content if block.type == "thinking")
    assert len(thought) <= budget
    await settled(thinker)


async def test_vllms_budget_is_kept(thinker):
    asked: dict[str, Any] = {"model": MODEL, "max_tokens": 20, "messages": HELLO, "temperature": 0}
    async with (
        serving(thinker) as server,
        AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client,
    ):
        free = (await client.chat.completions.create(**asked)).choices[0].message
        assert (free.content, free.model_extra["reasoning"]) != ("", "")
        answer = await client.chat.completions.create(**asked, n=2, extra_body={"thinking_token_budget": 4})
        for choice in answer.choices:
            assert choice.message.content
            assert len(choice.message.model_extra.get("reasoning", "")) <= 4
        more: dict[str, Any] = {**asked, "max_tokens": 80, "response_format": {"type": "json_object"}}
        formed = await client.chat.completions.create(**more, extra_body={"thinking_token_budget": 4})
        assert formed.choices[0].message.content.startswith("{")
        for wrong in (-1, "x", 2**40):
            with pytest.raises(openai.BadRequestError, match="thinking_token_budget"):
                await client.chat.completions.create(**asked, extra_body={"thinking_token_budget": wrong})
    await settled(thinker)


async def test_a_model_without_tokens_for_thoughts_says_so(engine, caplog):
    asked: dict[str, Any] = {"model": MODEL, "max_tokens": 4, "messages": HELLO}
    with caplog.at_level(logging.WARNING):
        async with (
            serving(engine) as server,
            AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as chats,
            AsyncAnthropic(base_url=server.url, api_key="none", max_retries=0) as messages,
        ):
            with pytest.raises(openai.BadRequestError, match="no tokens that begin and end"):
                await chats.chat.completions.create(**asked, extra_body={"thinking_token_budget": 4})
            for _ in range(2):
                assert await messages.messages.create(**asked, thinking={"type": "enabled", "budget_tokens": 1024})
    assert [record.message for record in caplog.records if "thoughts are not bounded" in record.message][1:] == []
    assert "thoughts are not bounded" in caplog.text
    await settled(engine)


@pytest.mark.parametrize("text", ["Say <think>", "<think>", "Is it </think> or <think>\n?"])
async def test_what_a_user_writes_opens_no_thought(chatty, text):
    form = {"type": "json_schema", "json_schema": {"name": "n", "schema": {"enum": ["yes", "no"]}}}
    more: dict[str, Any] = {"response_format": form, "max_tokens": 40}
    async with (
        serving(chatty) as server,
        AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client,
    ):
        asked: dict[str, Any] = {"model": MODEL, "messages": [{"role": "user", "content": text}]}
        answer = await client.chat.completions.create(**asked, **more)
    assert answer.choices[0].message.content in ('"yes"', '"no"')
    await settled(chatty)
