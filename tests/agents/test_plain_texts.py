"""Plain texts that begin with earlier prompts and what was made of them."""

from __future__ import annotations

import functools
import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.conversations import ME
from support.histories import KEEPS, TOKENIZERS, tokenizer
from tokenizers import normalizers

from astraea_jax.agents.conversations import Conversations
from astraea_jax.models.tokenizer import Tokenizer

make = functools.cache(lambda kind: tokenizer(kind, KEEPS))
STOP = KEEPS.stop


def conversations(kind: str = "across", mode="job") -> Conversations:
    return Conversations(make(kind), mode)


def say(known, opened, text, stop=True, **how):
    ids = [i for char in text for i in known._tokenizer.encode_after(char)]
    ids += known._tokenizer.encode(STOP) if stop else []
    opened.ended(ids, text, "stop" if stop else "length", **how)
    return ids


@pytest.mark.parametrize("stop", [True, False])
@pytest.mark.parametrize("written", [True, False])
def test_a_text_goes_on_with_its_own_tokens(stop, written):
    """With the stop token, as a client that renders chats itself writes it, or without, as one that prompts."""
    known = conversations()
    text, ids = "Once ", []
    for i in range(4):
        opened = known.begin_text(ME, "s", text)
        assert opened.report.why == ("same" if i else "new")
        assert opened.begins_job is (i == 0)
        assert opened.program == "s"
        assert opened.prompt[: len(ids)] == ids
        assert opened.report.kept == len(ids)
        assert known._tokenizer.decode(opened.prompt, delimiters=True) == text
        output = say(known, opened, "upon a", stop)
        ids = opened.prompt + (output if written or not stop else output[:-1])
        text += "upon a" + STOP * written + "\n\ntime "


@settings(deadline=None, max_examples=100)
@given(
    st.sampled_from(sorted(TOKENIZERS)),
    st.lists(st.tuples(st.text(max_size=8), st.text(max_size=8), st.booleans(), st.booleans(), st.booleans())),
    st.booleans(),
)
def test_a_text_reads_as_it_was_sent(kind, rounds, add_bos):
    known = conversations(kind)
    text = ""
    for new, said, stop, written, whole in rounds:
        text += new
        opened = known.begin_text(ME, None, text, add_bos)
        if opened.report.why != "same":
            assert opened.prompt == known._tokenizer.encode(text, add_bos=add_bos)
        else:
            assert _plain(known._tokenizer.decode(opened.prompt, delimiters=True), kind) == _plain(text, kind)
        say(known, opened, said, stop, whole=whole)
        text += said + STOP * (stop and written)


def _plain(text: str, kind: str) -> str:
    """The text without what a tokenizer of this kind changes in it: spaces, or the form of accents."""
    if kind in ("words", "across", "bundled"):
        return unicodedata.normalize("NFC", text)
    return text.replace(" ", "").replace("▁", "")


def test_half_a_character_goes_on_behind_it():
    known = conversations()
    first = known._tokenizer.encode("語")[:1]
    known.begin_text(ME, None, "Say: ").ended(first, "\ufffd", "length")
    opened = known.begin_text(ME, None, "Say: \ufffd and more")
    assert (opened.report.why, opened.report.kept) == ("same", len(known._tokenizer.encode("Say: ")) + 1)


@pytest.mark.parametrize(
    ("how", "why"), [({"whole": False}, "cut"), ({}, "same")], ids=["a stop string has cut it", "whole"]
)
def test_what_was_cut_is_tokenised_anew(how, why):
    known = conversations()
    opened = known.begin_text(ME, "s", "Think. ")
    say(known, opened, "Thought: x", stop=False, **how)
    later = known.begin_text(ME, "s", "Think. Thought: x\nResult: 14")
    assert (later.report.why, later.program) == (why, "s")
    assert (later.prompt == known._tokenizer.encode("Think. Thought: x\nResult: 14")) is (why == "cut")


def test_a_tokenizer_that_changes_text_is_not_trusted():
    raw = TOKENIZERS["words"]()
    raw.normalizer = normalizers.Lowercase()
    known = Conversations(Tokenizer(raw, bos_id=None, eos_ids=frozenset(), template=None, special={}))
    known.begin_text(ME, None, "Say ").ended(known._tokenizer.encode("HO"), "ho", "length")
    opened = known.begin_text(ME, None, "Say ho HO")
    assert opened.report.why == "border"
    assert opened.prompt == known._tokenizer.encode("Say ho HO")


def test_other_texts_and_owners_begin_anew():
    known = conversations()
    say(known, known.begin_text(ME, "s", "Once "), "upon")
    assert known.begin_text("you", "s", "Once upon a time").report.why == "new"
    assert known.begin_text(ME, "s", "Once upon a time", False).report.why == "new"
    other = known.begin_text(ME, "s", "Twice")
    assert (other.report.why, other.program, other.parent) == ("new", "s/2", None)


def test_branches_of_a_text():
    known = conversations()
    say(known, known.begin_text(ME, None, "Once "), "upon")
    both = [known.begin_text(ME, None, f"Once upon {what}") for what in ("a time", "an hour")]
    assert both[1].parent == both[0].program
    assert [opened.report.why for opened in both] == ["same", "same"]


def test_off():
    known = conversations(mode="off")
    first = known.begin_text(ME, "s", "Once ")
    say(known, first, "upon", stop=False)
    later = known.begin_text(ME, "s", "Once upon a time")
    assert (later.report.why, later.report.kept, later.program) == ("off", 0, "s")
    assert later.prompt == known._tokenizer.encode("Once upon a time")


def test_half_a_surrogate_pair_ends_its_own_request_only():
    known = conversations()
    with pytest.raises(ValueError, match="cannot encode"):
        known.begin_text(ME, "s", "\ud800")
    assert known.begin_text(ME, "s", "Once").program == "s"
