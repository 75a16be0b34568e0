"""Messages become plain data, are refused with a sentence, and are never lost."""

from __future__ import annotations

import dataclasses
import enum
from types import MappingProxyType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from astraea_jax.models.chat import normalise_messages, plain

USER = {"role": "user", "content": "a"}


class Role(enum.StrEnum):
    USER = "user"


@dataclasses.dataclass
class Record:
    role: str
    content: str
    name: str | None = None


class Dumped:
    """Stands for Pydantic's models and the OpenAI SDK's messages."""

    def model_dump(self):
        return {"role": "user", "content": "a", "refusal": None, "tool_calls": None}


class Attributes:
    role, content = "user", "a"


@pytest.mark.parametrize(
    "message",
    [
        USER,
        MappingProxyType(USER),
        {**USER, "name": None},
        {"role": Role.USER, "content": "a"},
        Record("user", "a"),
        Dumped(),
        Attributes(),
        SimpleNamespace(role="user", content="a", tool_calls=None),
    ],
    ids=lambda message: type(message).__name__,
)
def test_every_kind_of_message(message):
    assert normalise_messages([USER, message]) == [USER, USER]
    assert type(normalise_messages([message])[0]["role"]) is str


def test_tool_calls_of_objects():
    function = SimpleNamespace(name="price", arguments='{"item": 47}')
    call = SimpleNamespace(id="c", type="function", function=function)
    [message] = normalise_messages([SimpleNamespace(role="assistant", content=None, tool_calls=[call])])
    expected = {"id": "c", "type": "function", "function": {"name": "price", "arguments": {"item": 47}}}
    assert message == {"role": "assistant", "tool_calls": [expected]}


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ('{"a": [1, null]}', {"a": [1, None]}),
        ({"a": 1}, {"a": 1}),
        ("", {}),
        (" \n", {}),
        (None, {}),
        ("{}", {}),
        ("{broken", "{broken"),
        ("[1]", "[1]"),
        ("[" * 100_000, "[" * 100_000),
    ],
    ids=lambda value: repr(value)[:20],
)
def test_arguments_are_decoded_from_json(written, read):
    call = {"function": {"name": "f", "arguments": written}}
    given: dict[str, Any] = {"role": "assistant", "tool_calls": [call]}
    [message] = normalise_messages([given])
    assert message["tool_calls"][0]["function"]["arguments"] == read
    assert given["tool_calls"][0]["function"]["arguments"] == written  # the caller's stays as it is


def test_text_parts():
    parts = [{"type": "text", "text": "a", "cache_control": {}}, "b", {"type": "input_text", "text": "c"}]
    assert normalise_messages([{"role": "user", "content": parts}])[0]["content"] == [
        {"type": "text", "text": letter} for letter in "abc"
    ]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ([{"type": "image_url", "image_url": {"url": "x"}}], "'image_url' is not served"),
        ([{"type": "text"}], "'text' is not served"),
        ([{"text": "a"}], "None is not served"),
        ([7], "7 is not served"),
    ],
)
def test_other_parts_are_refused(content, words):
    with pytest.raises(ValueError, match=words):
        normalise_messages([{"role": "user", "content": content}])


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ("hello", "list of chat messages, not str"),
        (USER, "list of chat messages, not dict"),
        (7, "not int"),
        (["hello"], "needs a role"),
        ([{"content": "a"}], "needs a role"),
        ([{"role": 1, "content": "a"}], "needs a role"),
        ([[USER]], "needs a role"),
        ([object()], "cannot hold object objects"),
        ([None], "needs a role"),
        ([Record], "cannot hold type objects"),
        ([{"role": "user", "content": b"a"}], "cannot hold bytes"),
        ([{"role": "user", "content": {1: 2}}], "keys in messages and tools must be strings"),
    ],
)
def test_what_is_no_message(messages, words):
    with pytest.raises(TypeError, match=words):
        normalise_messages(messages)


def test_none_at_all_and_too_deep():
    with pytest.raises(ValueError, match="no messages"):
        normalise_messages([])
    circle: dict[str, Any] = {"role": "user"}
    circle["content"] = circle
    with pytest.raises(ValueError, match="nested too deeply"):
        normalise_messages([circle])
    with pytest.raises(ValueError, match="needs a function"):
        normalise_messages([{"role": "assistant", "tool_calls": ["price"]}])


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=10,
)


@given(JSON)
def test_json_stays_as_it_is(value):
    assert plain(value) == value


@given(st.dictionaries(st.sampled_from(["content", "name", "tool_call_id", "reasoning", "x"]), JSON, max_size=4))
def test_normalising_is_idempotent(fields):
    try:
        once = normalise_messages([{"role": "user", **fields}])
    except ValueError:
        return
    assert normalise_messages(once) == once


def test_numbers_of_numpy():
    assert plain([np.int64(3), np.bool_(False), np.float32(0.5)]) == [3, False, 0.5]
