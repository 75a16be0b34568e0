"""A JSON object is rewritten while it comes, as ``json.dumps`` prints it, however it is cut."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from astraea_jax.agents.call_json import DECODER
from astraea_jax.agents.json_copy import MAX_SCALAR, JsonCopy

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda part: st.lists(part, max_size=3) | st.dictionaries(st.text(max_size=3), part, max_size=3),
    max_leaves=8,
)


def copied(pieces) -> str:
    copy = JsonCopy()
    return "".join(copy.feed(piece) for piece in pieces)


@st.composite
def written_objects(draw: st.DrawFn) -> tuple[dict[str, Any], str]:
    """An object, and one of the ways to write it as JSON."""
    value = draw(st.dictionaries(st.text(max_size=3), VALUES, max_size=4))
    space = draw(st.sampled_from(["", " ", "\n\t"]))
    separators = (f"{space},{space}", f"{space}:{space}")
    text = json.dumps(
        value, ensure_ascii=draw(st.booleans()), indent=draw(st.none() | st.just(2)), separators=separators
    )
    return value, text.replace("/", "\\/") if draw(st.booleans()) else text


@given(written_objects())
def test_all_but_the_last_brace_is_as_json_dumps_prints_it(written) -> None:
    value, text = written
    copy = JsonCopy()
    assert "".join(map(copy.feed, text + " rest")) + "}" == json.dumps(value, ensure_ascii=False)
    assert copy.ended
    assert copy.taken == len(text)
    assert copied([text, " rest"]) == copied(text)


@given(written_objects(), st.data())
def test_what_was_written_of_a_part_is_the_beginning_of_the_whole(written, data) -> None:
    value, text = written
    part = text[: data.draw(st.integers(0, len(text)))]
    assert copied([part]) == copied(part)
    assert json.dumps(value, ensure_ascii=False).startswith(copied(part))


PIECES = [
    "{",
    "}",
    "[",
    "]",
    ":",
    ",",
    '"',
    "'",
    "\\",
    "\\u",
    "d83d",
    "\\ude00",
    "00e9",
    " ",
    "1",
    "-",
    "e",
    "True",
    "true",
    "é",
]


@given(st.lists(st.sampled_from(PIECES) | st.text(max_size=2), max_size=20).map("".join))
def test_any_text_can_come_and_what_is_written_is_never_whole(text: str) -> None:
    text = "{" + text
    written = copied([text])
    assert copied(text) == written
    with pytest.raises(ValueError, match=r".*"):
        json.loads(written)
    try:
        value, _ = DECODER.raw_decode(text)
        whole = json.dumps(value, ensure_ascii=False)
        whole.encode()
    except ValueError:
        return
    assert whole == written + "}"


@pytest.mark.parametrize(
    ("text", "written"),
    [
        ("{'a': 1}", "{"),
        ('{"a": 1,}', '{"a": 1'),
        ('{"a": True}', '{"a": '),
        ('{"a": [,1]}', '{"a": ['),
        ('{"a": 1 "b": 2}', '{"a": 1'),
        ('{"a": "\\ud83d"}', '{"a": "'),
        ('{"a": "\\ud83d\\ude00"}', '{"a": "😀"'),
        ('{"a": 1e999}', '{"a": '),
        ('{"a": 1.50, "b": 1E2}', '{"a": 1.5, "b": 100.0'),
        (f'{{"a": {"1" * (MAX_SCALAR + 1)}}}', '{"a": '),
        ('{"a": "raw\nline"}', '{"a": "raw\\nline"'),
    ],
)
def test_what_is_not_strict_json_ends_it(text: str, written: str) -> None:
    assert copied([text]) == copied(text) == written
