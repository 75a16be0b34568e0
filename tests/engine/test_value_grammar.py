"""Whatever the grammar of a format's calls allows is read back as calls that are valid under the tools' schemas."""

from __future__ import annotations

import re
from typing import Any

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.call_writers import WRITERS
from support.constrained import follow, merged, walk

from astraea_jax.agents.formats import named
from astraea_jax.agents.reply import ReplyReader
from astraea_jax.engine.call_syntax import SYNTAXES, WAYS, syntax_of
from astraea_jax.engine.grammar import GrammarCompiler
from astraea_jax.errors import RequestError

FORMAT = {name: name for name in SYNTAXES} | {way: format for format, _, way in WAYS}
"""Name of a syntax -> the format that reads it."""
MARKS = ['<|"|>', "<|tool_call>", "<tool_call|>", "｜DSML｜", "<tool_call>", "</tool_call>", "<|python_start|>"]
TEXT, TOKENS = merged(), merged(*MARKS)

WORDS = st.text(st.sampled_from("ab é'\\\"{}:,<"), min_size=1, max_size=4)
KEYS = st.sampled_from(["a", "b_1", "c", "item"])
LEAVES = st.one_of(
    st.sampled_from([{"type": kind} for kind in ("string", "integer", "boolean", "null")]),
    st.just({"type": "number", "minimum": -1000, "maximum": 1e6}),
    st.builds(lambda values: {"enum": values}, st.lists(WORDS | st.integers(-5, 5), min_size=1, max_size=3)),
    st.builds(
        lambda low, n: {"type": "integer", "minimum": low, "maximum": low + n}, st.integers(-9, 9), st.integers(0, 50)
    ),
    st.just({"anyOf": [{"type": "string"}, {"type": "null"}]}),
    st.just({"$ref": "#/$defs/Colour"}),
)


def objects(inner: st.SearchStrategy[Any], most: int = 3) -> st.SearchStrategy[dict[str, Any]]:
    return st.builds(
        lambda properties, needed: {
            "type": "object",
            "properties": properties,
            "required": [name for name, need in zip(properties, needed) if need],
            "additionalProperties": False,
        },
        st.dictionaries(KEYS, inner, max_size=most),
        st.lists(st.booleans(), min_size=most, max_size=most),
    )


SCHEMAS = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.builds(
            lambda item, low, n: {"type": "array", "items": item, "minItems": low, "maxItems": low + n},
            inner,
            st.integers(0, 2),
            st.integers(0, 2),
        ),
        objects(inner),
    ),
    max_leaves=5,
)
DEFINITIONS = {"Colour": {"type": "string", "enum": ["red", "dark blue"]}}


def tools_of(parameters: dict[str, Any], **more: Any) -> list[dict[str, Any]]:
    return [{"type": "function", "function": {"name": "price", "parameters": parameters, **more}}]


def calls_in(format: str, text: str, tools: Any) -> Any:
    reader = ReplyReader(named(format), "", tools)
    reader.feed(text)
    reader.finish()
    assert (reader.reply.text, reader.reply.errors) == ("", []), text
    return reader.reply.calls


