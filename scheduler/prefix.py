"""Block hashes: a chain of SHA-256 over full pages of tokens, so each hash vouches for all tokens before it, too."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from hashlib import sha256

import numpy as np


def salted(salt: str) -> bytes:
    """The start of a chain. Who does not know the salt can neither name nor probe for what was cached under it."""
    return sha256(b"astraea_jax prefix\0" + salt.encode()).digest()


def hash_blocks(tokens: np.ndarray, page_size: int, before: bytes) -> list[bytes]:
    """Hashes of the full pages in ``tokens [T]`` int32, which follow ``before`` (a block hash, or a salted start)."""
    hashes, content = [], tokens.astype("<i4", copy=False).tobytes()
    size = 4 * page_size
    for at in range(0, len(content) - size + 1, size):
        before = sha256(before + content[at : at + size]).digest()
        hashes.append(before)
    return hashes


BEGINNING, BEGINNINGS = 256, 128
"""Tokens between two beginnings of a prompt that are told apart, and how many there are at most: up to 32,768 tokens,
longer than system prompts and tools, and a fifth of a millisecond to hash."""


def beginnings(prompt: Sequence[int], salt: str = "") -> list[tuple[Hashable, int]]:
    """Beginnings of a prompt by which a router knows others that begin alike: each as a name and its tokens, ascending.

    Names are hashes for one process. Under different salts nothing begins alike.
    """
    found: list[tuple[Hashable, int]] = []
    name = hash(salt)
    for stop in range(BEGINNING, min(len(prompt), BEGINNING * BEGINNINGS) + 1, BEGINNING):
        name = hash((name, *prompt[stop - BEGINNING : stop]))
        found.append((name, stop))
    return found
