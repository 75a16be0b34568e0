"""Tests that hints are bounded, and that each of them gets an outcome."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from astraea_jax.frontends.hint_fields import HintFields, KvHints
from astraea_jax.frontends.hints import (
    LOWEST_PRIORITY,
    NO_HINTS,
    Outcome,
    read_hints,
)
from astraea_jax.scheduler.wait import MAX_HINT_S


def action(kind, payload, **more):
    return {"action_id": "a", "action_type": kind, "action_version": "1.0", "payload": payload, **more}


def envelope(*actions, **more):
    return {"protocol_version": "0.1", "message_id": "m", "actions": list(actions), **more}


def hints(ttls=(), **body):
    return read_hints(HintFields.model_validate(body), ttls)


def outcomes(read):
    return [(outcome.hint, outcome.outcome) for outcome in read.outcomes]


def test_no_hints_are_no_hints():
    assert hints() == NO_HINTS
    assert NO_HINTS.expected_of([]) is None
    assert NO_HINTS.expected_of(["search"]) is None


def test_an_announced_wait_counts_for_tools_only():
    read = hints(kv_hints=envelope(action("astraea.tool_wait", {"expected_ms": 1500, "p90_ms": 3000})))
    assert read.expected_of(["search"]) == 1.5
    assert read.expected_of([]) is None
    assert outcomes(read) == [("a", "accepted")]


def test_a_profile_counts_if_it_names_every_tool_that_was_called():
    read = hints(kv_hints=envelope(action("astraea.tool_profile", {"search": 2000, "read": 100})))
    assert read.expected_of(["search", "read"]) == 2.0
    assert read.expected_of(["read"]) == 0.1
    assert read.expected_of(["read", "write"]) is None
    assert read.expected_of([]) is None


def test_the_time_between_requests_counts_for_every_wait():
    read = hints(nvext={"agent_hints": {"iat": 250, "osl": 100, "speculative_prefill": True}})
    assert read.expected_of([]) == read.expected_of(["search"]) == 0.25
    assert outcomes(read) == [
        ("nvext.agent_hints.iat", "accepted"),
        ("nvext.agent_hints.osl", "ignored"),
        ("nvext.agent_hints.speculative_prefill", "ignored"),
    ]


@pytest.mark.parametrize(
    ("body", "keep_s", "said"),
    [
        ({"cache_control": {"type": "ephemeral", "ttl": "5m"}}, 300, [("cache_control.ttl", "accepted")]),
        ({"nvext": {"cache_control": {"ttl": "1h"}}}, 3600, [("nvext.cache_control.ttl", "accepted")]),
        ({"cache_control": {"type": "ephemeral"}}, None, []),
        ({"cache_control": {"ttl": "7d"}}, None, [("cache_control.ttl", "ignored")]),
        ({"prompt_cache_retention": "24h"}, MAX_HINT_S, [("prompt_cache_retention", "clipped")]),
        ({"prompt_cache_retention": "in_memory"}, None, [("prompt_cache_retention", "accepted")]),
        ({"prompt_cache_retention": "for ever"}, None, [("prompt_cache_retention", "ignored")]),
    ],
)
def test_leases(body, keep_s, said):
    read = hints(**body)
    assert read.keep_s == keep_s
    assert outcomes(read) == said


def test_the_longest_lease_of_a_prompts_parts_counts():
    assert hints(ttls=["5m", "1h", "5m"]).keep_s == 3600


@pytest.mark.parametrize(
    ("body", "priority", "said"),
    [
        ({"priority": 3}, 3, [("priority", "accepted")]),
        ({"priority": -3}, 0, [("priority", "clipped")]),
        ({"priority": 2**40}, LOWEST_PRIORITY, [("priority", "clipped")]),
        ({"nvext": {"agent_hints": {"priority": 5}}}, 0, [("nvext.agent_hints.priority", "clipped")]),
        ({"nvext": {"agent_hints": {"priority": -5}}}, 5, [("nvext.agent_hints.priority", "accepted")]),
        (
            {"priority": 1, "nvext": {"agent_hints": {"priority": -5}}},
            1,
            [("nvext.agent_hints.priority", "ignored"), ("priority", "accepted")],
        ),
    ],
)
def test_priorities_have_one_polarity_and_only_fall(body, priority, said):
    read = hints(**body)
    assert read.priority == priority
    assert outcomes(read) == said


@pytest.mark.parametrize(
    ("payload", "expected_s", "outcome"),
    [
        ({"expected_ms": 1e300}, MAX_HINT_S, "clipped"),
        ({"expected_ms": math.inf}, MAX_HINT_S, "clipped"),
        ({"expected_ms": math.nan}, None, "ignored"),
        ({"expected_ms": -1}, None, "ignored"),
        ({"expected_ms": 0}, 0, "accepted"),
        ({"expected_ms": 5000, "max_ms": 1000}, 1, "clipped"),
        ({"expected_ms": 5000, "max_ms": -1}, 5, "accepted"),
        ({"expected_ms": 5000, "max_ms": math.nan}, 5, "accepted"),
        ({"expected_ms": math.nan, "max_ms": 1000}, None, "ignored"),
        ({"expected_ms": 1e308, "max_ms": 1e307}, MAX_HINT_S, "clipped"),
    ],
)
def test_absurd_times_have_an_outcome(payload, expected_s, outcome):
    read = hints(kv_hints=envelope(action("astraea.tool_wait", payload)))
    assert read.tools_s == expected_s
    assert outcomes(read) == [("a", outcome)]


def test_what_is_not_known_is_skipped_and_said():
    read = hints(
        kv_hints=envelope(action("vllm.set_priority", {"value": 10}), {"action_type": "kv.retain", "payload": "?"})
    )
    assert read.outcomes == (
        Outcome("a", "ignored", "unknown action"),
        Outcome("kv_hints.actions.1", "ignored", "unknown action"),
    )
    old = hints(kv_hints=envelope(action("astraea.tool_wait", {"expected_ms": 1}), protocol_version="9.0"))
    assert old.outcomes == (Outcome("a", "ignored", "unknown protocol_version"),)
    assert old.tools_s is None


@pytest.mark.parametrize(
    ("body", "where"),
    [
        ({"kv_hints": []}, "kv_hints"),
        ({"kv_hints": {"message_id": "m", "actions": []}}, "protocol_version"),
        ({"kv_hints": envelope(action("astraea.tool_wait", {}))}, "expected_ms"),
        ({"kv_hints": envelope(action("astraea.tool_wait", {"expected_ms": "1"}))}, "expected_ms"),
        ({"kv_hints": envelope(action("astraea.tool_wait", {"expected_ms": True}))}, "expected_ms"),
        ({"kv_hints": envelope(action("astraea.tool_profile", {"search": "slow"}))}, "search"),
        ({"kv_hints": envelope(action("astraea.tool_profile", dict.fromkeys(map(str, range(257)), 1)))}, "payload"),
        ({"kv_hints": envelope(*[action("x", {})] * 65)}, "actions"),
        ({"kv_hints": envelope({"action_id": "a"})}, "action_type"),
        ({"nvext": {"agent_hints": {"iat": "soon"}}}, "iat"),
        ({"priority": "high"}, "priority"),
        ({"priority": 1.5}, "priority"),
        ({"cache_control": "5m"}, "cache_control"),
    ],
)
def test_another_shape_is_refused_by_its_field(body, where):
    with pytest.raises(ValidationError) as refused:
        HintFields.model_validate(body)
    assert where in str([error["loc"] for error in refused.value.errors()])


NUMBERS = st.floats() | st.integers(-(2**70), 2**70)


@given(
    actions=st.lists(
        st.builds(lambda n: action("astraea.tool_wait", {"expected_ms": n, "max_ms": n}), NUMBERS)
        | st.builds(lambda n, t: action("astraea.tool_profile", {t: n}), NUMBERS, st.text(max_size=5))
        | st.builds(lambda t: action(t, None), st.text(max_size=9)),
        max_size=5,
    ),
    agent=st.fixed_dictionaries({}, optional={"iat": NUMBERS, "priority": st.integers(-(2**70), 2**70)}),
    priority=st.none() | st.integers(-(2**70), 2**70),
    ttl=st.none() | st.text(max_size=3) | st.sampled_from(["5m", "1h"]),
)
def test_whatever_comes_is_within_bounds_and_has_an_outcome(actions, agent, priority, ttl):
    body = {"kv_hints": envelope(*actions), "nvext": {"agent_hints": agent}, "priority": priority}
    read = hints(**body, cache_control={"ttl": ttl})
    for time in (read.expected_s, read.tools_s, *read.profile.values()):
        assert time is None or 0 <= time <= MAX_HINT_S
    assert read.keep_s is None or 0 < read.keep_s <= MAX_HINT_S
    assert 0 <= read.priority <= LOWEST_PRIORITY
    assert len(read.outcomes) == len(actions) + len(agent) + (priority is not None) + (ttl is not None)
    assert all(outcome.why for outcome in read.outcomes if outcome.outcome != "accepted")
    assert all(outcome.plain()["outcome"] == outcome.outcome for outcome in read.outcomes)


def test_an_envelope_is_a_body_of_its_own():
    assert KvHints.model_validate(envelope()).actions == []
