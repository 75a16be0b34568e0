"""Tool calls as grammars, in the formats of several models, and thoughts before them."""

from __future__ import annotations

import json
from typing import Any

import jsonschema
import pytest
from support.constrained import COMPILERS, TINY, follow, merged, walk

from astraea_jax.agents.tool_calls import parse
from astraea_jax.engine.call_grammar import SYNTAXES
from astraea_jax.engine.grammar import GrammarCompiler
from astraea_jax.engine.lark_text import Thought
from astraea_jax.errors import RequestError

TOOLS: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {
            "name": "price",
            "parameters": {
                "type": "object",
                "properties": {
                    "item": {"enum": ["lamp", 'a "b"']},
                    "n": {"type": "integer"},
                    "note": {"type": "string"},
                },
                "required": ["item"],
            },
        },
    },
    {"type": "function", "function": {"name": "now", "parameters": None}},
]


PARAMETERS: dict[str, Any] = {
    tool["function"]["name"]: tool["function"]["parameters"] or {"maxProperties": 0} for tool in TOOLS
}


@pytest.mark.parametrize("seed", range(6))
def test_a_required_call_is_one_that_is_read_back(seed):
    grammar = COMPILERS["tiny"].tool_calls(TOOLS)
    text = walk(grammar, TINY, seed)
    if text is not None:
        said, calls = parse(text)
        assert not said
        for call in calls:
            assert call.error is None
            jsonschema.validate(call.arguments, PARAMETERS[call.name])


def call(name, **arguments):
    return f'<tool_call>\n{{"name": "{name}", "arguments": {json.dumps(arguments)}}}\n</tool_call>'


def test_which_calls_are_allowed():
    compiler = COMPILERS["tiny"]
    lamp, now = call("price", item="lamp"), call("now")
    for text, one, several, priced, within in [
        (lamp, True, True, True, True),
        (f"{lamp}\n{now}", False, True, False, True),
        (now, True, True, False, True),
        ("A lamp.", False, False, False, True),
        (f"Let me see. {lamp}", False, False, False, True),
        (call("price", item="desk"), False, False, False, False),
        (call("price", item="lamp", colour="red"), False, False, False, False),
        (call("sell", item="lamp"), False, False, False, False),
        ("", False, False, False, True),
    ]:
        assert follow(compiler.tool_calls(TOOLS, parallel=False), TINY, text) == one
        assert follow(compiler.tool_calls(TOOLS), TINY, text) == several
        assert follow(compiler.tool_calls(TOOLS, "price", False), TINY, text) == priced
        assert follow(compiler.tool_calls(TOOLS, required=False), TINY, text) == within


FORMATS = {
    "llama3_json": '{"name": "price", "parameters": {"item": "lamp"}}; {"name": "now", "parameters": {}}',
    "mistral": '[TOOL_CALLS][{"name": "price", "arguments": {"item": "lamp"}}, {"name": "now", "arguments": {}}]',
    "mistral_args": '[TOOL_CALLS]price[ARGS]{"item": "lamp"}[TOOL_CALLS]now[ARGS]{}',
    "qwen3_coder": "<tool_call>\n<function=price>\n<parameter=item>\nlamp\n</parameter>\n<parameter=note>\na <b>\n\n"
    "</parameter>\n</function>\n</tool_call>\n<tool_call>\n<function=now>\n</function>\n</tool_call>",
    "glm": "<tool_call>price\n<arg_key>item</arg_key>\n<arg_value>lamp</arg_value>\n<arg_key>n</arg_key>\n<arg_value>3"
    "</arg_value>\n</tool_call>\n<tool_call>now\n</tool_call>",
    "harmony": '<|channel|>commentary to=functions.price <|constrain|>json<|message|>{"item": "lamp"}<|call|>',
    "deepseek": '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>price<｜tool▁sep｜>{"item": "lamp"}<｜tool▁call▁end｜>'
    "<｜tool▁call▁begin｜>now<｜tool▁sep｜>{}<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
}
CONTROL = [
    *(
        "<tool_call>",
        "</tool_call>",
        "[TOOL_CALLS]",
        "[ARGS]",
        "<|channel|>",
        "<|constrain|>",
        "<|message|>",
        "<|call|>",
    ),
    *(f"<｜tool▁{part}｜>" for part in ("calls▁begin", "call▁begin", "sep", "call▁end", "calls▁end")),
]


@pytest.mark.parametrize("tokens", [[], CONTROL], ids=["text", "control tokens"])
@pytest.mark.parametrize("name", FORMATS)
def test_formats_of_calls(name, tokens, monkeypatch):
    tokenizer = merged(*tokens)
    monkeypatch.setitem(SYNTAXES, "tested", SYNTAXES[name])
    grammar = GrammarCompiler(tokenizer).tool_calls(TOOLS, format="tested")
    assert follow(grammar, tokenizer, FORMATS[name])
    for wrong in ("lamp", "now", "price"):
        if wrong in FORMATS[name]:
            assert not follow(grammar, tokenizer, FORMATS[name].replace(wrong, "wrong"))


@pytest.mark.parametrize("tokens", [[], ["<think>", "</think>"]], ids=["text", "control tokens"])
def test_a_thought_is_free_and_what_follows_is_not(tokens):
    tokenizer = merged(*tokens)
    compiler = GrammarCompiler(tokenizer)
    opened = compiler.json_schema({"type": "integer"}, thought=Thought(opened=True))
    closed = compiler.json_schema({"type": "integer"}, thought=Thought())
    assert follow(opened, tokenizer, "Is it {} or 7? </thin\n</think>\n\n42")
    assert not follow(opened, tokenizer, "42")
    assert not follow(opened, tokenizer, "Well.</think>\n\nx")
    assert follow(closed, tokenizer, "<think>\nIs it {} or 7?\n</think>\n\n42")
    assert follow(closed, tokenizer, "42")
    assert not follow(closed, tokenizer, "Well.</think>42")


def tool(name, parameters=None, **more):
    return [{"type": "function", "function": {"name": name, "parameters": parameters, **more}}]


@pytest.mark.parametrize(
    ("tools", "name", "format", "said"),
    [
        ([], None, "hermes", "empty"),
        (TOOLS, "sell", "hermes", "'sell'"),
        (TOOLS, None, "nous", "cannot be constrained"),
        (["price"], None, "hermes", "OpenAI-shaped"),
        (tool(""), None, "hermes", "name"),
        (tool("x" * 300), None, "hermes", "name"),
        (tool("a\nb"), None, "hermes", "name"),
        (tool("<tool_call>"), None, "hermes", "control token"),
        (tool("f", {"type": "array"}), None, "hermes", "must be object"),
        (tool("f", {"properties": [1]}), None, "hermes", "must be an object"),
        (tool("f", {"properties": {"a": {"multipleOf": 5000}}}), None, "hermes", "multipleOf"),
        (tool("f", {"properties": {"a": {"type": "string", "pattern": "x"}}}, strict=True), None, "glm", "pattern"),
        (TOOLS * 100, None, "hermes", "at most"),
    ],
)
def test_calls_that_cannot_be_constrained(tools, name, format, said):
    with pytest.raises(RequestError, match=said):
        COMPILERS["tiny"].tool_calls(tools, name, True, format)


def test_only_a_strict_tool_is_refused_for_what_is_not_supported():
    parameters = {"properties": {"a": {"type": "string", "format": "unheard-of"}}}
    COMPILERS["tiny"].tool_calls(tool("f", parameters))
    with pytest.raises(RequestError, match="unheard-of"):
        COMPILERS["tiny"].tool_calls(tool("f", parameters, strict=True))
