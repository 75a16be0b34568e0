"""Hints of clients about the waits of their sessions, and what is told of them."""

from __future__ import annotations

import pytest
from support.shop_sessions import BASE, HELLO, TASK, answered, ask, report_of


def envelope(*actions):
    return {"protocol_version": "0.1", "message_id": "m", "actions": list(actions)}


def tool_wait(**payload):
    return {"action_id": "w", "action_type": "astraea.tool_wait", "action_version": "1.0", "payload": payload}


async def test_a_hint_with_a_request_is_what_is_predicted(server):
    hints = {"kv_hints": envelope(tool_wait(expected_ms=1234)), "prompt_cache_retention": "24h"}
    turn = await ask(server, TASK.messages(), headers={"x-session-id": "hinted"}, **hints)
    assert [hint["outcome"] for hint in report_of(turn)["hints"]] == ["accepted", "clipped"]
    messages = [*TASK.messages(), *await answered(turn)]
    wait = report_of(await ask(server, messages, headers={"x-session-id": "hinted"}))["wait"]
    assert (wait["kind"], wait["predicted_s"], wait["hinted"], wait["leased"]) == (
        "tool",
        1.234,
        "accepted",
        "accepted",
    )
    assert wait["actual_s"] >= 0


@pytest.mark.parametrize("by", ["session", "call", "header"])
async def test_a_hint_during_the_wait_finds_its_program(server, by):
    turn = await ask(server, TASK.messages(), headers={"x-session-id": f"told by {by}"})
    call = turn["choices"][0]["message"]["tool_calls"][0]["id"]
    payload = {"session": {"session_id": f"told by {by}"}, "call": {"tool_call_ids": [call]}, "header": {}}[by]
    told = await server.client.post(
        "/v1/kv_hints",
        json=envelope(
            tool_wait(expected_ms=4000, **payload),
            {"action_id": "p", "action_type": "astraea.tool_profile", "payload": {}},
            {"action_id": "k", "action_type": "kv.retain", "payload": {}},
        ),
        headers={"x-session-id": f"told by {by}"} if by == "header" else {},
    )
    assert told.json() == {
        "message_id": "m",
        "outcomes": [
            {"hint": "w", "outcome": "accepted"},
            {"hint": "p", "outcome": "ignored", "why": "it goes with a request"},
            {"hint": "k", "outcome": "ignored", "why": "unknown action"},
        ],
    }
    messages = [*TASK.messages(), *await answered(turn)]
    wait = report_of(await ask(server, messages, headers={"x-session-id": f"told by {by}"}))["wait"]
    assert (wait["kind"], wait["predicted_s"]) == ("tool", 4.0)


@pytest.mark.parametrize(
    ("payload", "outcome", "why"),
    [
        ({"expected_ms": 1, "session_id": "never"}, "ignored", "no such program"),
        ({"expected_ms": 1}, "ignored", "names no session"),
        ({"expected_ms": -1, "session_id": "never"}, "ignored", "no time"),
    ],
)
async def test_a_hint_that_concerns_nobody_says_so(server, payload, outcome, why):
    told = (await server.client.post("/v1/kv_hints", json=envelope(tool_wait(**payload)))).json()
    assert told["outcomes"][0]["outcome"] == outcome
    assert why in told["outcomes"][0]["why"]


async def test_a_hint_of_another_shape_is_refused_by_its_field(server):
    for path, body in (
        ("/v1/kv_hints", envelope(tool_wait(expected_ms="soon"))),
        ("/v1/chat/completions", {**BASE, "messages": HELLO, "kv_hints": envelope(tool_wait(expected_ms="soon"))}),
    ):
        answer = await server.client.post(path, json=body)
        assert answer.status_code == 400
        assert "expected_ms" in answer.json()["error"]["param"]
