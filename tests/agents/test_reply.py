"""A turn is read the same however it is cut into pieces, and nothing of it is lost."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from support.call_writers import WRITERS

from astraea_jax.agents.formats import named
from astraea_jax.agents.reply import CallArguments, CallBegan, CallEnded, Part, Reply, ReplyReader, Said, Thought

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


def read(format: str, pieces: Sequence[str], prompt: str = "", tools: Any = TOOLS) -> tuple[list[Part], Reply]:
    """The parts, neighbours of one kind joined, and the reply; checks what must hold of them."""
    reader = ReplyReader(named(format), prompt, tools)
    parts: list[Part] = []
    for new in [part for piece in pieces for part in reader.feed(piece)] + reader.finish():
        if isinstance(new, Said | Thought) and parts and isinstance(old := parts[-1], type(new)):
            parts[-1] = type(new)(old.text + new.text)
        else:
            parts.append(new)
    reply = reader.reply
    assert "".join(part.text for part in parts if isinstance(part, Thought)) == reply.thought
    assert "".join(part.text for part in parts if isinstance(part, Said)) == reply.text
    assert [part.call for part in parts if isinstance(part, CallEnded)] == reply.calls
    for index, call in enumerate(reply.calls):
        own = [part for part in parts if not isinstance(part, Said | Thought) and part.index == index]
        assert own[0] == CallBegan(index, call.id, call.name)
        assert own[-1] == CallEnded(index, call)
        assert json.loads("".join(part.text for part in own if isinstance(part, CallArguments))) == call.arguments
    assert "".join(span.text for span in reader.spans) == "".join(pieces)
    said = "".join(span.text for span in reader.spans if span.kind in ("text", "unreadable"))
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
