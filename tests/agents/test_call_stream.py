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
    assert parts[:1] == ([] if format == "pythonic" else [CallBegan(0, named(format).call_id(0), "price")])


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
    assert parts[0] == CallBegan(0, named(format).call_id(0), "price")
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


ENDS = {
    "llama3_json": None,  # without a tag, only the end of the turn tells that it is no text
    "pythonic": "<|python_end|>",
    "pythonic_lines": "</function_calls>",
    "qwen3_coder": "</function>",
    "gemma": "<tool_call|>",
    "harmony": None,
    "deepseek_dsml": "</｜DSML｜invoke>",
    "mistral": "}}",
    "mistral_named": "}",
    "json": "</tool_call>",
    "hermes": "</tool_call>",
    "glm": "</tool_call>",
    "deepseek": "<｜tool▁call▁end｜>",
    "deepseek_fenced": "<｜tool▁call▁end｜>",
}
"""Last characters of a call."""


@pytest.mark.parametrize("name", sorted(name for name in ENDS if ENDS[name]))
def test_a_call_ends_with_its_last_character(name: str) -> None:
    format, write = WRITERS[name]
    text = write("", "", [LAMP, ("stock", {"item": "desk"})])
    reader = ReplyReader(named(format), "", TOOLS)
    end = text.index(ENDS[name] or "") + len(ENDS[name] or "")
    assert not any(isinstance(part, CallEnded) for part in reader.feed(text[: end - 1]))
    ended = [part.call for part in reader.feed(text[end - 1 : end]) if isinstance(part, CallEnded)]
    assert [(call.name, call.arguments) for call in ended][:1] == [LAMP]
    assert len(ended) == (2 if format == "pythonic" else 1)


@pytest.mark.parametrize("name", ["harmony", "llama3_json"])
def test_a_call_that_ends_with_the_turn(name: str) -> None:
    format, write = WRITERS[name]
    reader = ReplyReader(named(format), "", TOOLS)
    assert not any(isinstance(part, CallEnded) for part in reader.feed(write("", "", [LAMP])))
    assert any(isinstance(part, CallEnded) for part in reader.finish())


LAMP_JSON, DESK_JSON = (
    '{"name": "price", "arguments": {"item": "lamp"}}',
    '{"name": "stock", "arguments": {"item": "desk"}}',
)
LAMP_CALL, DESK_CALL = ("price", {"item": "lamp"}), ("stock", {"item": "desk"})


@pytest.mark.parametrize(
    ("format", "text", "calls", "said", "errors"),
    [
        ("mistral", f"[TOOL_CALLS][{LAMP_JSON}, {DESK_JSON}]", [LAMP_CALL, DESK_CALL], "", 0),
        ("mistral", f"[TOOL_CALLS] [{LAMP_JSON},\n{DESK_JSON}] ", [LAMP_CALL, DESK_CALL], "", 0),
        ("mistral", f"[TOOL_CALLS]{LAMP_JSON}[TOOL_CALLS][{DESK_JSON}]", [LAMP_CALL, DESK_CALL], "", 0),
        ("mistral", f"[TOOL_CALLS][{LAMP_JSON}][TOOL_CALLS][{DESK_JSON}]", [LAMP_CALL, DESK_CALL], "", 0),
        ("mistral", f"[TOOL_CALLS][{LAMP_JSON}", [LAMP_CALL], "", 0),
        ("mistral", f"[TOOL_CALLS][{LAMP_JSON}] Wait.", [LAMP_CALL], "Wait.", 0),
        ("mistral", f"[TOOL_CALLS][{LAMP_JSON}, {DESK_JSON.replace(chr(34), chr(39))}]", [LAMP_CALL, DESK_CALL], "", 0),
        ("mistral", f"[TOOL_CALLS][{LAMP_JSON}, {{oops]", [LAMP_CALL], ", {oops]", 1),
        ("mistral", f"[TOOL_CALLS][{LAMP_JSON.replace(chr(34), chr(39))}, {DESK_JSON}]", [LAMP_CALL, DESK_CALL], "", 0),
        ("llama3_json", f"So: <|python_tag|>{LAMP_JSON}; {DESK_JSON}", [LAMP_CALL, DESK_CALL], "So:", 0),
        ("json", f"<|python_tag|>{LAMP_JSON}<|python_tag|>{DESK_JSON}", [LAMP_CALL, DESK_CALL], "", 0),
        ("mistral", '[TOOL_CALLS]price[ARGS]{"item": "lamp"} Wait.', [LAMP_CALL], " Wait.", 0),
    ],
)
def test_a_region_without_a_closing_tag_ends_with_its_calls(
    format: str, text: str, calls: Any, said: str, errors: int
) -> None:
    for pieces in ([text], list(text), [text[:40], text[40:]]):
        reader = ReplyReader(named(format), "", TOOLS)
        for piece in pieces:
            reader.feed(piece)
        reader.finish()
        reply = reader.reply
        assert [(call.name, call.arguments) for call in reply.calls] == calls
        assert reply.text.strip() == said.strip()
        assert len(reply.errors) == errors
        assert "".join(span.text for span in reader.spans) == text


def test_a_call_that_ends_an_open_thought_is_run_with_markup_behind_it() -> None:
    for format, text in (
        ("qwen3_coder", WRITERS["qwen3_coder"][1]("", "", [LAMP])),
        ("mistral", WRITERS["mistral"][1]("", "", [LAMP])),
    ):
        opening = named(format).thoughts[0][0]
        reader = ReplyReader(named(format), f"<|im_start|>assistant\n[/INST]{opening}", TOOLS)
        reader.feed(f"Maybe: {text}")
        reader.finish()
        assert [(call.name, call.arguments) for call in reader.reply.calls] == [LAMP]
