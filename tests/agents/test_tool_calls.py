"""Whatever a model writes is read, or becomes a call that says what was wrong."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from astraea_jax.agents.tool_calls import (
    MAX_CALL_CHARS,
    MAX_CALLS,
    MAX_DEPTH,
    THOUGHT_TAGS,
    ToolCall,
    assistant_message,
    parse,
)


def wrapped(name: str, arguments: Any) -> str:
    body = json.dumps({"name": name, "arguments": arguments}, ensure_ascii=False)
    return f"<tool_call>\n{body}\n</tool_call>"


def test_text_without_calls() -> None:
    assert parse("  The price is 14 < 15.\n") == ("The price is 14 < 15.", [])


def test_parallel_calls_with_text_between() -> None:
    content, calls = parse(f"Let me see.\n{wrapped('price', {'item': 'lamp'})} and {wrapped('stock', {})}", first=3)
    assert content == "Let me see.\n and"
    assert calls == [ToolCall("call_3", "price", {"item": "lamp"}), ToolCall("call_4", "stock", {})]


TAGS = ["</tool_call>", "<tool_call>", "<think>", "</think>", "<|python_tag|>", "[TOOL_CALLS]", "```", "'", ";"]
TEXT = st.text(st.characters(codec="utf-8")) | st.lists(st.sampled_from([*TAGS, '"', "\\"])).map("".join)
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
    [*TAGS, '{"name": "f"', "{'name': 'f'", ', "arguments": {', ', "x": 1', "}", '"', "\\", "[", "x", "<", ",", "None"]
)
TEXTS = st.lists(PIECES | st.text(st.characters(), max_size=3), max_size=30).map("".join)  # half surrogates, too


@given(text=TEXTS, tools=st.sampled_from([None, (), ("f",)]))
def test_any_text_can_be_read(text: str, tools: Any) -> None:
    content, calls = parse(text, 7, tools)
    assert [call.id for call in calls] == [f"call_{7 + i}" for i in range(len(calls))]
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
        ('{"name": "price", "arguments": "{} {}"}', '"arguments" must be an object'),
        ('{"name": "price", "input": ["lamp"]}', '"input" must be an object'),
        ('{"name": "price", "item": "lamp"}', 'unknown key "item" beside "name"'),
        ('{"name": "price", "id": 47}', 'unknown key "id"'),
        ('{"name": "price", "type": "lamp", "arguments": {}}', 'unknown key "type"'),
        ('{"function": {"name": "price"}, "arguments": {"item": "lamp"}}', 'unknown key "arguments"'),
        ('{"name": "price", "arguments": {}, "parameters": {"item": "lamp"}}', 'both "arguments" and "parameters"'),
        ('{"name": "price", "arguments": {"item": 1}, "arguments": {}}', "the key 'arguments' appears twice"),
        ('{"name": "price", "arguments": {"item": 1, "item": 2}}', "the key 'item' appears twice"),
        ('{"name": "price", "arguments": {"item": 1e999}}', "1e999 is too large a number"),
        ('{"name": "price", "arguments": {}} for a lamp', "Expecting value"),
        ('{"name": "price", "arguments": {}} {item: "lamp"}', "Expecting property name"),
        ('{"name": "price", "arguments": [,]}', "Expecting value"),
        ("{'name': 'price', 'arguments': {'item': 'it's'}}", "Expecting property name"),
        ("{'name': 'price', 'arguments': {'item': r'lamp'}}", "Expecting property name"),
        ("[]", 'expected {"name"'),
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


PRICE = {"item": "lamp"}


@pytest.mark.parametrize(
    "body",
    [
        '{"name": "price", "parameters": {"item": "lamp"}}',
        '{"name": "price", "args": {"item": "lamp"}}',
        '{"function": "price", "input": {"item": "lamp"}}',
        '{"tool_name": "price", "params": {"item": "lamp"}}',
        r'{"type": "function", "function": {"name": "price", "arguments": "{\"item\": \"lamp\"}"}, "id": "x"}',
        '{"type": "tool_use", "id": "toolu_1", "name": "price", "input": {"item": "lamp"}}',
        '[{"name": "price", "arguments": {"item": "lamp"}}]',
        '```json\n{"name": "price", "arguments": {"item": "lamp"}}\n```',
        '{"name": "price", "arguments": {"item": "lamp",},}',
        "{'name': 'price', 'arguments': {'item': 'lamp'}}",
        """{'name': 'price', 'arguments': "{'item': 'lamp'}"}""",
    ],
)
@pytest.mark.parametrize(
    "tags", [("<tool_call>", "</tool_call>"), ("<tool_call>", ""), ("<|python_tag|>", ""), ("", "")]
)
def test_calls_as_models_write_them(body: str, tags: tuple[str, str]) -> None:
    content, calls = parse(f"{tags[0]}\n{body}\n{tags[1]}", 0, ["price"])
    assert (content, calls) == ("", [ToolCall("call_0", "price", PRICE)])


@pytest.mark.parametrize(
    ("written", "value"),
    [
        ('"a\tb\nc\x00"', "a\tb\nc\x00"),
        ("True", True),
        ("[None, False, ]", [None, False]),
        ("""'say "hi"'""", 'say "hi"'),
        (r"'it\'s'", "it's"),
        (r'"it\'s"', "it's"),
        (r"'\\ \u00e9 \n'", "\\ é \n"),
        ("'</tool_call> <tool_call>'", "</tool_call> <tool_call>"),
        ('"True, }", "z": True', "True, }"),
    ],
)
def test_loose_json(written: str, value: Any) -> None:
    _, [call] = parse(f'<tool_call>{{"name": "f", "arguments": {{"x": {written}}}}}</tool_call>')
    assert call.error is None
    assert call.arguments["x"] == value


@pytest.mark.parametrize("empty", ['"arguments": ""', '"arguments": null', '"arguments": {}', '"parameters": " "'])
def test_empty_arguments(empty: str) -> None:
    assert parse(f'<tool_call>{{"name": "now", {empty}}}</tool_call>')[1] == [ToolCall("call_0", "now")]


A, B = '{"name": "a", "arguments": {}}', '{"name": "b", "parameters": {"x": 1}}'
BOTH = [ToolCall("call_0", "a"), ToolCall("call_1", "b", {"x": 1})]


@pytest.mark.parametrize(
    "text",
    [
        f"<tool_call>{A}\n{B}</tool_call>",
        f"<tool_call>{A}<tool_call>{B}</tool_call>",
        f"<tool_call>{A}</tool_call>\n<tool_call>{B}",
        f"<tool_call>{A}<tool_call>\n<tool_call>{B}<tool_call>",
        f"<tool_call>[{A}, {B}]</tool_call>",
        f"<|python_tag|>{A}; {B}",
        f"<|python_tag|>{A}<|python_tag|>{B}",
        f"[TOOL_CALLS][{A}, {B}]",
        f"{A};{B}",
        f"{A}\n{B}",
        f"```json\n[{A}, {B}]\n```",
        f"```\n<tool_call>{A}</tool_call>\n```\n```json\n<tool_call>{B}</tool_call>\n```",
    ],
)
def test_several_calls(text: str) -> None:
    assert parse(text) == ("", BOTH)


@pytest.mark.parametrize(
    ("text", "tools"),
    [
        ('{"name": "price", "parameters": {}}', ()),
        ('{"name": "Ann", "parameters": {"age": 4}}', ("price",)),
        ('{"name": "price"}', ("price",)),
        ('{"name": "price", "value": 3}', ("price",)),
        ('{"name": "Ann", "input": 3}', None),
        ('{"name": "Ann", "parameters": {}, "age": 4}', None),
        ('I would write {"name": "price", "parameters": {}}.', ("price",)),
        ('{"name": "price", "parameters": {}, but no', ("prices",)),
        ('[1, 2, {"a": "b"}]', None),
        ("{broken", ("price",)),
        ("[" * 100_000, ("price",)),
        ("[" * 30_000, ("price",)),
        ("", ("price",)),
    ],
)
def test_json_that_is_no_call_is_text(text: str, tools: Any) -> None:
    assert parse(text, 0, tools) == (text, [])


@pytest.mark.parametrize(
    "text",
    [
        '{"name": "price", "parameters": {"item": "lamp"}',
        '{"name": "price", "parameters": {"item": "lamp"}} is a call.',
        '{"name": "price", "parameters": {"item": "lamp"}, "item": "sofa"}',
        '{"name": "price", "parameters": ["lamp"]}',
        '[{"name": "price", "parameters": {"item": "lamp"}}, {"name": 3}]',
    ],
)
def test_a_damaged_call_without_tags_says_so(text: str) -> None:
    assert [bool(call.error) for call in parse(text, 0, ["price"])[1]] == [True]


DRAFT = wrapped("delete", {"path": "a"})
CALL = wrapped("price", PRICE)
BROKEN = '<tool_call>{"name": "del'


@pytest.mark.parametrize("case", [str.lower, str.upper, str.title])
@pytest.mark.parametrize("tags", THOUGHT_TAGS.items())
def test_a_draft_in_a_thought_of_any_kind_is_not_run(tags, case):
    begin, end = map(case, tags)
    said, calls = parse(f"{begin}{DRAFT}{end}{CALL}")
    assert [(call.name, call.error) for call in calls] == [("price", None)]
    assert said == f"{begin}{DRAFT}{end}"
    assert parse(f"{DRAFT}{end}none")[1] == parse(f"{begin}{DRAFT}")[1] == []


@pytest.mark.parametrize(
    "thought", [f"maybe {DRAFT}", BROKEN, f"{BROKEN}...</tool_call>", "the <tool_call> tag", "", DRAFT * 99]
)
@pytest.mark.parametrize("begin", ["<think>\n", "", "[THINK]", "<think>I could</think>so\n<think>"])
@pytest.mark.parametrize("call", [CALL, "", '{"name": "price", "parameters": {"item": "lamp"}}', "Fine."])
def test_drafts_in_a_thought_are_not_run(thought: str, begin: str, call: str) -> None:
    end = "[/THINK]" if begin == "[THINK]" else "</think>"
    content, calls = parse(f"{begin}{thought}{end}{call}", 0, ["price", "delete"])
    assert calls == ([] if call in ("", "Fine.") else [ToolCall("call_0", "price", PRICE)])
    assert content == f"{begin}{thought}{end}{call if not calls else ''}".strip()


def test_a_thought_may_open_and_close_in_different_case() -> None:
    assert parse(f"<Think>{DRAFT}</THINK>{CALL}")[1] == [ToolCall("call_0", "price", PRICE)]
    assert parse(f'<Think>{BROKEN}</tHINK>{{"name": "price", "parameters": {json.dumps(PRICE)}}}', 0, ["price"])[1] == [
        ToolCall("call_0", "price", PRICE)
    ]


def test_letters_that_only_fold_to_those_of_a_tag_make_no_tag() -> None:
    assert parse(f"<thin\N{KELVIN SIGN}>{CALL}")[1] == [ToolCall("call_0", "price", PRICE)]


def test_tags_of_calls_have_one_case() -> None:
    assert parse(CALL.upper()) == (CALL.upper(), [])


def test_a_turn_that_ends_within_a_thought_calls_nothing() -> None:
    text = f"<think>maybe {CALL}"
    assert parse(text) == (text, [])


def test_a_call_before_another_thought_is_run() -> None:
    content, calls = parse(f"<think>a</think>{CALL}<think>{DRAFT}</think>{wrapped('stock', {})}")
    assert [call.name for call in calls] == ["price", "stock"]
    assert content == f"<think>a</think><think>{DRAFT}</think>"


@pytest.mark.parametrize("tags", [("<tool_call>", "</tool_call>"), ("<|python_tag|>", ""), ("", "")])
def test_tags_in_arguments_are_text(tags: tuple[str, str]) -> None:
    quoting = {"text": f"</think>{DRAFT}<think>"}
    body = json.dumps({"name": "write", "arguments": quoting})
    assert parse(body.join(tags), 0, ["write"])[1] == [ToolCall("call_0", "write", quoting)]


def test_a_damaged_call_does_not_let_out_what_it_quotes() -> None:
    damaged = wrapped("write", {"text": f"</think>{DRAFT}{DRAFT}"}).replace("}\n</tool_call>", "\n</tool_call>")
    assert [bool(call.error) for call in parse(damaged)[1]] == [True]
    damaged = f"<tool_call>{{'name': 'write', 'arguments': {{'text': '{DRAFT}{DRAFT}'}}</tool_call>"
    assert [bool(call.error) for call in parse(damaged)[1]] == [True]


@pytest.mark.parametrize(
    "piece",
    [
        '"',
        "'",
        '\\"',
        '<tool_call>"',
        "<tool_call>'</tool_call>",
        "{",
        "[,",
        "<think>",
        "</think>",
        "<THINK>",
        "[/Think]",
        "```",
        " ",
        '"args"',
    ],
)
def test_long_texts_are_read_in_linear_time(piece: str) -> None:
    parse("<tool_call>" + piece * 60_000, 0, ["f"])
    parse(f"<tool_call>{piece}</think>" * 20_000, 0, ["f"])
    parse(f"<tool_call>{piece}</tool_call>" * 20_000, 0, ["f"])
    parse(("<tool_call>{" + piece * 1000 + "</tool_call>") * 60, 0, ["f"])
    parse('{"name": "f"' + piece * 10_000, 0, ["f"])
