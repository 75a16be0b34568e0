"""Replies become content blocks, and the events add up to the message."""

from __future__ import annotations

import json
from typing import Any

import pytest
from anthropic.lib.streaming._messages import accumulate_event
from anthropic.types import RawMessageStreamEvent
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter

from astraea_jax.agents.reply import CallArguments, CallBegan, CallDropped, CallEnded, Part, Said, Thought
from astraea_jax.agents.tool_calls import ToolCall
from astraea_jax.engine.generation import Usage
from astraea_jax.frontends.http.messages_output import MessageBuilder

USAGE = Usage(10, 4, 7, 0.0, 0.0, 0.0, 0)
EVENT = TypeAdapter(RawMessageStreamEvent)


def call(index: int, name: str = "price", pieces: tuple[str, ...] = ('{"item": ', '"lamp"}')) -> list[Part]:
    arguments = [CallArguments(index, piece) for piece in pieces]
    made = ToolCall(f"call_{index}", name, json.loads("".join(pieces)))
    return [CallBegan(index, made.id, name), *arguments, CallEnded(index, made)]


def events_of(parts: list[Part], reason: str = "stop", stop_sequence: str | None = None) -> list[dict[str, Any]]:
    builder = MessageBuilder("msg_1", "m")
    return [*builder.start(10), *builder.add(parts), *builder.finish(reason, stop_sequence, USAGE)]


def message_of(parts: list[Part], reason: str = "stop", stop_sequence: str | None = None) -> dict[str, Any]:
    builder = MessageBuilder("msg_1", "m")
    builder.add(parts)
    return builder.message(reason, stop_sequence, USAGE)


def test_events_come_in_the_order_of_the_api():
    events = events_of([Thought("Hm"), Thought("."), Said("\n\n"), Said("See "), Said("it."), *call(0)], "tool_calls")
    told = [(e["type"], e.get("index"), (e.get("delta") or {}).get("type")) for e in events]
    assert told == [
        ("message_start", None, None),
        ("ping", None, None),
        ("content_block_start", 0, None),
        ("content_block_delta", 0, "thinking_delta"),
        ("content_block_delta", 0, "thinking_delta"),
        ("content_block_delta", 0, "signature_delta"),
        ("content_block_stop", 0, None),
        ("content_block_start", 1, None),
        ("content_block_delta", 1, "text_delta"),
        ("content_block_delta", 1, "text_delta"),
        ("content_block_stop", 1, None),
        ("content_block_start", 2, None),
        ("content_block_delta", 2, "input_json_delta"),
        ("content_block_delta", 2, "input_json_delta"),
        ("content_block_stop", 2, None),
        ("message_delta", None, None),
        ("message_stop", None, None),
    ]
    assert events[-2]["delta"] == {"stop_reason": "tool_use", "stop_sequence": None}


def test_tokens_of_the_prompt_are_counted_once():
    assert message_of([Said("x")])["usage"] == {
        "input_tokens": 6,
        "cache_read_input_tokens": 4,
        "cache_creation_input_tokens": 0,
        "output_tokens": 7,
    }


@pytest.mark.parametrize(
    ("reason", "sequence", "stop_reason"),
    [
        ("stop", None, "end_turn"),
        ("stop", "END", "stop_sequence"),
        ("length", None, "max_tokens"),
        ("tool_calls", None, "tool_use"),
    ],
)
def test_stop_reasons(reason, sequence, stop_reason):
    message = message_of([Said("x")], reason, sequence)
    assert (message["stop_reason"], message["stop_sequence"]) == (stop_reason, sequence)


def test_a_reply_of_nothing_has_one_empty_text():
    assert message_of([Said(" \n")])["content"] == [{"type": "text", "text": ""}]


def test_white_space_between_calls_makes_no_block():
    content = message_of([*call(0), Said("\n"), *call(1)])["content"]
    assert [block["type"] for block in content] == ["tool_use", "tool_use"]


def test_a_call_that_was_cut_off_is_closed():
    events = events_of([CallBegan(0, "call_0", "price"), CallArguments(0, '{"item": ')], "length")
    assert [event["type"] for event in events[-3:]] == ["content_block_stop", "message_delta", "message_stop"]


TEXT = st.text(alphabet="ab \n", min_size=1, max_size=3)
REPLIES = st.lists(
    st.one_of(TEXT.map(lambda t: [Thought(t)]), TEXT.map(lambda t: [Said(t)]), st.integers(0, 9).map(call)), max_size=8
).map(lambda lists: [part for parts in lists for part in parts])


@given(REPLIES)
def test_the_events_add_up_to_the_message(parts):
    snapshot, buffers = None, {}
    for event in events_of(parts):
        if event["type"] != "ping":
            read = EVENT.validate_python(json.loads(json.dumps(event)))
            snapshot = accumulate_event(event=read, current_snapshot=snapshot, json_bufs=buffers)
    message = message_of(parts)
    added_up = snapshot.to_dict()
    assert added_up["content"] == message["content"]
    assert (added_up["stop_reason"], added_up["usage"]) == (message["stop_reason"], message["usage"])


def test_a_call_ends_at_once_and_one_that_is_dropped_too():
    builder = MessageBuilder("msg_1", "m")
    builder.start(10)
    assert builder.add(call(0))[-1] == {"type": "content_block_stop", "index": 0}
    events = builder.add([CallBegan(1, "call_1", "price"), CallArguments(1, '{"item": "la'), CallDropped(1)])
    assert events[-1] == {"type": "content_block_stop", "index": 1}
    assert builder.add([Said("<tool_call>")])[0]["content_block"] == {"type": "text", "text": ""}
