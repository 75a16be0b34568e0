"""Grammars that nobody should be able to hurt anybody with."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor

import pytest
from support.constrained import COMPILERS

from astraea_jax.errors import RequestError


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
