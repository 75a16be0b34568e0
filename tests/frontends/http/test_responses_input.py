"""Input items become chats in Chat Completions' shape, and whatever is wrong with them is said."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from astraea_jax.errors import RequestError
from astraea_jax.frontends.http.responses_input import (
    chat_tools,
    chosen_tools,
    constraint,
    conversation,
    template_arguments,
    with_instructions,
)
from astraea_jax.frontends.http.responses_schema import ResponsesRequest
from astraea_jax.models.chat import normalise_messages

CALL = {"type": "function_call", "id": "fc_1", "call_id": "c1", "name": "price", "arguments": '{"item": "lamp"}'}
RESULT = {"type": "function_call_output", "call_id": "c1", "output": "5"}
ASKED = {"role": "user", "content": "How much?"}
TOOL = {"type": "function", "name": "price", "parameters": {"type": "object", "required": ["item"]}, "strict": True}
OTHER = {"type": "function", "name": "stock", "parameters": None, "strict": None, "description": None}


def request(input: Any = "Hi", **fields: Any) -> ResponsesRequest:
    return ResponsesRequest.model_validate({"model": "m", "input": input} | fields)


def messages(*items: Any) -> list[dict[str, Any]]:
    return conversation(request([*items]).input)


def test_text_is_short_for_a_message():
    parts = {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Hi"}]}
    assert conversation(request("Hi").input) == messages(parts) == [{"role": "user", "content": "Hi"}]


def test_what_a_model_did_in_one_turn_is_one_message():
    thought = {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "Hm."}]}
    said = {
        "type": "message",
        "id": "msg_1",
        "role": "assistant",
        "status": "completed",
        "content": [{"type": "output_text", "text": "Look:", "annotations": []}],
    }
    read = messages(ASKED, thought, said, CALL, {**CALL, "call_id": "c2"}, RESULT, {**RESULT, "call_id": "c2"}, ASKED)
    assert [message["role"] for message in read] == ["user", "assistant", "tool", "tool", "user"]
    assert (read[1]["reasoning_content"], read[1]["content"]) == ("Hm.", "Look:")
    assert [call["id"] for call in read[1]["tool_calls"]] == ["c1", "c2"]
    assert read[2] == {"role": "tool", "tool_call_id": "c1", "name": "price", "content": "5"}
    normalise_messages(read)


def test_results_may_belong_to_calls_of_earlier_responses():
    before = messages(ASKED, CALL)
    assert conversation(request([RESULT]).input, before)[0]["name"] == "price"
    with pytest.raises(RequestError, match="belongs to no function_call 'c1'"):
        messages(RESULT)


def test_instructions_and_first_messages_are_one_system_message():
    told = messages({"role": "developer", "content": "Be brief."}, ASKED, {"role": "system", "content": "Now!"})
    assert with_instructions("You sell lamps.", told) == [
        {"role": "system", "content": "You sell lamps.\n\nBe brief."},
        ASKED,
        {"role": "system", "content": "Now!"},
    ]
    assert with_instructions(None, [ASKED]) == [ASKED]


def test_thoughts_that_only_their_server_can_read_are_left_out():
    hidden = {"type": "reasoning", "id": "rs", "summary": [], "encrypted_content": "xyz"}
    assert messages(ASKED, hidden, CALL)[1].keys() == {"role", "content", "tool_calls"}


def test_tools_and_choices():
    hosted = {"type": "web_search", "filters": {}}
    tools, choice = chosen_tools(
        request(tools=[TOOL, OTHER, hosted], tool_choice={"type": "function", "name": "price"})
    )
    assert ([tool.name for tool in tools], choice) == (["price", "stock"], "price")
    price, stock = chat_tools(tools)
    assert price["function"]["strict"]
    assert price["function"]["parameters"] == {"type": "object", "properties": {}, "required": ["item"]}
    assert stock["function"] == {"name": "stock", "description": "", "parameters": {"type": "object", "properties": {}}}


def test_tools_that_are_allowed():
    allowed = {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "stock"}]}
    tools, choice = chosen_tools(request(tools=[TOOL, OTHER], tool_choice=allowed))
    assert ([tool.name for tool in tools], choice) == (["stock"], "required")
    with pytest.raises(RequestError, match="'stock'"):
        chosen_tools(request(tools=[TOOL], tool_choice=allowed))


@pytest.mark.parametrize(
    ("effort", "arguments"),
    [
        (None, {}),
        ("none", {"enable_thinking": False}),
        ("minimal", {"enable_thinking": True, "reasoning_effort": "low"}),
        ("high", {"enable_thinking": True, "reasoning_effort": "high"}),
    ],
)
def test_effort(effort, arguments):
    assert template_arguments(request(reasoning={"effort": effort, "summary": "auto"})) == arguments


def test_forms_of_the_reply():
    schema = {"type": "json_schema", "name": "x", "schema": {"type": "object"}, "strict": True}
    assert constraint(request(text={"format": schema, "verbosity": "low"})) == {
        "type": "json_schema",
        "schema": {"type": "object"},
    }
    assert constraint(request(text={"format": {"type": "json_object"}})) == {"type": "json_object"}
    assert constraint(request(text={"verbosity": "low"})) is None


def test_fields_may_be_null_or_new():
    request(temperature=None, store=None, tools=None, metadata=None, reasoning=None, service_tier="flex", new={"x": 1})


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]}, "input_image"),
        ({"input": [{"type": "web_search_call", "id": "x"}]}, "items of type message"),
        ({"input": [{"type": "function_call", "call_id": "x"}]}, "name"),
        ({"input": 5}, "input"),
        ({"background": True, "store": False}, "must be stored"),
        ({"conversation": "conv_1"}, "conversation"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"top_logprobs": 21}, "top_logprobs"),
        ({"metadata": {"x": "y" * 513}}, "metadata"),
        ({"tool_choice": {"type": "web_search"}}, "tool_choice"),
        ({"text": {"format": {"type": "xml"}}}, "format"),
    ],
)
def test_what_is_wrong_is_said(fields, reason):
    with pytest.raises(ValidationError, match=reason):
        request(**fields)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
IDS = st.sampled_from(["a", "b"])
ROLES = st.sampled_from(["user", "assistant", "system", "developer"])
TEXT = st.text(max_size=9)
PART = st.fixed_dictionaries({"type": st.sampled_from(["input_text", "output_text", "input_image"]), "text": TEXT})
CONTENT = TEXT | st.lists(PART, max_size=3) | JSON
ITEMS = st.one_of(
    st.fixed_dictionaries({"role": ROLES, "content": CONTENT}),
    st.fixed_dictionaries({"type": st.just("function_call"), "call_id": IDS, "name": IDS, "arguments": TEXT}),
    st.fixed_dictionaries({"type": st.just("function_call_output"), "call_id": IDS, "output": CONTENT}),
    st.fixed_dictionaries({"type": st.just("reasoning"), "summary": CONTENT}),
    JSON,
)


@given(st.lists(ITEMS, max_size=6))
def test_any_items_are_read_or_refused(items):
    try:
        chat = with_instructions("x", conversation(request(items).input))
    except (ValidationError, RequestError):
        return
    assert normalise_messages(chat) == normalise_messages(json.loads(json.dumps(chat)))
