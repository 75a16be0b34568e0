"""What known clients change at every request is left out."""

from __future__ import annotations

import json
from importlib.resources import files

import pytest

from astraea_jax.agents.volatile import without_volatile

ENTRIES = json.loads((files("astraea_jax.agents") / "volatile.json").read_text())


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry["client"])
def test_every_example_is_left_out_wherever_it_stands(entry):
    assert entry["sources"]
    assert entry["why"]
    for role in entry["roles"]:
        before, within = f"{entry['example']}\nBe brief.", f"Be brief.\n{entry['example']}"
        for text in (before, within):
            assert without_volatile([{"role": role, "content": text}])[0][0]["content"].strip() == "Be brief."
        parts = [{"type": "text", "text": text} for text in (entry["example"], "Be brief.")]
        assert without_volatile([{"role": role, "content": parts}])[0] == [{"role": role, "content": parts[1:]}]


def test_what_others_say_about_it_stays():
    quoted = [{"role": "user", "content": ENTRIES[0]["example"]}, {"role": "tool", "content": ENTRIES[1]["example"]}]
    assert without_volatile(quoted) == (quoted, [0, 1])
    system = [{"role": "system", "content": "The header x-anthropic-billing-header: is <total_tokens>."}]
    assert without_volatile(system) == (system, [0])


def test_messages_that_are_nothing_else_go_and_the_others_keep_their_places():
    marker = {"role": "system", "content": ENTRIES[1]["example"]}
    user = {"role": "user", "content": "?"}
    assert without_volatile([marker, user, marker, user]) == ([user, user], [1, 3])
    assert without_volatile([marker]) == ([marker], [0])


def test_long_texts_take_no_longer_than_they_are_long():
    """A pattern that backtracks would not come back from these."""
    for text in (" " * 10**6, "\n" * 10**6, "<total_tokens>" * 10**5, "x-anthropic-billing-header:" * 10**5 + "\n"):
        without_volatile([{"role": "system", "content": text}, {"role": "user", "content": "?"}])
