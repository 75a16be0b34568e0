"""A text that is refused by its length alone never fits."""

from __future__ import annotations

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, models, normalizers, pre_tokenizers

from astraea_jax.models import resolve
from astraea_jax.models.token_lengths import longest_token
from astraea_jax.models.tokenizer import LONG_TEXT, Tokenizer

BYTES = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
FALLBACK = {f"<0x{byte:02X}>": byte for byte in range(256)}


def over_bytes(normalizer=None, *more, merges=(("a", "a"), ("aa", "aa"))) -> tokenizers.Tokenizer:
    vocabulary = {**BYTES, **{"".join(pair): 256 + i for i, pair in enumerate(merges)}}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=list(merges)))
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*more, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    return tokenizer


def falling_back(pre_tokenizer=None) -> tokenizers.Tokenizer:
    model = models.BPE(vocab={**FALLBACK, "<unk>": 256, "▁": 257}, merges=[], unk_token="<unk>", byte_fallback=True)
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.pre_tokenizer = pre_tokenizer
    return tokenizer


def with_token(token: AddedToken) -> tokenizers.Tokenizer:
    tokenizer = over_bytes()
    tokenizer.add_special_tokens([token])
    return tokenizer


@pytest.mark.parametrize(
    ("tokenizer", "longest"),
    [
        (over_bytes(), 4),
        (over_bytes(normalizers.NFC()), 16),
        (over_bytes(normalizers.NFC(), pre_tokenizers.Digits(True)), 16),
        (over_bytes(None, pre_tokenizers.Split("b", "isolated")), 4),
        (falling_back(), 6),
        (falling_back(pre_tokenizers.Metaspace()), 6),
        (with_token(AddedToken("<|end of turn|>")), 15),
        (over_bytes(normalizers.Strip()), None),
        (over_bytes(normalizers.Replace("bbb", "b")), None),
        (over_bytes(normalizers.Replace(tokenizers.Regex(" +"), " ")), None),
        (over_bytes(None, pre_tokenizers.Split("b", "removed")), None),
        (over_bytes(None, pre_tokenizers.Whitespace()), None),
        (falling_back(pre_tokenizers.BertPreTokenizer()), None),
        (with_token(AddedToken("<e>", lstrip=True)), None),
        (tokenizers.Tokenizer(models.BPE(vocab={"a": 0}, merges=[])), None),
        (tokenizers.Tokenizer(models.WordLevel({"a": 0, "?": 1}, unk_token="?")), None),
        (tokenizers.Tokenizer(models.Unigram([("?", 0.0)], 0, False)), None),
    ],
)
def test_what_one_token_can_stand_for(tokenizer, longest):
    assert longest_token(tokenizer) == longest


@given(text=st.text(max_size=200) | st.text("aα\u0313\u0300\u0345 b", max_size=200), nfc=st.booleans())
def test_no_text_is_longer_than_its_tokens_allow(text, nfc):
    tokenizer = over_bytes(normalizers.NFC() if nfc else None)
    longest = longest_token(tokenizer)
    assert longest is not None
    assert len(text) <= longest * len(tokenizer.encode(text).ids)


@given(st.text(min_size=1, max_size=40), st.booleans())
def test_long_texts_have_the_same_tokens_as_short_ones(text, add_bos):
    """Though another call of the library tokenises them."""
    tokenizer = Tokenizer.from_folder(resolve("astraea-tiny"))
    long = (text * LONG_TEXT)[: LONG_TEXT + 7]
    assert tokenizer.encode(long, add_bos=add_bos) == tokenizer._tokenizer.encode(long).ids
