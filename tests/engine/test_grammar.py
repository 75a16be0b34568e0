"""Compiles grammars and walks through their masks at random, with a judge that knows nothing of them."""

from __future__ import annotations

import json
import random
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers, trainers

from astraea_jax.agents.tool_calls import parse
from astraea_jax.engine.call_grammar import SYNTAXES
from astraea_jax.engine.grammar import CACHED_GRAMMARS, Grammar, GrammarCompiler
from astraea_jax.engine.lark_text import Thought
from astraea_jax.errors import RequestError
from astraea_jax.models.tokenizer import Tokenizer

TINY = Tokenizer.from_folder(Path(__file__).parents[2] / "models" / "astraea-tiny")
EXTRA = 40
"""Tokens that a model has beyond its tokenizer's."""


def merged(*special: str) -> Tokenizer:
    """A byte-level tokenizer with merges across the borders of JSON's tokens, and some special tokens."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    texts = [
        '{"a": 1, "b": [true, false, null], "name": "é😀ß"}',
        '"}, {"',
        '": "',
        '"}}\n',
        "-12.5e+3",
        "\\u00e9\\n",
    ] * 4
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens(["<|end|>", *special])
    end = tokenizer.token_to_id("<|end|>")
    return Tokenizer(tokenizer, bos_id=None, eos_ids=frozenset([end]), template=None, special={})


MERGED = merged()
COMPILERS = {"tiny": GrammarCompiler(TINY), "merged": GrammarCompiler(MERGED)}
TOKENIZERS = {"tiny": TINY, "merged": MERGED}


def allowed(matcher, words):
    row = np.full(words, -1, np.int32)
    matcher.fill(row)
    return np.flatnonzero(np.unpackbits(row.view(np.uint8), bitorder="little")).tolist()


def walk(grammar: Grammar, tokenizer: Tokenizer, seed: int, steps: int = 2000) -> str | None:
    """The text of a random walk through the masks that ends as soon as it may; None: it has not ended."""
    rng = random.Random(seed)
    matcher = grammar.matcher()
    words = (tokenizer.vocab_size + EXTRA + 31) // 32
    tokens: list[int] = []
    for _ in range(steps):
        choices = allowed(matcher, words)
        assert choices
        assert max(choices) < tokenizer.vocab_size
        if any(token in tokenizer.eos_ids for token in choices):
            break
        # Long tokens first, and what closes: a walk among all characters would rarely end.
        likely = sorted(choices, key=lambda token: -len(tokenizer.decode([token])))[:8]
        closing = [token for token in choices if tokenizer.decode([token]).strip() in ('"', "}", "]", ">")]
        tokens.append(rng.choice(closing if closing and rng.random() < 0.4 else rng.choice([likely, choices])))
        assert matcher.accept(tokens[-1])
        if matcher.finished:
            break
    else:
        return None
    return tokenizer._tokenizer.decode(tokens, skip_special_tokens=False)


def read(text: str) -> Any:
    value = json.loads(text)
    json.dumps(value, ensure_ascii=False).encode()  # no half of a surrogate pair
    return value


names = st.text(st.sampled_from('ab"\\é😀 \n/<'), min_size=1, max_size=4)
leaves = st.one_of(
    st.just({"type": "string"}),
    st.just({"type": "integer"}),
    st.just({"type": "boolean"}),
    st.just({"type": "null"}),
    st.builds(lambda n: {"type": "string", "maxLength": n}, st.integers(0, 5)),
    st.builds(
        lambda low, n: {"type": "integer", "minimum": low, "maximum": low + n},
        st.integers(-99, 99),
        st.integers(0, 200),
    ),
    st.builds(
        lambda values: {"enum": values}, st.lists(names | st.integers(-5, 5) | st.none(), min_size=1, max_size=4)
    ),
    st.builds(
        lambda pattern: {"type": "string", "pattern": pattern},
        st.sampled_from(["^[a-c]{2,3}$", "^é+😀$", "^\\d+\\.\\d$"]),
    ),
)
schemas = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.builds(lambda item, n: {"type": "array", "items": item, "maxItems": n}, inner, st.integers(0, 3)),
        st.builds(lambda options: {"anyOf": options}, st.lists(inner, min_size=1, max_size=3)),
        st.builds(
            lambda properties, needed: {
                "type": "object",
                "properties": properties,
                "required": [name for name, need in zip(properties, needed) if need],
                "additionalProperties": False,
            },
            st.dictionaries(names, inner, max_size=3),
            st.lists(st.booleans(), min_size=3, max_size=3),
        ),
    ),
    max_leaves=6,
)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(sorted(COMPILERS)), schemas, st.integers(0, 2**32))
def test_every_walk_through_a_schema_is_json_that_satisfies_it(kind, schema, seed):
    grammar = COMPILERS[kind].json_schema(schema)
    text = walk(grammar, TOKENIZERS[kind], seed)
    if text is not None:
        jsonschema.validate(read(text), schema)


@pytest.mark.parametrize("kind", COMPILERS)
def test_walks_through_any_json_object_are_json(kind):
    texts = [walk(COMPILERS[kind].json_object(), TOKENIZERS[kind], seed) for seed in range(20)]
    objects = [read(text) for text in texts if text is not None]
    assert objects
    assert all(isinstance(value, dict) for value in objects)


def follow(grammar: Grammar, tokenizer: Tokenizer, text: str) -> bool:
    """Whether every token of the text is allowed, and the text may end there."""
    matcher = grammar.matcher()
    words = (tokenizer.vocab_size + 31) // 32
    for token in tokenizer.encode(text):
        if token not in allowed(matcher, words):
            return False
        assert matcher.accept(token)
    return bool(tokenizer.eos_ids & set(allowed(matcher, words)))


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(sorted(COMPILERS)),
    st.dictionaries(
        st.text(max_size=5), st.recursive(st.text(max_size=8) | st.integers() | st.booleans() | st.none(), st.lists)
    ),
    st.booleans(),
)
def test_every_json_object_is_allowed_as_it_is_written(kind, value, indented):
    text = json.dumps(value, ensure_ascii=False, indent=2 if indented else None)
    tokenizer = TOKENIZERS[kind]
    if tokenizer.decode(tokenizer.encode(text)) == text and not re.search(
        "[\x7f<]", text
    ):  # control tokens are no text
        assert follow(COMPILERS[kind].json_object(), tokenizer, text)


@pytest.mark.parametrize("kind", COMPILERS)
def test_regex_and_lark(kind):
    compiler, tokenizer = COMPILERS[kind], TOKENIZERS[kind]
    for grammar in (compiler.regex(r"[a-c]+/\d{2}é"), compiler.lark('start: WORD "/" /[0-9]{2}é/\nWORD: /[a-c]+/')):
        assert follow(grammar, tokenizer, "abc/42é")
        assert not follow(grammar, tokenizer, "abc/4")
        assert not follow(grammar, tokenizer, "abd/42é")


def test_the_model_s_vocabulary_may_be_larger_or_smaller():
    grammar = COMPILERS["tiny"].regex("ab*")
    words = (TINY.vocab_size + 31) // 32
    usual = allowed(grammar.matcher(), words)
    assert allowed(grammar.matcher(), words + 7) == usual
    assert allowed(grammar.matcher(), 4) == [token for token in usual if token < 4 * 32]


def test_a_finished_text_allows_its_end_only():
    matcher = COMPILERS["merged"].regex("x").matcher()
    assert not matcher.finished
    assert matcher.accept(*MERGED.encode("x"))
    assert matcher.finished
    assert set(allowed(matcher, 14)) == MERGED.eos_ids
    assert matcher.accept(*MERGED.eos_ids)


def test_what_the_grammar_does_not_allow_is_not_accepted():
    assert not COMPILERS["merged"].regex("x").matcher().accept(*MERGED.encode("y"))


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


def chain(links, step):
    defs = {f"a{i}": step({"$ref": f"#/$defs/a{i + 1}"}) for i in range(links)}
    return {"$defs": {**defs, f"a{links}": {"type": "string"}}, "$ref": "#/$defs/a0"}


def nested(levels):
    schema = {"type": "string"}
    for _ in range(levels):
        schema = {"items": schema}
    return schema


HOSTILE = {
    "schema": {
        "deep": nested(1000),
        "deep text": '{"items": ' * 5000 + "{}" + "}" * 5000,
        "long text": json.dumps({"description": "x" * 200_000}),
        "large": {"enum": list(range(20_000))},
        "long string": {"const": "x" * 10_000},
        "product": {
            "allOf": [{"anyOf": [{"required": [f"{i}{j}"], "type": "object"} for j in range(9)]} for i in range(9)]
        },
        "one of": {"oneOf": [{"type": "string"}, {"minLength": 2}]},
        "divisor": {"type": "integer", "multipleOf": 1_000_003},
        "divisors": {"allOf": [{"type": "integer", "multipleOf": 997}, {"multipleOf": 991}]},
        "divisor zero": {"type": "integer", "multipleOf": 0},
        "divisor nan": {"type": "integer", "multipleOf": float("nan")},
        "properties": {"properties": {f"p{i}": {} for i in range(1000)}, "type": "object"},
        "patterns": {"patternProperties": {f"(a|b)*a(a|b){{{i}}}$": {} for i in range(60)}},
        "look-around": {"type": "string", "pattern": "(?=a)b"},
        "bad pattern": {"type": "string", "pattern": "("},
        "itself": {"$ref": "#"},
        "each other": chain(2, lambda ref: ref)
        | {"$defs": {"a0": {"$ref": "#/$defs/a1"}, "a1": {"$ref": "#/$defs/a0"}}},
        "remote": {"$ref": "http://127.0.0.1:9/schema"},
        "file": {"$ref": "file:///etc/passwd"},
        "unknown type": {"type": "text"},
        "impossible": {"type": "string", "minLength": 3, "maxLength": 1},
        "surrogate": {"const": "\ud800"},
        "no JSON": {"const": {1, 2}},
        "number key": {1: 2},
        "infinite": {"const": float("inf")},
        "huge number": {"const": 10**5000},
        "list": [],
        "none": None,
        "text": "not JSON",
        "not an object": "[1]",
    },
    "regex": {
        "long": "a" * 1_000_000,
        "repeated": "a{1000000}",
        "open": "(a|" * 2000,
        "deep": "(" * 2000 + "a" + ")" * 2000,
        "lookahead": "(?=a)b",
        "lookbehind": "(?<!a)b",
        "back reference": r"(a)\1",
        "empty class": "[^\\s\\S]",
        "surrogate": "\ud800",
        "none": None,
    },
    "lark": {
        "empty": "",
        "long": 'start: "' + "a" * 20_000 + '"',
        "deep": "start: " + "(" * 5000 + '"a"' + ")" * 5000,
        "doubling": "start: A0\n" + "".join(f"A{i}: A{i + 1} A{i + 1}\n" for i in range(30)) + 'A30: "x"',
        "cycle": "start: a\na: b\nb: a",
        "terminal cycle": "start: A\nA: B\nB: A",
        "divisor": 'start: %json {"type": "integer", "multipleOf": 1000003}',
        "no JSON": "start: %json {",
        "none": None,
    },
}


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, cases in HOSTILE.items() for name in cases])
def test_a_hostile_grammar_is_the_request_s_own_fault(kind, name):
    compiler = COMPILERS["tiny"]
    compile = {"schema": compiler.json_schema, "regex": compiler.regex, "lark": compiler.lark}[kind]
    with pytest.raises(RequestError) as refused:
        compile(HOSTILE[kind][name])
    assert len(str(refused.value)) < 300


def test_a_grammar_without_any_text_is_called_so():
    for compile in (COMPILERS["tiny"].json_schema, COMPILERS["merged"].json_schema):
        with pytest.raises(RequestError, match="no text matches"):
            compile({"$ref": "#"})


def test_a_schema_that_holds_itself():
    schema = {}
    schema["items"] = schema
    with pytest.raises(RequestError, match="levels"):
        COMPILERS["tiny"].json_schema(schema)


@pytest.mark.parametrize("step", [lambda ref: ref, lambda ref: {"type": "object", "properties": {"x": ref}}])
def test_long_chains_of_references_do_not_overrun_the_stack(step):
    compiler = COMPILERS["tiny"]
    compiler.json_schema(chain(1000, step))
    with pytest.raises(RequestError):
        compiler.json_schema(chain(9000, step))
    with ThreadPoolExecutor(1) as pool:  # whatever stack the caller has
        pool.submit(
            compiler.lark, "start: a0\n" + "".join(f"a{i}:a{i + 1}\n" for i in range(1200)) + 'a1200:"x"'
        ).result()


HEAVY = "(.{0,500}a){0,500}"


def test_a_text_beyond_the_limits_fails_alone():
    compiler = GrammarCompiler(TINY)
    grammar = compiler.regex(HEAVY)
    words = (TINY.vocab_size + 31) // 32
    other = grammar.matcher()
    plain = TINY.encode("a")
    assert other.accept(*plain)
    rng = random.Random(0)
    greedy = grammar.matcher()

    def write_at_random():
        for _ in range(2000):
            greedy.accept(rng.choice([token for token in allowed(greedy, words) if token not in TINY.eos_ids]))

    with pytest.raises(RequestError, match="too complex"):
        write_at_random()
    for matcher in (other, grammar.matcher()):
        assert plain[0] in allowed(matcher, words)
        assert matcher.accept(*plain)
        assert allowed(matcher, words)


def test_equal_grammars_are_compiled_once_and_the_cache_is_bounded():
    compiler = GrammarCompiler(MERGED)
    first = compiler.json_schema({"type": "integer"})
    assert compiler.json_schema('{"type": "integer"}') is first
    for i in range(CACHED_GRAMMARS):
        compiler.regex(f"x{i}")
    assert compiler.json_schema({"type": "integer"}) is not first
    assert len(compiler._cache) == CACHED_GRAMMARS
    assert sum(chars for chars, _ in compiler._cache.values()) == compiler._cached_chars


def test_threads_share_a_compiler():
    compiler = GrammarCompiler(MERGED)
    with ThreadPoolExecutor(8) as pool:
        grammars = list(pool.map(lambda i: compiler.json_schema({"const": i % 3}), range(60)))
        assert list(pool.map(lambda i: follow(grammars[i], MERGED, str(i % 3)), range(60))) == [True] * 60


def test_options_of_the_compiler_in_a_schema_are_ours():
    schema = {"type": "object", "x-guidance": {"key_separator": "=", "whitespace_pattern": "x*", "lenient": True}}
    grammar = COMPILERS["tiny"].json_schema(schema)
    assert follow(grammar, TINY, '{"a": 1}')
    assert not follow(grammar, TINY, '{"a"=1}')
    assert not follow(grammar, TINY, '{"a":' + " " * 1000 + "1}")


def tool(name, parameters=None, **more):
    return [{"type": "function", "function": {"name": name, "parameters": parameters, **more}}]


@pytest.mark.parametrize(
    ("tools", "name", "format", "said"),
    [
        ([], None, "hermes", "empty"),
        (TOOLS, "sell", "hermes", "'sell'"),
        (TOOLS, None, "pythonic", "cannot be constrained"),
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


def test_tokenizers_that_no_grammar_can_be_followed_in():
    words = tokenizers.Tokenizer(models.WordLevel({"a": 0, "</s>": 1}, unk_token="a"))
    for ids, said in ((frozenset([1]), "byte-level"), (frozenset(), "ends a turn"), (frozenset([7]), "ends a turn")):
        compiler = GrammarCompiler(Tokenizer(words, bos_id=None, eos_ids=ids, template=None, special={}))
        with pytest.raises(RequestError, match=said):
            compiler.json_object()
        with pytest.raises(RequestError, match=said):
            compiler.prepare()
