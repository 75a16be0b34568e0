"""Requests of the Messages API become chats in OpenAI's shape, and whatever is wrong with them is said."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from astraea_jax.errors import RequestError
from astraea_jax.frontends.http.messages_input import (
    chat_messages,
    chat_tools,
    constraint,
    parallel_calls,
    template_arguments,
    tool_choice,
)
from astraea_jax.frontends.http.messages_schema import CountRequest, MessagesRequest
from astraea_jax.models.chat import normalise_messages

USE = {"type": "tool_use", "id": "toolu_1", "name": "price", "input": {"item": "lamp"}}
TOOLS = [{"name": "price", "description": "The price.", "input_schema": {"type": "object", "required": ["item"]}}]


def request(*messages: Any, **fields: Any) -> MessagesRequest:
    turns = [{"role": "user", "content": m} if isinstance(m, str) else m for m in messages or ("Hi",)]
    return MessagesRequest.model_validate({"model": "m", "max_tokens": 9, "messages": turns} | fields)


def test_text_is_short_for_a_block_of_text():
    blocks = [{"type": "text", "text": "Hi", "cache_control": {"type": "ephemeral"}}]
    assert chat_messages(request("Hi")) == chat_messages(request({"role": "user", "content": blocks}))
    assert chat_messages(request("Hi", system="Be brief.")) == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
    ]


def test_neighbours_of_one_role_are_one_turn():
    told = request("a", "b", {"role": "assistant", "content": "c"}, {"role": "assistant", "content": "d"}, "e")
    assert [(m["role"], m["content"]) for m in chat_messages(told)] == [
        ("user", "a\nb"),
        ("assistant", "cd"),
        ("user", "e"),
    ]


def test_a_turn_with_thoughts_calls_and_results():
    thoughts = [{"type": "thinking", "thinking": "Hm.", "signature": "s"}, {"type": "redacted_thinking", "data": "x"}]
    said = {"role": "assistant", "content": [*thoughts, {"type": "text", "text": "Look:"}, USE]}
    results = [
        {
            "type": "tool_result",
            "tool_use_id": "toolu_1",
            "content": [{"type": "text", "text": "no lamp"}],
            "is_error": True,
        },
        {"type": "text", "text": "Go on."},
    ]
    messages = chat_messages(request("How much?", said, {"role": "user", "content": results}))
    assert messages[1:] == [
        {
            "role": "assistant",
            "content": "Look:",
            "reasoning_content": "Hm.",
            "tool_calls": [
                {"id": "toolu_1", "type": "function", "function": {"name": "price", "arguments": {"item": "lamp"}}}
            ],
        },
        {"role": "tool", "tool_call_id": "toolu_1", "name": "price", "content": "Error: no lamp"},
        {"role": "user", "content": "Go on."},
    ]
    normalise_messages(messages)


def test_a_result_without_content_is_empty():
    asked = request(
        "x",
        {"role": "assistant", "content": [USE]},
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "toolu_1"}]},
    )
    assert chat_messages(asked)[-1]["content"] == ""


def test_what_the_client_bills_by_does_not_change_the_prompt():
    def prompt(hash: str) -> list[dict[str, Any]]:
        first = {"type": "text", "text": f"x-anthropic-billing-header: cc_version=2.1; cch={hash};"}
        return chat_messages(request("Hi", system=[first, {"type": "text", "text": "You are an agent."}]))

    assert prompt("36ee5") == prompt("0aaa9")
    assert prompt("36ee5")[0] == {"role": "system", "content": "You are an agent."}


def test_tools_and_choices():
    asked = request(tools=TOOLS, tool_choice={"type": "tool", "name": "price", "disable_parallel_tool_use": True})
    (tool,) = chat_tools(asked.tools)
    assert tool["function"]["parameters"] == {"type": "object", "properties": {}, "required": ["item"]}
    assert (tool_choice(asked), parallel_calls(asked)) == ("price", False)
    for given_choice, choice in [(None, "auto"), ("auto", "auto"), ("any", "required"), ("none", "none")]:
        asked = request(tools=TOOLS, tool_choice=given_choice and {"type": given_choice})
        assert (tool_choice(asked), parallel_calls(asked)) == (choice, True)


@pytest.mark.parametrize(
    ("thinking", "effort", "arguments"),
    [
        (None, None, {"enable_thinking": False}),
        ({"type": "disabled"}, None, {"enable_thinking": False}),
        ({"type": "enabled", "budget_tokens": 1024}, "max", {"enable_thinking": True, "reasoning_effort": "high"}),
        ({"type": "adaptive", "display": "omitted"}, "low", {"enable_thinking": True, "reasoning_effort": "low"}),
    ],
)
def test_thinking(thinking, effort, arguments):
    assert template_arguments(request(thinking=thinking, output_config={"effort": effort})) == arguments


def test_a_schema_for_the_reply():
    schema = {"type": "object"}
    asked = request(output_config={"format": {"type": "json_schema", "schema": schema}})
    assert constraint(asked) == {"type": "json_schema", "schema": schema}
    assert constraint(request()) is None


def test_what_claude_code_sends_beside_is_accepted():
    request(
        metadata={"user_id": "user_1_account__session_2"},
        context_management={"edits": [{"type": "clear_thinking_20251015"}]},
        betas=["context-management-2025-06-27"],
        service_tier="auto",
        speed=None,
        diagnostics={},
        tools=[{**TOOLS[0], "eager_input_streaming": True, "cache_control": None, "type": "custom"}],
    )


IMAGE = {"type": "image", "source": {"type": "url", "url": "http://example.com/x.png"}}


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([{"role": "user", "content": [IMAGE]}], "'image'.*'text'"),
        (
            [{"role": "user", "content": [{"type": "tool_result", "tool_use_id": "x", "content": [IMAGE]}]}],
            "'image'.*'text'",
        ),
        ([{"role": "user", "content": [{"type": "tool_result", "tool_use_id": "x"}]}], "no tool_use"),
        ([{"role": "user", "content": [USE]}], "assistant"),
        ([{"role": "assistant", "content": [{"type": "tool_result", "tool_use_id": "x"}]}], "user"),
        ([{"role": "system", "content": [USE]}], "assistant"),
        ([{"role": "tool", "content": "x"}], "role"),
        ([{"role": "user"}], "content"),
        ([{"role": "user", "content": 5}], "content"),
        ([{"role": "user", "content": []}], "at least 1"),
        ([{"role": "user", "content": [{"text": "x"}]}], "'type'"),
        ([], "messages"),
    ],
)
def test_what_is_wrong_is_said(messages, reason):
    with pytest.raises((ValidationError, RequestError), match=reason):
        chat_messages(MessagesRequest.model_validate({"model": "m", "max_tokens": 1, "messages": messages}))


@pytest.mark.parametrize(
    "fields",
    [
        {"max_tokens": 0},
        {"max_tokens": 2**31},
        {"temperature": "nan"},
        {"top_p": 0},
        {"top_k": -1},
        {"stop_sequences": [""]},
        {"stop_sequences": ["x"] * 17},
        {"tools": [{"type": "web_search_20250305", "name": "web_search"}]},
        {"tool_choice": {"type": "tool"}},
        {"thinking": {"type": "enabled", "budget_tokens": -1}},
    ],
)
def test_values_have_bounds(fields):
    with pytest.raises(ValidationError):
        request(**fields)


def test_a_great_many_messages_take_no_longer_than_their_number():
    told = request(*[{"role": "user", "content": "x"}] * 16_000)  # a minute and more, if each copied those before
    assert len(chat_messages(told)[0]["content"]) == 2 * 16_000 - 1


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
IDS = st.sampled_from(["a", "b"])
BLOCKS = st.one_of(
    st.fixed_dictionaries({"type": st.just("text"), "text": st.text(max_size=9) | JSON}),
    st.fixed_dictionaries({"type": st.just("tool_use"), "id": IDS, "name": IDS, "input": JSON}),
    st.fixed_dictionaries(
        {"type": st.just("tool_result"), "tool_use_id": IDS, "content": JSON, "is_error": st.booleans()}
    ),
    st.fixed_dictionaries({"type": st.just("thinking"), "thinking": st.text(max_size=9)}),
    st.just({"type": "redacted_thinking", "data": "x"}),
    JSON,
)
TURNS = st.fixed_dictionaries(
    {
        "role": st.sampled_from(["user", "assistant", "system", "tool"]),
        "content": st.text(max_size=9) | st.lists(BLOCKS, max_size=4) | JSON,
    }
)


@given(st.lists(TURNS, max_size=5))
def test_any_messages_are_read_or_refused(messages):
    try:
        read = CountRequest.model_validate({"model": "m", "messages": messages})
        chat = chat_messages(read)
    except (ValidationError, RequestError):
        return
    assert normalise_messages(chat) == normalise_messages(json.loads(json.dumps(chat)))
