"""Sessions that clients name, or that are recognised; what is reused, and what is told of it."""

from __future__ import annotations

import asyncio
import itertools
import logging

import pytest
from support.engines import held, settled
from support.http_server import serving
from support.shop_sessions import BASE, HELLO, REPORT, TASK, answered, ask, report_of, shop

from astraea_jax.frontends.http.tenants import Keys

PAGE = 4
"""Tokens of a page of these engines."""


async def test_an_agent_that_names_nothing_goes_on_from_its_own_tokens(server, chatty):
    turns, messages = await shop(server)
    assert TASK.is_right(messages[-1]["content"])
    assert len(turns) >= 3
    assert report_of(turns[0])["known"] == {"tokens": 0, "message": None, "why": "new"}
    assert report_of(turns[0])["wait"] is None
    for before, turn in itertools.pairwise(turns):
        reusable = before["usage"]["prompt_tokens"] + before["usage"]["completion_tokens"]
        report = report_of(turn)
        assert report["known"] == {"tokens": reusable, "message": None, "why": "same"}
        assert turn["usage"]["prompt_tokens_details"]["cached_tokens"] >= reusable - 1
        assert report["program"] == report_of(turns[0])["program"]
        assert (report["resumed"]["source"], report["resumed"]["why"]) == ("device", "")
        assert report["wait"]["kind"] == "tool"
    again = await ask(server, [*messages, {"role": "user", "content": "Thanks"}])
    assert report_of(again)["wait"]["kind"] == "human"
    assert report_of(again)["program"] == report_of(turns[0])["program"]
    await settled(chatty)


async def test_nothing_is_told_that_was_not_asked_for(server):
    plain = await ask(server, HELLO, astraea_report=False)
    assert "astraea" not in plain["usage"]
    asked = await ask(server, HELLO, astraea_report=False, headers={"x-astraea-report": "true"})
    assert report_of(asked)["known"]["why"] in ("new", "same", "messages")
    hinted = await ask(server, HELLO, astraea_report=False, priority=1)
    assert report_of(hinted)["hints"] == [{"hint": "priority", "outcome": "accepted"}]
    refused = await server.client.post(
        "/v1/chat/completions", json={**BASE, "messages": HELLO}, headers={"x-astraea-report": "loud"}
    )
    assert refused.status_code == 400


async def test_a_stream_tells_in_its_last_chunk(client):
    chunks = [
        chunk
        async for chunk in await client.chat.completions.create(**BASE, messages=HELLO, stream=True, extra_body=REPORT)
    ]
    assert chunks[-1].usage.astraea["known"]["why"] in ("new", "same", "messages")


async def test_where_a_prefix_ends_is_told_by_its_message(server):
    turns, messages = await shop(server, headers={"x-session-id": "differs"})
    changed = [*messages[:-1], {"role": "assistant", "content": "No."}, {"role": "user", "content": "Why?"}]
    report = report_of(await ask(server, changed, headers={"x-session-id": "differs"}))
    assert report["known"]["why"] == "messages"
    assert report["known"]["message"] == len(messages) - 1
    assert report["known"]["tokens"] >= turns[-2]["usage"]["prompt_tokens"]


async def test_history_that_goes_back_is_a_branch_and_the_session_goes_on(server):
    named = {"headers": {"x-session-id": "back"}}
    _, messages = await shop(server, **named)
    back = report_of(await ask(server, [*TASK.messages(), *messages[len(TASK.messages()) :][:2]], **named))
    assert back["program"] == "back/2"
    forth = report_of(await ask(server, [*messages, {"role": "user", "content": "Thanks"}], **named))
    assert (forth["program"], forth["known"]["why"]) == ("back", "same")


