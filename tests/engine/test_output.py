"""Stop strings: the text out is the whole text up to the first stop, however it arrives."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from astraea_jax.engine.output import Output
from astraea_jax.engine.sampling import SamplingParams
from astraea_jax.models import tokenizer


class Pieces:
    """A text stream whose tokens are indices of pieces of text."""

    delimiters: dict[int, str] = {}  # noqa: RUF012

    def __init__(self, pieces):
        self.pieces = pieces

    def push(self, token):
        return self.pieces[token]

    def flush(self):
        return ""


def stream(pieces: list[str] | str, stops: tuple[str, ...], eos: frozenset[int] = frozenset()) -> tuple[str, bool]:
    output = Output(Pieces(pieces), SamplingParams(stop=stops), eos)
    out = ""
    for token in range(len(pieces)):
        out += output.push(token)
        if output.stopped:
            break
    return out + output.flush(), output.stopped


@given(st.lists(st.text("abc", max_size=5), max_size=8), st.lists(st.text("abc", min_size=1, max_size=4), max_size=3))
def test_text_ends_before_the_first_stop(pieces, stops):
    # The stop that is complete first wins; of several complete at one letter, the one that starts first.
    text = "".join(pieces)
    ends = [(text.find(s) + len(s), text.find(s)) for s in stops if s in text]
    expected = text[: min(ends)[1]] if ends else text
    assert stream(pieces, tuple(stops)) == (expected, bool(ends))
    assert stream(text, tuple(stops)) == (expected, bool(ends))


def test_a_possible_beginning_of_a_stop_is_held_back():
    output = Output(Pieces("xyEN"), SamplingParams(stop=("END",)), frozenset())
    assert [output.push(i) for i in range(4)] == ["", "", "x", "y"]
    assert output.flush() == "EN"


def test_stop_tokens_make_no_text():
    assert stream("abz", (), frozenset([2])) == ("ab", False)


def byte_tokenizer() -> tokenizer.Tokenizer:
    """One token per byte, ``<tool_call>`` and ``<|im_end|>`` special, and the latter ends a turn."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    raw = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(letters)}, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    raw.decoder = decoders.ByteLevel()
    raw.add_special_tokens([AddedToken(text) for text in ("<tool_call>", "<|im_end|>", "<｜tool▁end｜>", "<pad>")])
    return tokenizer.Tokenizer(
        raw, bos_id=None, eos_ids=frozenset({257}), template=None, special={"pad_token": "<pad>"}
    )


BYTES = byte_tokenizer()


@pytest.mark.parametrize(
    ("text", "params", "expected"),
    [
        ("a<tool_call>b<｜tool▁end｜>", SamplingParams(), "a<tool_call>b<｜tool▁end｜>"),
        ("é<tool_call>", SamplingParams(stop="<tool_call>"), "é"),
        ("a<tool_call>b", SamplingParams(stop="_call>b"), "a<tool"),
        ("a<|im_end|><pad>b", SamplingParams(ignore_eos=True), "ab"),
        ("a<|im_end|>b", SamplingParams(ignore_eos=True, stop="<|im_end|>"), "a"),
        ("a<|im_end|>b", SamplingParams(ignore_eos=True, stop=["x", "<|im_end|>b"]), "a"),
        ("a<pad>b", SamplingParams(stop="<pad>"), "a"),
        ("a<|im_end|>", SamplingParams(stop="a<"), "a"),
        ("a\n<tool_call>", SamplingParams(stop_token_ids=[256]), "a\n"),
        ("10 € and é", SamplingParams(stop="€"), "10 "),
        ("日本語", SamplingParams(stop=("本", "語")), "日"),
    ],
)
def test_special_tokens_and_characters_of_several_tokens(text, params, expected):
    output = Output(BYTES.stream(), params, frozenset() if params.ignore_eos else BYTES.eos_ids)
    out = ""
    for token in BYTES.encode(text):
        out += output.push(token)
        if output.stopped:
            break
    assert out + output.flush() == expected
    assert output.stopped == any(stop in text and stop != "a<" for stop in params.stop)


@given(st.lists(st.integers(0, BYTES.vocab_size - 1) | st.sampled_from([256, 257, 258, 259]), max_size=40))
def test_decoding_at_once_gives_the_text_of_a_stream(ids):
    output = Output(BYTES.stream(), SamplingParams(), frozenset())
    assert "".join(map(output.push, ids)) + output.flush() == BYTES.decode(ids)


def test_end_tokens_outside_the_vocabulary_are_no_delimiters():
    raw = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    ends = tokenizer.Tokenizer(raw, bos_id=None, eos_ids=frozenset({-1, 1, 2**40}), template=None, special={})
    assert ends.delimiters == {1: "b"}
