"""Block hashes: a chain of SHA-256 over full pages of tokens, so each hash vouches for all tokens before it, too."""

from __future__ import annotations

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
