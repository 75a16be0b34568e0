"""Whatever a model writes is read, or becomes a call that says what was wrong."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from astraea_jax.agents.tool_calls import MAX_CALL_CHARS, MAX_CALLS, MAX_DEPTH, ToolCall, assistant_message, parse


def wrapped(name: str, arguments: Any) -> str:
    body = json.dumps({"name": name, "arguments": arguments}, ensure_ascii=False)
    return f"<tool_call>\n{body}\n</tool_call>"


def test_text_without_calls() -> None:
    assert parse("  The price is 14 < 15.\n") == ("The price is 14 < 15.", [])


def test_parallel_calls_with_text_between() -> None:
    content, calls = parse(f"Let me see.\n{wrapped('price', {'item': 'lamp'})} and {wrapped('stock', {})}", first=3)
    assert content == "Let me see.\n and"
    assert calls == [ToolCall("call_3", "price", {"item": "lamp"}), ToolCall("call_4", "stock", {})]


TEXT = st.text(st.characters(codec="utf-8")) | st.sampled_from(["</tool_call>", "<tool_call>", '"', "\\"])
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63) | st.floats(allow_nan=False, allow_infinity=False) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=10,
)


@given(
    calls=st.lists(
        st.tuples(st.text(st.characters(codec="utf-8"), min_size=1), st.dictionaries(TEXT, VALUES)),
        max_size=4,
    )
)
def test_what_is_written_is_what_is_read(calls: list[tuple[str, dict[str, Any]]]) -> None:
    """Tags inside strings included."""
    _, found = parse("\n".join(wrapped(name, arguments) for name, arguments in calls))
    assert [(call.name, call.arguments, call.error) for call in found] == [(n, a, None) for n, a in calls]


PIECES = st.sampled_from(
    ["<tool_call>", "</tool_call>", '{"name": "f"', ', "arguments": {', "}", '"', "\\", "[", "x", "<"]
)


@given(text=st.lists(PIECES | st.text(max_size=3), max_size=30).map("".join))
def test_any_text_can_be_read(text: str) -> None:
    content, calls = parse(text)
    assert len(calls) == 0 or "<tool_call>" in text
    assert all((call.error is None) == bool(call.name) for call in calls)
    message = assistant_message(text, content, calls)
    assert message["role"] == "assistant"
    assert len(message.get("tool_calls", [])) in (0, len(calls))


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("", "Expecting value"),
        ('{"name": "price", "arguments": {"item": "lamp"}', "Expecting ',' delimiter"),
        ('{"name": "price", "arguments": "lamp"}', '"arguments" must be an object'),
        ('{"arguments": {}}', 'expected {"name"'),
        ('{"name": 3}', 'expected {"name"'),
        ('["price"]', 'expected {"name"'),
        ('{"name": "f", "arguments": {"x": NaN}}', "NaN is not JSON"),
        ('{"name": "f", "arguments": {"x": "\\ud800"}}', "half a surrogate pair"),
        ('{"name": "f", "arguments": {"x": ' + "9" * 5000 + "}}", "integer string conversion"),
        ('{"name": "f", "arguments": {"x": ' + "[" * 100 + "]" * 100 + "}}", "nested too deeply"),
        ('{"name": "f", "arguments": {"x": ' + "[" * 30_000 + "]" * 30_000 + "}}", "nested too deeply"),
        ('{"name": "f", "arguments": {"x": "' + "x" * MAX_CALL_CHARS + '"}}', f"at most {MAX_CALL_CHARS}"),
    ],
)
@pytest.mark.parametrize("end", ["</tool_call>", ""])
def test_unreadable_calls_say_why(body: str, message: str, end: str) -> None:
    _, [call] = parse(f"<tool_call>{body}{end}")
    assert call.name == ""
    assert call.error
    assert call.error.startswith("unreadable tool call: ")
    assert message in call.error


def test_an_unreadable_call_hurts_no_other() -> None:
    text = f'<tool_call>{{"name": "x}}</tool_call>{wrapped("price", {"item": "lamp"})}'
    content, [broken, good] = parse(text)
    assert broken.error
    assert good == ToolCall("call_1", "price", {"item": "lamp"})
    assert assistant_message(text, content, [broken, good]) == {"role": "assistant", "content": text}


def test_a_missing_closing_tag_at_the_end() -> None:
    _, [call] = parse(wrapped("price", {"item": "lamp"}).removesuffix("</tool_call>"))
    assert call == ToolCall("call_0", "price", {"item": "lamp"})


def test_arguments_as_deep_as_allowed() -> None:
    nested: Any = 1
    for _ in range(MAX_DEPTH):
        nested = [nested]
    assert parse(wrapped("f", {"x": nested}))[1][0].error is None
    assert parse(wrapped("f", {"x": [nested]}))[1][0].error


def test_too_many_calls() -> None:
    _, calls = parse(wrapped("f", {}) * 200)
    assert len(calls) == MAX_CALLS + 1
    assert [bool(call.error) for call in calls] == [False] * MAX_CALLS + [True]


def test_message_shape() -> None:
    text = "Look:\n" + wrapped("price", {"item": "lamp"})
    call = {"type": "function", "id": "call_0", "function": {"name": "price", "arguments": {"item": "lamp"}}}
    assert assistant_message(text, *parse(text)) == {
        "role": "assistant",
        "content": "Look:",
        "tool_calls": [call],
    }
