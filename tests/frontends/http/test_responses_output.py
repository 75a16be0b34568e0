"""Replies become output items, and the events add up to the response."""

from __future__ import annotations

import itertools
import json
from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from openai import omit
from openai.lib.streaming.responses._responses import ResponseStreamState
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter

from astraea_jax.agents.reply import CallArguments, CallBegan, CallDropped, CallEnded, Part, Said, Thought
from astraea_jax.agents.tool_calls import ToolCall
from astraea_jax.engine.generation import Usage
from astraea_jax.frontends.http.responses_output import ResponseBuilder, reply_messages

USAGE = Usage(10, 4, 7, 0.0, 0.0, 0.0, 0)
EVENT = TypeAdapter(ResponseStreamEvent)
EMPTY = {
    "id": "resp_1",
    "object": "response",
    "created_at": 5,
    "model": "m",
    "parallel_tool_calls": True,
    "tool_choice": "auto",
    "tools": [],
}
IDS = itertools.count()


def call(index: int) -> list[Part]:
    made = ToolCall(f"call_{next(IDS)}", "price", {"item": "lamp"})
    pieces = [CallArguments(index, piece) for piece in ('{"item": ', '"lamp"}')]
    return [CallBegan(index, made.id, "price"), *pieces, CallEnded(index, made)]


def events_of(parts: list[Part], reason: str = "stop") -> list[dict[str, Any]]:
    builder = ResponseBuilder(EMPTY)
    return [*builder.start(), *builder.add(parts), *builder.finish(reason, USAGE)]


def test_events_come_in_the_order_of_the_api():
    events = events_of([Thought("Hm"), Said("\n\n"), Said("See "), Said("it."), *call(0)], "tool_calls")
    assert [(e["type"].removeprefix("response."), e.get("output_index")) for e in events] == [
        ("created", None),
        ("in_progress", None),
        ("output_item.added", 0),
        ("content_part.added", 0),
        ("reasoning_text.delta", 0),
        ("reasoning_text.done", 0),
        ("content_part.done", 0),
        ("output_item.done", 0),
        ("output_item.added", 1),
        ("content_part.added", 1),
        ("output_text.delta", 1),
        ("output_text.delta", 1),
        ("output_text.done", 1),
        ("content_part.done", 1),
        ("output_item.done", 1),
        ("output_item.added", 2),
        ("function_call_arguments.delta", 2),
        ("function_call_arguments.delta", 2),
        ("function_call_arguments.done", 2),
        ("output_item.done", 2),
        ("completed", None),
    ]
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    assert events[0]["response"]["status"] == "in_progress"


def test_a_response_that_is_cut_off_is_incomplete():
    *_, item, last = events_of([Said("See")], "length")
    assert last["type"] == "response.incomplete"
    assert last["response"]["incomplete_details"] == {"reason": "max_output_tokens"}
    assert item["item"]["status"] == "incomplete"


def test_a_response_that_fails_says_why():
    builder = ResponseBuilder(EMPTY)
    builder.add([Said("See")])
    item, last = builder.fail("server_error", "a step has failed")[-2:]
    assert (item["type"], last["type"]) == ("response.output_item.done", "response.failed")
    assert last["response"]["error"] == {"code": "server_error", "message": "a step has failed"}


def test_usage():
    builder = ResponseBuilder(EMPTY)
    for parts in ([Thought("Hm")], [], [Thought(".")], [Said("x")]):
        builder.add(parts, tokens=1)
    assert builder.finish("stop", USAGE)[-1]["response"]["usage"] == {
        "input_tokens": 10,
        "input_tokens_details": {"cached_tokens": 4, "cache_write_tokens": 0},
        "output_tokens": 7,
        "output_tokens_details": {"reasoning_tokens": 3},
        "total_tokens": 17,
    }


def test_probabilities_belong_to_text():
    builder = ResponseBuilder(EMPTY)
    for text, parts in [("Hm", [Thought("Hm")]), ("x", []), ("y", [Said("xy")]), ("z", [Said("z")])]:
        builder.add(parts, 1, [{"token": text, "logprob": -1.0}])
    builder.finish("stop", USAGE)
    assert [p["token"] for p in builder.output[1]["content"][0]["logprobs"]] == ["x", "y", "z"]


def test_a_response_is_the_assistants_message_for_the_next_one():
    builder = ResponseBuilder(EMPTY)
    builder.add([Thought("Hm"), Said("See "), *call(0), Said("it.")])
    builder.finish("tool_calls", USAGE)
    (message,) = reply_messages(builder.output)
    assert (message["content"], message["reasoning_content"]) == ("See it.", "Hm")
    assert message["tool_calls"][0]["function"] == {"name": "price", "arguments": {"item": "lamp"}}


TEXT = st.text(alphabet="ab \n", min_size=1, max_size=3)
REPLIES = st.lists(
    st.one_of(TEXT.map(lambda t: [Thought(t)]), TEXT.map(lambda t: [Said(t)]), st.integers(0, 9).map(call)), max_size=8
).map(lambda lists: [part for parts in lists for part in parts])


@given(REPLIES)
def test_the_events_add_up_to_the_response(parts):
    state = ResponseStreamState(input_tools=[], text_format=omit)
    grown: dict[int, str] = {}
    for event in events_of(parts):
        read = EVENT.validate_python(json.loads(json.dumps(event)))
        state.handle_event(read)
        if event["type"].endswith(".delta"):
            grown[event["output_index"]] = grown.get(event["output_index"], "") + event["delta"]
    response = Response.model_validate(event["response"])
    for index, item in enumerate(event["response"]["output"]):
        whole = item["arguments"] if item["type"] == "function_call" else item["content"][0]["text"]
        assert whole == grown.get(index, "")
    assert response.status == "completed"


def test_a_call_ends_at_once_and_one_that_is_dropped_is_incomplete():
    builder = ResponseBuilder(EMPTY)
    builder.start()
    done = builder.add(call(0))[-1]
    assert (done["type"], done["item"]["status"]) == ("response.output_item.done", "completed")
    dropped = builder.add([CallBegan(1, "call_x", "price"), CallArguments(1, '{"item": "la'), CallDropped(1)])[-1]
    assert (dropped["type"], dropped["item"]["status"]) == ("response.output_item.done", "incomplete")
    builder.add([Said("<tool_call>")])
    builder.finish("stop", USAGE)
    [message] = reply_messages(builder.output)
    assert message["content"] == "<tool_call>"
    assert [one["function"]["arguments"] for one in message["tool_calls"]] == [{"item": "lamp"}]
