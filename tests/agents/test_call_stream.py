"""Arguments of calls come while they are written, each call's end at once, and what is no call is never whole JSON."""

from __future__ import annotations

import json
from typing import Any

import pytest
from support.call_writers import WRITERS

from astraea_jax.agents.formats import named
from astraea_jax.agents.reply import CallArguments, CallBegan, CallDropped, CallEnded, Part, ReplyReader, Said

TOOLS = [{"type": "function", "function": {"name": name, "parameters": {}}} for name in ("price", "stock")]
LAMP = ("price", {"item": "lamp", "count": 2})
STREAMED = ("json", "hermes", "llama3_json", "mistral", "mistral_named", "harmony", "deepseek", "deepseek_fenced")
"""Ways to write arguments as JSON."""


def parts_of(format: str, text: str, **options: Any) -> list[Part]:
    """The parts of a turn that comes character by character."""
    reader = ReplyReader(named(format), "", TOOLS, **options)
    return [part for char in text for part in reader.feed(char)] + reader.finish()


@pytest.mark.parametrize("name", STREAMED)
def test_arguments_come_as_they_are_written(name: str) -> None:
    format, write = WRITERS[name]
    reader = ReplyReader(named(format), "", TOOLS)
    text = write("", "", [("price", {"item": "x" * 20, "count": 2})])
    told = ""
    for at, char in enumerate(text):
        told += "".join(part.text for part in reader.feed(char) if isinstance(part, CallArguments))
        if "xxx" in text[:at] and text[at] == "x":
            assert len(told) >= len('{"item": "x')
            assert text[: at + 1].count("x") - told.count("x") == text.partition('"item"')[0].count("x")


@pytest.mark.parametrize("name", sorted(WRITERS))
def test_a_name_comes_before_the_arguments_end(name: str) -> None:
    format, write = WRITERS[name]
    text = write("", "", [LAMP])
    reader = ReplyReader(named(format), "", TOOLS)
    parts = reader.feed(text[: text.index("lamp") + 2])
    assert parts[:1] == ([] if format == "pythonic" else [CallBegan(0, "call_0", "price")])


@pytest.mark.parametrize(
    ("format", "text", "told"),
    [
        ("hermes", '<tool_call>{"name": "price", "arguments": {"item": "la', '{"item": "la'),
        ("hermes", '<tool_call>{"name": "price", "arguments": {"item": 1}, "x": 2}</tool_call>', '{"item": 1'),
        ("hermes", '<tool_call>{"name": "price", "arguments": {"a": 1, "a": 2}}</tool_call>', '{"a": 1, "a": 2'),
        ("mistral", '[TOOL_CALLS]price[ARGS]{"item": 1]', '{"item": 1'),
        ("llama3_json", '{"name": "price", "parameters": {"item": 1}} is how I would ask.', '{"item": 1'),
        ("qwen3_coder", "<function=price>\n<parameter=item>\nla", ""),
    ],
)
def test_what_turns_out_unreadable_is_dropped_and_said(format: str, text: str, told: str) -> None:
    parts = parts_of(format, text)
    assert parts[0] == CallBegan(0, "call_0", "price")
    assert "".join(part.text for part in parts if isinstance(part, CallArguments)) == told
    assert [part for part in parts if not isinstance(part, CallArguments | Said)] == [parts[0], CallDropped(0)]
    assert "".join(part.text for part in parts if isinstance(part, Said)) == text


def test_a_call_after_a_dropped_one_has_an_index_and_an_id_of_its_own() -> None:
    text = '<tool_call>{"name": "price", "arguments": {"item": }}</tool_call>' + WRITERS["hermes"][1]("", "", [LAMP])
    ended = [part for part in parts_of("hermes", text) if isinstance(part, CallEnded)]
    assert [(part.index, part.call.id, part.call.arguments) for part in ended] == [(1, "call_1", LAMP[1])]


@pytest.mark.parametrize(
    "body",
    [
        "{'item': 'lamp', 'count': 2}",
        '{"item": "lamp", "count": 2,}',
        '{"item": "lamp", \'count\': 2}',
        '"{\\"item\\": \\"lamp\\", \\"count\\": 2}"',
    ],
)
def test_sloppy_arguments_come_with_the_end(body: str) -> None:
    parts = parts_of("hermes", f'<tool_call>{{"name": "price", "arguments": {body}}}</tool_call>')
    assert not any(isinstance(part, CallDropped) for part in parts)
    told = "".join(part.text for part in parts if isinstance(part, CallArguments))
    assert told == json.dumps(LAMP[1])


def test_json_that_names_no_tool_is_not_told_as_a_call() -> None:
    text = '{"name": "Ada", "arguments": {"for": 1}}'
    assert all(isinstance(part, Said) for part in parts_of("hermes", text))


def test_without_early_calls_none_is_dropped() -> None:
    text = '<tool_call>{"name": "price", "arguments": {"item": "la'
    assert parts_of("hermes", text, early=False) == [Said(text)]
    whole = parts_of("hermes", WRITERS["hermes"][1]("", "", [LAMP]), early=False)
    assert [type(part) for part in whole] == [CallBegan, CallArguments, CallEnded]
