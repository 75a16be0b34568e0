"""What messages mean, whatever clients make of them."""

from __future__ import annotations

import json

import pytest

from astraea_jax.agents.meaning import answers_calls, digests, restored
from astraea_jax.models.chat import normalise_messages

USER = {"role": "user", "content": "How much?"}


def calling(arguments, id="a", **fields):
    call = {"id": id, "type": "function", "function": {"name": "price", "arguments": arguments}}
    return {"role": "assistant", "content": "", "tool_calls": [call], **fields}


def meaning(*messages):
    return digests(normalise_messages([USER, *messages]))


SAME = [
    (calling({"item": "lamp", "n": 1}), calling('{"n":1,  "item":"lamp"}', id="other")),
    (calling({"n": 2.0, "deep": [{"x": -0.0}]}), calling('{"n": 2, "deep": [{"x": 0}]}')),
    (calling({"é": "\U0001f600"}), calling('{"\\u00e9": "\\ud83d\\ude00"}')),
    (calling({}), calling("")),
    (calling({}), calling({}, content=None)),
    (calling({}), calling({}, reasoning="Hm.")),
    (calling("no JSON"), calling("no JSON")),
    ({"role": "assistant", "content": " It is 14.\n"}, {"role": "assistant", "content": "It is 14."}),
    ({"role": "user", "content": "ab"}, {"role": "user", "content": [{"type": "text", "text": t} for t in "ab"]}),
    ({"role": "tool", "content": "14", "tool_call_id": "a"}, {"role": "tool", "content": "14", "tool_call_id": "b"}),
]
OTHER = [
    (calling({"n": 1}), calling({"n": True})),
    (calling({"n": 1}), calling({"n": "1"})),
    (calling({"n": None}), calling({})),
    (calling({"n": [1, 2]}), calling({"n": [2, 1]})),
    (calling({}), {"role": "assistant", "content": ""}),
    ({"role": "user", "content": "a"}, {"role": "system", "content": "a"}),
    ({"role": "user", "content": "a "}, {"role": "user", "content": "a"}),
    ({"role": "assistant", "content": '[["price", {}]]'}, calling({})),
]


@pytest.mark.parametrize(("one", "other"), SAME)
def test_what_clients_change_means_the_same(one, other):
    assert meaning(one) == meaning(other)


@pytest.mark.parametrize(("one", "other"), OTHER)
def test_what_says_something_else_means_something_else(one, other):
    assert meaning(one)[-1] != meaning(other)[-1]
    assert meaning(one)[:1] == meaning(other)[:1]


def test_a_digest_vouches_for_all_messages_before():
    first, second = {"role": "user", "content": "ab"}, {"role": "user", "content": "a"}
    assert meaning(first, second)[-1] != meaning(second, first)[-1]
    assert meaning(first)[-1] != meaning(second, {"role": "user", "content": "b"})[-1]


def test_half_a_surrogate_pair_has_a_meaning():
    assert meaning({"role": "user", "content": "\ud800"}) != meaning({"role": "user", "content": "\ud801"})


def test_a_turn_is_restored_with_the_clients_ids():
    held, given = normalise_messages([calling({"b": 1, "a": 2}, reasoning="Hm."), calling('{"a": 2, "b": 1}', id="x")])
    whole = restored(held, given)
    assert whole["reasoning_content"] == "Hm."
    assert whole["tool_calls"][0]["id"] == "x"
    assert json.dumps(whole["tool_calls"][0]["function"]["arguments"]) == '{"b": 1, "a": 2}'


def test_a_job_goes_on_as_long_as_calls_are_answered():
    answer, reminder = {"role": "tool", "content": "14"}, {"role": "user", "content": "Remember."}
    assert answers_calls([answer, reminder])
    assert not answers_calls([reminder])
