"""Values in tags get the types of the tool's schema."""

from __future__ import annotations

from typing import Any

import pytest

from astraea_jax.agents.call_values import tagged_values, typed

OPTIONAL = {"anyOf": [{"type": "integer"}, {"type": "null"}]}


@pytest.mark.parametrize(
    ("raw", "schema", "value"),
    [
        ("47", {"type": "string"}, "47"),
        (" a\n", {"type": "string"}, " a\n"),
        ("47", {"type": "integer"}, 47),
        ("47.0", {"type": "integer"}, 47),
        ("4.5", {"type": "integer"}, "4.5"),
        ("047", {"type": "integer"}, "047"),
        ("9" * 5000, {"type": "integer"}, "9" * 5000),
        ("4.50", {"type": "number"}, 4.5),
        ("4", {"type": "number"}, 4),
        ("1e999", {"type": "number"}, "1e999"),
        ("NaN", {"type": "number"}, "NaN"),
        ("True", {"type": "boolean"}, True),
        ("yes", {"type": "boolean"}, "yes"),
        ("None", {"type": "null"}, None),
        ("null", OPTIONAL, None),
        ("7", OPTIONAL, 7),
        ("7", {"type": ["string", "null"]}, "7"),
        ("null", {"type": "string", "nullable": True}, None),
        ("[1, 'a']", {"type": "array"}, [1, "a"]),
        ('{"a": 1}', {"type": "array"}, '{"a": 1}'),
        ('{"a": 1}', {"$ref": "#/$defs/Thing"}, {"a": 1}),
        ("2", {"enum": [1, 2]}, 2),
        ("2", {"enum": ["1", "2"]}, "2"),
        # no type is known: what it is as JSON, unless a string
        ("7", None, 7),
        ("true", {}, True),
        ('{"a": [1]}', {"description": "any"}, {"a": [1]}),
        ('"a"', None, '"a"'),
        ("lamp", "nonsense", "lamp"),
        ("7", {"type": 3, "anyOf": "x"}, 7),
    ],
)
def test_types(raw: str, schema: Any, value: Any) -> None:
    found = typed(raw, schema)
    assert found == value
    assert type(found) is type(value)


def test_schemas_that_contain_themselves_end() -> None:
    schema: dict[str, Any] = {}
    schema["anyOf"] = [schema, {"type": "integer"}]
    assert typed("7", schema) == 7


@pytest.mark.parametrize("body", ["x", "<a>1</a>x", "<a>1", "<a>1</a><a>2</a>"])
def test_nothing_between_the_tags_is_overlooked(body: str) -> None:
    pattern = r"<(?P<key>\w+)>(?P<value>.*?)</(?P=key)>"
    assert tagged_values(" <a>1</a>\n<b>x</b> ", pattern, {}) == {"a": 1, "b": "x"}
    with pytest.raises(ValueError, match=r"no whole argument|appears twice"):
        tagged_values(body, pattern, {})