async def test_a_second_request_of_a_session_is_a_branch(server, chatty):
    named = {"headers": {"x-session-id": "twice"}}
    first = await ask(server, HELLO, **named)
    later = [*HELLO, *await answered(first), {"role": "user", "content": "And?"}]
    with held(chatty, 1) as engine:
        one = asyncio.create_task(ask(server, later, **named))
        await engine.still()
        other = asyncio.create_task(ask(server, later, **named))
        while len([1 for program in server.door.programs._busy if program[1].startswith("twice")]) < 2:
            await asyncio.sleep(0.002)
    reports = [report_of(turn) for turn in await asyncio.gather(one, other)]
    assert [report["program"] for report in reports] == ["twice", "twice/2"]
    await settled(chatty)


async def test_another_tenant_has_another_session_of_the_name(chatty):
    async with serving(chatty, keys=Keys(["first key", "second key"])) as server:
        one, other = ({"authorization": f"Bearer {key}", "x-session-id": "s"} for key in ("first key", "second key"))
        turn = await ask(server, HELLO, headers=one)
        later = [*HELLO, *await answered(turn), {"role": "user", "content": "And?"}]
        assert report_of(await ask(server, later, headers=other))["known"]["why"] == "new"
        assert report_of(await ask(server, later, headers=one))["known"]["why"] == "same"
        assert (await server.client.delete("/v1/sessions/s", headers=one)).status_code == 200
        assert (await server.client.get("/v1/sessions/s", headers=one)).status_code == 404
        assert (await server.client.get("/v1/sessions/s", headers=other)).status_code == 200


async def test_salts_of_one_tenant_share_no_history(chatty):
    async with serving(chatty, keys=Keys(["first key"])) as server:
        key = {"authorization": "Bearer first key"}
        turn = await ask(server, HELLO, headers=key, cache_salt="a")
        later = [*HELLO, *await answered(turn), {"role": "user", "content": "And?"}]
        assert report_of(await ask(server, later, headers=key, cache_salt="b"))["known"]["why"] == "new"


async def test_a_session_is_shown_and_ended(server, chatty):
    turn = await ask(server, HELLO, headers={"x-dynamo-session-id": "a/b c"})
    called = turn["choices"][0]["finish_reason"] == "tool_calls"
    shown = (await server.client.get("/v1/sessions/a/b c")).json()
    [program] = shown["programs"]
    assert shown["session_id"] == program["program"] == "a/b c"
    assert program["state"] == ("tool_wait" if called else "human_wait")
    assert program["turns"] == 1
    assert (await server.client.delete("/v1/sessions/a/b c")).json() == {"session_id": "a/b c", "deleted": True}
    for method in ("get", "delete"):
        assert (await getattr(server.client, method)("/v1/sessions/a/b c")).status_code == 404


async def test_a_session_ends_with_its_last_request(server):
    await ask(server, HELLO, headers={"x-session-id": "last", "x-dynamo-session-final": "true"})
    assert (await server.client.get("/v1/sessions/last")).status_code == 404
    assert report_of(await ask(server, HELLO, headers={"x-session-id": "last"}))["program"] == "last"


async def test_a_last_request_that_says_nothing_ends_all_programs_of_its_session(server, chatty):
    """Dynamo's clients end a session with a small request of its own, which continues none of its conversations."""
    named = {"x-session-id": "all of it"}
    _, messages = await shop(server, headers=named)
    await ask(server, messages[: len(TASK.messages()) + 2], headers=named)
    assert len((await server.client.get("/v1/sessions/all of it")).json()["programs"]) == 2
    await ask(server, HELLO, headers={**named, "x-dynamo-session-final": "true"}, max_tokens=1)
    assert (await server.client.get("/v1/sessions/all of it")).status_code == 404
    await settled(chatty, programs=True)


async def test_an_explanation_queues_nothing(server, chatty):
    named = {"x-session-id": "explained"}
    turn = await ask(server, HELLO, headers=named)
    later = [*HELLO, *await answered(turn), {"role": "user", "content": "And?"}]
    requests = chatty.work.prompt_tokens
    asked = await server.client.post("/v1/cache/explain", json={**BASE, "messages": later}, headers=named)
    assert asked.status_code == 200
    explained = asked.json()
    assert chatty.work.prompt_tokens == requests
    assert explained["program"] == "explained"
    real = await ask(server, later, headers=named)
    assert explained["known"] == report_of(real)["known"]
    assert explained["prompt_tokens"] == real["usage"]["prompt_tokens"] == sum(explained["held"].values())
    assert explained["held"]["device"] == real["usage"]["prompt_tokens_details"]["cached_tokens"]


