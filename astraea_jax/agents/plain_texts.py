"""Continues plain texts from the tokens of the texts that they begin with."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import sha256
from typing import TYPE_CHECKING

from astraea_jax.agents.continuity import Prompt, Why, agreeing
from astraea_jax.agents.turns import Turn, ids_of
from astraea_jax.models.tokenizer import Tokenizer

if TYPE_CHECKING:
    from hashlib import _Hash

CONTEXT = 16
"""Tokens before new text that are decoded with it, to see whether it reads the same."""


def text_hash(text: str, add_bos: bool) -> _Hash:
    """Return a digest that can go on, of a text."""
    return sha256(b"astraea_jax text%d" % add_bos + text.encode("utf-8", "surrogatepass"))


def beginnings(text: str, ends: Sequence[int], add_bos: bool) -> list[bytes]:
    """Return the digests of the text up to each of ``ends``, which rise."""
    digests, whole, at = [], text_hash("", add_bos), 0
    for end in ends:
        whole.update(text[at:end].encode("utf-8", "surrogatepass"))
        digests.append(whole.digest())
        at = end
    return digests


def text_prompt(tokenizer: Tokenizer, text: str, add_bos: bool, turn: Turn | None) -> Prompt:
    """Return the prompt of a text, of which ``turn`` is the last that is known.

    The text may go on with the stop token of the turn, as a template would write it, or without.

    Raises:
        ValueError: it cannot be tokenised.
    """
    known = turn.pieces() if turn is not None else []
    why: Why = "cut" if known else "new"
    if turn is not None and known and known[-1].whole and known[-1].end == turn.end:
        ids, rest, stop, why = ids_of(known), text[turn.end :], known[-1].stop, "border"
        if stop is not None and rest.startswith(stop):
            new = tokenizer.encode(rest)
            if new[:1] == ids[-1:]:
                return Prompt(ids + new[1:], "same", None, len(ids), known[-1], new=len(ids))
        else:
            undo = 0 if stop is None else 1
            ids = ids[: len(ids) - undo]
            new = tokenizer.encode_after(rest)
            if _reads(tokenizer, ids[-CONTEXT:], new, rest):
                return Prompt(ids + new, "same", None, len(ids), known[-1], new=len(ids), undo=undo)
    ids = tokenizer.encode(text, add_bos=add_bos)
    return Prompt(ids, why, kept=agreeing(ids, ids_of(known)))


def _reads(tokenizer: Tokenizer, before: list[int], new: list[int], text: str) -> bool:
    """Return whether the new tokens after those before them say ``text``."""
    return tokenizer.decode(before + new, delimiters=True) == tokenizer.decode(before, delimiters=True) + text
