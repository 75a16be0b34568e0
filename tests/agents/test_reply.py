"""A turn is read the same however it is cut into pieces, and nothing of it is lost."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.call_writers import WRITERS

from astraea_jax.agents.formats import NAMES, named
from astraea_jax.agents.json_calls import MAX_CALLS
from astraea_jax.agents.reply import (
    CallArguments,
    CallBegan,
    CallDropped,
    CallEnded,
    Part,
    Reply,
    ReplyReader,
    Said,
    Thought,
)
from astraea_jax.agents.tool_calls import ToolCall

TYPES = {"item": "string", "count": "integer", "sizes": "array", "more": "object", "price": "number", "now": "boolean"}
SCHEMA = {"type": "object", "properties": {key: {"type": name} for key, name in TYPES.items()}}
TOOLS = [{"type": "function", "function": {"name": name, "parameters": SCHEMA}} for name in ("price", "stock")]

CLOSERS = {
    "json": ["</tool_call>", "<tool_call>", "</think>", "[TOOL_CALLS]", "<|python_tag|>"],
    "xml": ["</parameter>x", "<parameter=item>", "</arg_value>y", "</tool_call>.", "<tool_call>", "</think>"],
}


def nasty(name: str) -> st.SearchStrategy[str]:
    """Strings that a format can express, with its own tags among them."""
    if name in ("qwen3_coder", "glm", "deepseek_dsml"):  # in these a text ends at the first whole end
        return st.lists(st.sampled_from(["é", '"', "'", "\\", "{", "a b", "</p", "<", *CLOSERS["xml"]])).map("".join)
    if name == "gemma":
        return st.lists(st.sampled_from(["é", '"', "'", "\\", "{", "}", "<tool_call|>", "<|tool_call>", "a:b,c:"])).map(
            "".join
        )
    tags = ["<|end|>", "<|call|>", "<|start|>", "<｜tool▁call▁end｜>", "<|python_end|>", "</function_calls>"]
    return st.lists(st.sampled_from(["é", '"', "'", "\\", "{", "\n", "\t", *tags, *CLOSERS["json"]])).map("".join)


def arguments(name: str) -> st.SearchStrategy[dict[str, Any]]:
    text = nasty(name)
    inner = st.recursive(
        st.none() | st.booleans() | st.integers(-(2**50), 2**50) | text,
        lambda part: st.lists(part, max_size=3) | st.dictionaries(st.sampled_from(["a", "b"]), part, max_size=2),
        max_leaves=5,
    )
    values = {
        "item": text,
        "count": st.integers(-(2**50), 2**50),
        "sizes": st.lists(inner, max_size=3),
        "more": st.dictionaries(st.sampled_from(["a", "b"]), inner, max_size=3),
        "price": st.floats(allow_nan=False, allow_infinity=False),
        "now": st.booleans(),
    }
    return st.fixed_dictionaries({}, optional=values)


PROSE = st.lists(st.sampled_from(["The price", " is 3 < 4", "\n", "é", " [1]", " {x}", " <b>", " ``` "]), max_size=5)


@st.composite
def turns(draw: st.DrawFn) -> tuple[str, str, str, str, list[tuple[str, dict[str, Any]]]]:
    name = draw(st.sampled_from(sorted(WRITERS)))
    format, write = WRITERS[name]
    thought = "".join(draw(PROSE)).strip()
    text = draw(st.sampled_from(["", "So: "])) and "So: " + "".join(draw(PROSE)).strip() + "."
    calls = draw(st.lists(st.tuples(st.sampled_from(["price", "stock"]), arguments(name)), max_size=3))
    return format, write(thought, text, calls), thought, text, calls


def joined(old: Part, new: Part) -> list[Part]:
    """Two parts, as one if they are neighbours of one kind."""
    if isinstance(new, Said | Thought) and isinstance(old, type(new)):
        return [type(new)(old.text + new.text)]
    if isinstance(new, CallArguments) and isinstance(old, CallArguments) and old.index == new.index:
        return [CallArguments(new.index, old.text + new.text)]
    return [old, new]


def check_calls(parts: Sequence[Any], reply: Reply) -> None:
    """Calls follow each other; each ends with all its arguments as the whole reply has them, or is dropped before."""
    ended: list[ToolCall] = []
    for index, (_, group) in enumerate(itertools.groupby(parts, key=lambda part: part.index)):
        began, *pieces, end = group
        assert isinstance(began, CallBegan)
        assert began.index == index
        written = "".join(piece.text for piece in pieces)
        if isinstance(end, CallDropped):
            with pytest.raises(ValueError, match=r".*"):
                json.loads(written)
            continue
        assert (end.call.id, end.call.name) == (began.id, began.name)
        assert written == json.dumps(end.call.arguments, ensure_ascii=False)
        ended.append(end.call)
    assert ended == reply.calls


def read(format: str, pieces: Sequence[str], prompt: str = "", tools: Any = TOOLS) -> tuple[list[Part], Reply]:
    """The parts, neighbours of one kind joined, and the reply; checks what must hold of them."""
    reader = ReplyReader(named(format), prompt, tools)
    parts: list[Part] = []
    for new in [part for piece in pieces for part in reader.feed(piece)] + reader.finish():
        parts[-1:] = joined(parts[-1], new) if parts else [new]
    reply = reader.reply
    assert "".join(part.text for part in parts if isinstance(part, Thought)) == reply.thought
    assert "".join(part.text for part in parts if isinstance(part, Said)) == reply.text
    check_calls([part for part in parts if not isinstance(part, Said | Thought)], reply)
    assert "".join(span.text for span in reader.spans) == "".join(pieces)
    said = "".join(span.text for span in reader.spans if span.kind in ("text", "draft", "unreadable"))
    assert "".join(said.split()) == "".join(reply.text.split())
    return parts, reply


@given(turns())
def test_what_is_written_is_what_is_read(turn: Any) -> None:
    format, written, thought, text, calls = turn
    _, reply = read(format, [written])
    assert reply.errors == []
    assert [(call.name, call.arguments) for call in reply.calls] == calls
    assert (reply.thought, reply.text) == (thought, text)


@given(turn=turns(), data=st.data())
def test_every_cut_gives_the_same(turn: Any, data: st.DataObject) -> None:
    format, written, *_ = turn
    whole = read(format, [written])
    assert read(format, list(written)) == whole
    at = sorted(data.draw(st.lists(st.integers(0, len(written)), max_size=8)))
    assert read(format, [written[a:b] for a, b in zip([0, *at], [*at, len(written)])]) == whole


@given(turn=turns(), data=st.data())
def test_a_turn_that_is_cut_loses_nothing(turn: Any, data: st.DataObject) -> None:
    format, written, _, _, calls = turn
    cut = written[: data.draw(st.integers(0, len(written)))]
    whole = read(format, [cut])
    assert read(format, list(cut)) == whole
    assert [(call.name, call.arguments) for call in whole[1].calls] == calls[: len(whole[1].calls)]


LAMP = ("price", {"item": "lamp", "count": 2})


@pytest.mark.parametrize("name", sorted(WRITERS))
def test_every_single_cut_of_a_turn_gives_the_same(name: str) -> None:
    format, write = WRITERS[name]
    text = "" if name == "llama3_json" else "Let me see:"
    written = write("They want a lamp.", text, [LAMP, ("stock", {})])
    whole = read(format, [written])
    assert [(call.name, call.arguments) for call in whole[1].calls] == [LAMP, ("stock", {})]
    for at in range(len(written)):
        assert read(format, [written[:at], written[at:]]) == whole


def test_parts_of_a_turn_in_order() -> None:
    written = WRITERS["hermes"][1]("Hm.", "Look:", [LAMP]) + "\n\nThat is all.\n"
    call = ToolCall("call_0", *LAMP)
    assert read("hermes", [written])[0] == [
        Thought("Hm."),
        Said("Look:"),
        CallBegan(0, "call_0", "price"),
        CallArguments(0, '{"item": "lamp", "count": 2}'),
        CallEnded(0, call),
        Said("\n\nThat is all.\n"),
    ]


def test_text_comes_at_once() -> None:
    reader = ReplyReader(named("hermes"), "", TOOLS)
    assert [reader.feed(text) for text in ("The", " lamp is ", "14 <", " 15", "<tool", "s>")] == [
        [Said("The")],
        [Said(" lamp is")],
        [Said(" 14")],
        [Said(" < 15")],
        [],
        [Said("<tools>")],
    ]


def test_json_that_cannot_be_a_call_comes_at_once() -> None:
    reader = ReplyReader(named("hermes"), "", TOOLS)
    assert reader.feed('{"answer"') == [Said('{"answer"')]


def test_without_tools_a_call_is_text() -> None:
    written = WRITERS["hermes"][1]("Hm.", "", [LAMP])
    _, reply = read("hermes", [written], tools=None)
    assert (reply.thought, reply.calls, reply.errors) == ("Hm.", [], [])
    assert reply.text == written.partition("</think>\n\n")[2]


@pytest.mark.parametrize(
    ("format", "prompt"),
    [
        ("hermes", "<|im_start|>user\n<think>?<|im_end|>\n<|im_start|>assistant\n<think>\n"),
        ("hermes", "some other template: <think>"),
        ("json", "<|im_start|>user\n</think><|im_end|>\n<|im_start|>assistant\n<think>"),
        ("mistral", "[INST]Hi[/INST][THINK]"),
        ("gemma", "<|turn>model\n<|channel>thought\n"),
        ("harmony", "<|start|>user<|message|>Hi<|end|><|start|>assistant<|channel|>analysis<|message|>"),
        ("deepseek", "<｜User｜>Hi<｜Assistant｜><think>\n"),
    ],
)
def test_a_prompt_may_open_a_thought(format: str, prompt: str) -> None:
    end = {"mistral": "[/THINK]", "gemma": "<channel|>", "harmony": "<|end|>"}.get(format, "</think>")
    for pieces in ([f"Hm, <b>. {end}"], list(f"Hm, <b>. {end}")):
        _, reply = read(format, pieces, prompt)
        assert (reply.thought, reply.text) == ("Hm, <b>.", "")


@pytest.mark.parametrize(
    "prompt",
    [
        "",
        "<|im_start|>user\nOpen <think><|im_end|>\n<|im_start|>assistant\n",
        "<|im_start|>assistant\n<think>\n\n</think>\n\n",
        "<|im_start|>assistant\n<think>\n\n</think>",
    ],
)
def test_a_prompt_without_an_open_thought(prompt: str) -> None:
    _, reply = read("hermes", ['{"name": "price", "arguments": {"item": "lamp"}}'], prompt)
    assert (reply.thought, reply.text, reply.calls) == ("", "", [ToolCall("call_0", "price", {"item": "lamp"})])


def test_drafts_in_a_thought_are_not_run() -> None:
    draft = WRITERS["hermes"][1]("", "", [("stock", {})])
    for prompt, begin in (("", "<think>"), ("<|im_start|>assistant\n<think>", "")):
        _, reply = read("hermes", [f"{begin}Maybe {draft}? No.</think>{WRITERS['hermes'][1]('', '', [LAMP])}"], prompt)
        assert (reply.thought, reply.calls) == (f"Maybe {draft}? No.", [ToolCall("call_0", *LAMP)])


def test_a_call_that_ends_a_thought_which_the_prompt_has_opened_is_run() -> None:
    """Models forget to close the thought; without the call the agent would stop."""
    draft, call = (WRITERS["hermes"][1]("", "", [one]) for one in (("stock", {}), LAMP))
    prompt = "<|im_start|>assistant\n<think>\n"
    for pieces in ([f"Maybe {draft}, or: {call}\n"], list(f"Maybe {draft}, or: {call}\n")):
        _, reply = read("hermes", pieces, prompt)
        assert reply.calls == [ToolCall("call_0", *LAMP)]
    assert read("hermes", [f"Maybe {draft}, or"], prompt)[1].calls == []


@pytest.mark.parametrize(
    ("format", "written", "reason"),
    [
        ("hermes", '<tool_call>{"name": "price", "arguments": {"item": "lamp"', "Expecting ',' delimiter"),
        ("qwen3_coder", "<tool_call>\n<function=price>\n<parameter=item>\nlamp\n</parameter>\n", "the closing tag is"),
        ("qwen3_coder", "<tool_call>\n<function=price>\n<parameter=item>\nla</function>", "no whole argument at"),
        ("qwen3_coder", "<function=f><parameter=a>1</parameter><parameter=a>2</parameter></function>", "appears twice"),
        ("glm", "<tool_call>price\n<arg_key>item</arg_key></tool_call>", "no whole argument at '<arg_key>item"),
        ("pythonic", "<|python_start|>[price('lamp')]<|python_end|>", "positional arguments"),
        ("pythonic", "<|python_start|>[f(x=" + "[" * 5000 + "<|python_end|>", "nested more than"),
        ("gemma", '<|tool_call>call:price{item:<|"|>lamp}<tool_call|>', "Expecting"),
        ("harmony", "<|channel|>commentary to=functions.price<|message|>lamp", "Expecting value"),
        ("harmony", "<|channel|>commentary to=functions.price<|message|>{} {}", "must be one object"),
        ("mistral", "[TOOL_CALLS]price[ARGS][1]", "must be an object"),
        ("deepseek", "<｜tool▁call▁begin｜>price<｜tool▁sep｜>{'item': }<｜tool▁call▁end｜>", "Expecting"),
    ],
)
def test_an_unreadable_call_is_text_and_says_why(format: str, written: str, reason: str) -> None:
    for pieces in ([written], list(written)):
        _, reply = read(format, pieces)
        assert (reply.text, reply.calls) == (written, [])
        [error] = reply.errors
        assert error.startswith("unreadable tool call: ")
        assert reason in error
        assert len(error) < 400


@pytest.mark.parametrize(
    ("format", "written", "found"),
    [
        # arguments dropped after a call without any (vLLM 47901)
        ("qwen3_coder", WRITERS["qwen3_coder"][1]("", "", [("stock", {}), LAMP]), [("stock", {}), LAMP]),
        ("glm", f"<tool_call>stock</tool_call>{WRITERS['glm'][1]('', '', [LAMP])}", [("stock", {}), LAMP]),
        # a value that looks like a closing tag
        (
            "qwen3_coder",
            "<tool_call><function=price><parameter=item>a</parameter> b</tool_call></parameter></function>"
            "\n</tool_call>",
            [("price", {"item": "a</parameter> b</tool_call>"})],
        ),
        (
            "glm",
            "<tool_call>price\n<arg_key>item</arg_key><arg_value>a</tool_call></arg_value>b</arg_value></tool_call>",
            [("price", {"item": "a</tool_call></arg_value>b"})],
        ),
        # only one newline on each side belongs to the tags
        (
            "qwen3_coder",
            "<function=price>\n<parameter=item>\n\n  lamp\n\n</parameter>\n</function>",
            [("price", {"item": "\n  lamp\n"})],
        ),
        # the opening tag around a function is often forgotten
        (
            "qwen3_coder",
            "<function=price>\n<parameter=count>\n2\n</parameter>\n</function>\n</tool_call>",
            [("price", {"count": 2})],
        ),
        ("qwen3_coder", WRITERS["hermes"][1]("", "", [LAMP]), [LAMP]),
        ("glm", WRITERS["hermes"][1]("", "", [LAMP]), [LAMP]),
        # channels in another order, with a recipient before the channel, or for a tool that is built in
        ("harmony", " to=functions.price<|channel|>commentary json<|message|>{}", [("price", {})]),
        ("harmony", "<|channel|>analysis to=functions.price code<|message|>{}", [("price", {})]),
        (
            "harmony",
            '<|channel|>commentary to=functions.price<|message|>{"item": "<|end|><|call|>"}<|call|>',
            [("price", {"item": "<|end|><|call|>"})],
        ),
        (
            "harmony",
            "<|channel|>analysis<|message|>Hm.<|start|>assistant<|channel|>commentary to=price <|message|>",
            [("price", {})],
        ),
        ("mistral", '[TOOL_CALLS]price[CALL_ID]aB3dE6gH9[ARGS]{"count": 2}', [("price", {"count": 2})]),
        ("llama3_json", '{"name": "price", "parameters": {"count": 2}}', [("price", {"count": 2})]),
        ("pythonic", "[price(count=2), stock()]", [("price", {"count": 2}), ("stock", {})]),
    ],
)
def test_turns_that_parsers_are_known_to_misread(format: str, written: str, found: Any) -> None:
    for pieces in ([written], list(written)):
        _, reply = read(format, pieces)
        assert [(call.name, call.arguments) for call in reply.calls] == found
        assert (reply.text, reply.errors) == ("", [])


@pytest.mark.parametrize("name", NAMES)
def test_calls_are_bounded(name: str) -> None:
    written = WRITERS[name][1]("", "So:", [("stock", {})] * 100)
    _, reply = read(name, [written])
    assert len(reply.calls) == MAX_CALLS
    assert reply.errors == [f"too many calls: at most {MAX_CALLS} in one turn are run"]


MARKUP = [
    "<think>",
    "</think>",
    "<thinking>",
    "</thinking>",
    "[THINK]",
    "[/THINK]",
    "```",
    "{",
    "[",
    '"',
    "'",
    "\\",
    "\n",
    " ",
    "x",
]
TAGS = [
    *("<tool_call>", "</tool_call>", "<function=price>", "<parameter=item>", "</parameter>", "</function>"),
    *("<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>", "[TOOL_CALLS]", "price", "[ARGS]", "<|python_tag|>"),
    *(
        "<|channel|>",
        "analysis",
        "final",
        "commentary to=functions.price",
        "<|message|>",
        "<|end|>",
        "<|start|>assistant",
    ),
    *("<|tool_call>", "call:price", "<tool_call|>", "<|channel>thought", "<channel|>", "<｜tool▁call▁begin｜>"),
    *(
        "<｜tool▁sep｜>",
        "<｜tool▁call▁end｜>",
        "<|python_start|>",
        "<|python_end|>",
        "price(",
        ")",
        '{"name": "price", ',
    ),
    *('"arguments": ', "{}", "}", "]", ":", ",", "<|call|>"),
]


@pytest.mark.parametrize("name", NAMES)
@given(text=st.lists(st.sampled_from([*MARKUP, *TAGS]) | st.text(max_size=3), max_size=25).map("".join))
def test_any_text_can_be_read(name: str, text: str) -> None:
    whole = read(name, [text])
    assert read(name, list(text)) == whole
    assert read(name, [text], tools=None)[1].calls == []


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("piece", [*TAGS, '"', "\\", "[{"])
def test_long_turns_are_read_in_linear_time(name: str, piece: str) -> None:
    read(name, [piece * 4000])