async def test_what_no_chat_may_be_is_not_explained(server):
    turn = await ask(server, HELLO, session_id="s")
    ended = [*HELLO, turn["choices"][0]["message"]]
    for path in ("/v1/cache/explain", "/v1/chat/completions"):
        answer = await server.client.post(path, json={**BASE, "messages": ended})
        assert answer.status_code == 400
        assert "prefill" in answer.json()["error"]["message"]
    replaced = await server.client.post("/v1/sessions/s/replace_tail", json={"keep": 1, "messages": ended[1:]})
    assert replaced.status_code == 200


@pytest.mark.parametrize(
    ("path", "more"),
    [
        ("/v1/chat/completions", {}),
        ("/v1/cache/explain", {}),
        ("/v1/messages", {"max_tokens": 1}),
        ("/v1/messages/count_tokens", {}),
        ("/v1/responses", {}),
        ("/v1/cache/explain/responses", {}),
    ],
)
async def test_a_chat_that_cannot_fit_is_refused_before_it_is_tokenised(server, path, more):
    words = [{"role": "user", "content": "word " * 50_000}]
    body = {"model": "tiny", "input" if "responses" in path else "messages": words, **more}
    answer = await server.client.post(path, json=body)
    assert answer.status_code == 400
    assert "characters, which exceed the context" in answer.json()["error"]["message"]


async def test_other_apis_are_explained_too(server):
    messages = {"model": "tiny", "messages": HELLO, "max_tokens": 5}
    explained = (await server.client.post("/v1/cache/explain/messages", json=messages)).json()
    counted = (await server.client.post("/v1/messages/count_tokens", json=messages)).json()
    assert explained["prompt_tokens"] == counted["input_tokens"]
    response = await server.client.post("/v1/cache/explain/responses", json={"model": "tiny", "input": "Hello"})
    assert response.json()["prompt_tokens"] > 0
    wrong = await server.client.post("/v1/cache/explain", json={"model": "tiny", "messages": []})
    assert wrong.status_code == 400


async def test_a_fork_goes_on_from_where_its_parent_is(server, chatty):
    turn = await ask(server, HELLO, headers={"x-session-id": "stem"})
    later = [*HELLO, *await answered(turn), {"role": "user", "content": "And?"}]
    forked = await server.client.post("/v1/sessions/stem/fork", json={"session_id": "twig"})
    assert forked.json() == {"session_id": "twig", "parent_session_id": "stem"}
    for session in ("twig", "stem"):
        goes_on = await ask(server, later, headers={"x-session-id": session})
        assert (report_of(goes_on)["program"], report_of(goes_on)["known"]["why"]) == (session, "same")
        reusable = turn["usage"]["prompt_tokens"] + turn["usage"]["completion_tokens"]
        assert goes_on["usage"]["prompt_tokens_details"]["cached_tokens"] >= reusable - PAGE


@pytest.mark.parametrize(
    ("path", "body", "named"),
    [
        ("/v1/sessions/never/fork", {"session_id": "child"}, "expired"),
        ("/v1/sessions/never/fork", {"session_id": ""}, "session_id"),
        ("/v1/sessions/never/fork", {"session_id": "x" * 257}, "session_id"),
        ("/v1/sessions/never/replace_tail", {"keep": 0, "messages": HELLO}, "expired"),
        ("/v1/sessions/never/replace_tail", {"tokens": [1, 2]}, "expired"),
        ("/v1/sessions/never/replace_tail", {"keep": -1, "messages": []}, "keep"),
        ("/v1/sessions/never/replace_tail", {"keep": 1}, "either messages or tokens"),
        ("/v1/sessions/never/replace_tail", {"tokens": [10**6]}, "vocabulary"),
    ],
)
async def test_what_has_expired_or_cannot_be_is_refused(server, path, body, named):
    answer = await server.client.post(path, json=body)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert named in error["message"] or named in (error["param"] or "")
    assert "Value error" not in error["message"]  # the word of a library


