"""Walks through the masks of grammars at random, with judges that know nothing of grammars."""

from __future__ import annotations

import json
import random
import re
from concurrent.futures import ThreadPoolExecutor

import jsonschema
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from support.constrained import COMPILERS, MERGED, TINY, TOKENIZERS, allowed, follow, read, walk
from tokenizers import models

from astraea_jax.engine.grammar import CACHED_GRAMMARS, GrammarCompiler
from astraea_jax.engine.lark_text import Thought
from astraea_jax.errors import RequestError
from astraea_jax.models.tokenizer import Tokenizer

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


def test_tokenizers_that_no_grammar_can_be_followed_in():
    words = tokenizers.Tokenizer(models.WordLevel({"a": 0, "</s>": 1}, unk_token="a"))
    for ids, said in ((frozenset([1]), "byte-level"), (frozenset(), "ends a turn"), (frozenset([7]), "ends a turn")):
        compiler = GrammarCompiler(Tokenizer(words, bos_id=None, eos_ids=ids, template=None, special={}))
        with pytest.raises(RequestError, match=said):
            compiler.json_object()
        with pytest.raises(RequestError, match=said):
            compiler.prepare()


MARKUP = '<tool_call>{"a": "é"}</tool_call>'


@pytest.mark.parametrize("text", [MARKUP, "x" + MARKUP, "<tool_call>", "a</tool_call>b<tool_call>"])
@pytest.mark.parametrize("seed", range(3))
def test_what_looks_like_a_control_token_is_text(text, seed):
    compiler, quoted = COMPILERS["tiny"], json.dumps(text, ensure_ascii=False)
    plain = [compiler.lark(f"start: {quoted}"), compiler.regex(re.escape(text))]
    assert all(walk(grammar, TINY, seed) == text for grammar in plain)
    strings = [
        compiler.json_schema({"const": text}),
        compiler.json_schema({"enum": [text]}),
        compiler.json_schema({"type": "string", "pattern": f"^{re.escape(text)}$"}),
        compiler.lark(f"start: %json {json.dumps({'const': text})}"),
    ]
    assert all(json.loads(str(walk(grammar, TINY, seed))) == text for grammar in strings)
    named = compiler.json_schema({"properties": {text: {"type": "null"}}, "required": [text], "type": "object"})
    assert text in json.loads(str(walk(named, TINY, seed)))
    matcher = compiler.json_schema({"const": text}, thought=Thought(opened=True)).matcher()
    tokens = TINY.encode("so</think>")
    assert all(map(matcher.accept, tokens))
    while not TINY.eos_ids & {tokens[-1]}:
        tokens.append(allowed(matcher, 32)[-1])
        assert matcher.accept(tokens[-1])
    assert json.loads(TINY.decode(tokens).removeprefix("so</think>")) == text