def grammar_of(name: str, tokenizer: Any, tools: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    with monkeypatch.context() as patch:
        patch.setitem(SYNTAXES, "tested", SYNTAXES[name])
        return GrammarCompiler(tokenizer).tool_calls(tools, format="tested")


@pytest.mark.parametrize("name", sorted(SYNTAXES))
@settings(max_examples=25, deadline=None)
@given(parameters=objects(SCHEMAS), seed=st.integers(0, 2**32), tokenizer=st.sampled_from([TEXT, TOKENS]))
def test_what_a_grammar_allows_is_a_valid_call(name: str, parameters: Any, seed: int, tokenizer: Any) -> None:
    tools = tools_of({**parameters, "$defs": DEFINITIONS})
    with pytest.MonkeyPatch.context() as patch:
        grammar = grammar_of(name, tokenizer, tools, patch)
    text = walk(grammar, tokenizer, seed, 600)
    if text is not None:
        calls = calls_in(FORMAT[name], text, tools)
        assert calls
        for call in calls:
            jsonschema.validate(call.arguments, {**parameters, "$defs": DEFINITIONS})


@pytest.mark.parametrize("way", sorted({*WRITERS} - {"deepseek_fenced", "pythonic", "harmony"}))
def test_what_models_write_is_allowed(way: str) -> None:
    """The calls of the writers, by whom the reader is tested, too."""
    names = {"mistral_named": "mistral_args"}
    tools = tools_of(
        {"properties": {"item": {"type": "string"}, "n": {"type": "integer"}, "more": {"type": "object"}, "now": {}}}
    )
    written = WRITERS[way][1]("", "", [("price", {"item": "a lamp", "n": 2, "more": {"b": [1, None]}, "now": True})])
    with pytest.MonkeyPatch.context() as patch:
        grammar = grammar_of(names.get(way, way), TOKENS, tools, patch)
    assert follow(grammar, TOKENS, written)


@pytest.mark.parametrize(
    ("name", "parameters", "said"),
    [
        ("pythonic", {"properties": {"a b": {}}}, "'a b' cannot be written"),
        ("gemma", {"properties": {"a": {"type": "string", "pattern": "x"}}}, "pattern"),
        ("gemma", {"properties": {"a": {"type": "array", "uniqueItems": True}}}, "uniqueItems"),
        ("gemma", {"properties": {"a": {"type": "array", "maxItems": 5000}}}, "minItems and maxItems"),
        ("pythonic", {"properties": {"a": {"allOf": [{"type": "string"}, {"minLength": 1}]}}}, "allOf"),
        ("pythonic", {"properties": {}, "required": ["a"]}, "required a"),
        ("pythonic", {"properties": {"a": {"type": "date"}}}, "type 'date'"),
        ("pythonic", {"properties": {"a": {"$ref": "#/$defs/no"}}}, "refers to"),
        ("pythonic", {"properties": {"a": {"$ref": "https://example.org/a"}}}, "refers to"),
        ("gemma", {"properties": {"a": {"enum": ['<|"|>']}}}, "cannot be written"),
        ("deepseek_dsml", {"properties": {"a": {"type": "string", "maxLength": 5}}}, "maxLength"),
    ],
)
def test_what_cannot_be_enforced_is_refused_if_strict(name: str, parameters: Any, said: str) -> None:
    with pytest.MonkeyPatch.context() as patch, pytest.raises(RequestError, match=re.escape(said)):
        grammar_of(name, TEXT, tools_of(parameters, strict=True), patch)


@pytest.mark.parametrize("name", ["gemma", "pythonic"])
def test_a_schema_may_refer_to_itself(name: str) -> None:
    node = {"type": "object", "properties": {"next": {"$ref": "#/$defs/node"}, "n": {"type": "integer"}}}
    tools = tools_of({"$defs": {"node": node}, "properties": {"list": {"$ref": "#/$defs/node"}}, "required": ["list"]})
    with pytest.MonkeyPatch.context() as patch:
        grammar = grammar_of(name, TOKENS, tools, patch)
    given = {"list": {"next": {"next": {}, "n": 1}}}
    assert follow(
        grammar,
        TOKENS,
        WRITERS[name][1]("", "", [("price", given)]).replace("<|python_start|>", "").replace("<|python_end|>", ""),
    )
    wrong = {"list": {"next": {"next": [], "n": 1}}}
    assert not follow(
        grammar,
        TOKENS,
        WRITERS[name][1]("", "", [("price", wrong)]).replace("<|python_start|>", "").replace("<|python_end|>", ""),
    )


@pytest.mark.parametrize(
    ("value", "way"),
    [
        ("lamp", "qwen3_coder"),
        (None, "qwen3_coder"),
        ("lamp", "glm"),
        (None, "deepseek_dsml"),
        ("lamp", "deepseek_dsml"),
    ],
)
def test_text_that_may_be_null_has_no_quotes(value: Any, way: str) -> None:
    """Optional strings, and strings of an enumeration behind a reference, as pydantic writes both."""
    either = {"anyOf": [{"type": "string"}, {"type": "null"}]}
    tools = tools_of({"properties": {"a": either, "b": {"$ref": "#/$defs/Colour"}}, "$defs": DEFINITIONS})
    with pytest.MonkeyPatch.context() as patch:
        grammar = grammar_of(way, TOKENS, tools, patch)
    written = WRITERS[way][1]("", "", [("price", {"a": value, "b": "red"})])
    assert follow(grammar, TOKENS, written)
    assert calls_in(FORMAT[way], written, tools)[0].arguments == {"a": value, "b": "red"}


@pytest.mark.parametrize(
    ("format", "tokens", "template", "way"),
    [
        ("mistral", ["[ARGS]"], "", "mistral_args"),
        ("mistral", [], "[TOOL_CALLS]name[ARGS]", "mistral_args"),
        ("deepseek", ["｜DSML｜"], "", "deepseek_dsml"),
        ("deepseek", [], "<｜tool▁sep｜>", "deepseek"),
        ("pythonic", [], "<function_calls>", "pythonic_lines"),
        ("pythonic", ["<|python_start|>"], "", "pythonic_tagged"),
        ("pythonic", [], "", "pythonic"),
    ],
)
def test_a_model_shows_in_which_way_it_writes_a_format(format: str, tokens: Any, template: str, way: str) -> None:
    assert syntax_of(format, tokens, template) is SYNTAXES[way]