async def test_a_name_that_is_taken_is_no_fork(server):
    for session in ("left", "right"):
        await ask(server, HELLO, headers={"x-session-id": session})
    answer = await server.client.post("/v1/sessions/left/fork", json={"session_id": "right"})
    assert answer.status_code == 400
    assert (await server.client.get("/v1/sessions/right")).status_code == 200


async def test_a_replaced_tail_is_computed_before_it_is_asked_for(server):
    named = {"headers": {"x-session-id": "long"}}
    _, messages = await shop(server, **named)
    keep = len(TASK.messages())
    summary = [{"role": "user", "content": "Summary: all prices are known, and nothing else was asked."}]
    replaced = await server.client.post("/v1/sessions/long/replace_tail", json={"keep": keep, "messages": summary})
    assert replaced.status_code == 200
    assert replaced.json()["computed"]
    turn = await ask(server, [*messages[:keep], *summary], **named)
    assert turn["usage"]["prompt_tokens_details"]["cached_tokens"] >= replaced.json()["tokens"] - PAGE
    assert report_of(turn)["program"] == "long"


async def test_turns_are_counted_and_logged_by_how_they_go_on(server, caplog):
    with caplog.at_level(logging.DEBUG, "astraea_jax.access"):
        turns, _ = await shop(server)
    logged = [record.turn for record in caplog.records if hasattr(record, "turn")]
    assert [turn["known"]["why"] for turn in logged] == [report_of(turn)["known"]["why"] for turn in turns]
    metrics = (await server.client.get("/metrics")).text
    assert f'turns_continued_total{{model_name="tiny",replica="",why="same"}} {len(turns) - 1}.0' in metrics


async def test_messages_go_on_and_take_hints(server):
    body = {"model": "tiny", "max_tokens": 6, "temperature": 0, **REPORT}
    system = [{"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral", "ttl": "1h"}}]
    user = [{"role": "user", "content": "Hello"}]
    first = (await server.client.post("/v1/messages", json={**body, "system": system, "messages": user})).json()
    assert first["usage"]["astraea"]["hints"] == [{"hint": "cache_control.ttl", "outcome": "accepted"}]
    system[0]["text"] = "x-anthropic-billing-header: cch=2;\nBe brief."
    later = [*user, {"role": "assistant", "content": first["content"]}, {"role": "user", "content": "And?"}]
    answer = await server.client.post("/v1/messages", json={**body, "system": system, "messages": later})
    usage = answer.json()["usage"]
    assert usage["astraea"]["known"]["why"] in ("same", "template")
    assert usage["astraea"]["known"]["tokens"] > 0
    assert answer.headers["x-cached-tokens"] == str(usage["cache_read_input_tokens"])


async def test_responses_go_on_by_their_id(server):
    body = {"model": "tiny", "max_output_tokens": 6, "temperature": 0, **REPORT}
    first = (await server.client.post("/v1/responses", json={**body, "input": "Hello"})).json()
    later = {**body, "input": "And?", "previous_response_id": first["id"]}
    usage = (await server.client.post("/v1/responses", json=later)).json()["usage"]
    assert usage["astraea"]["known"]["why"] in ("same", "template")
    assert usage["astraea"]["known"]["tokens"] > 0


async def test_a_history_of_ten_thousand_messages_hurts_nobody(server):
    messages = [{"role": ("user", "assistant")[i % 2], "content": f"Message {i}"} for i in range(10_001)]
    long = asyncio.create_task(server.client.post("/v1/chat/completions", json={"model": "tiny", "messages": messages}))
    assert (await ask(server, HELLO))["choices"]
    answer = await long
    assert answer.status_code == 400
    assert "context" in answer.json()["error"]["message"]
