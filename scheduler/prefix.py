"""Names of pages by their content: a chain of SHA-256 over full pages, so that a key vouches for all that precedes."""

from __future__ import annotations

from hashlib import sha256

import numpy as np


def salted(salt: str) -> bytes:
    """The beginning of a chain. Without the salt nobody can name, or probe for, what was cached under it."""
    return sha256(b"astraea_jax prefix\0" + salt.encode()).digest()


def page_keys(tokens: np.ndarray, page_size: int, before: bytes) -> list[bytes]:
    """Keys of the full pages of ``tokens [T]`` int32 that follow what ``before`` names (a key, or a salted start)."""
    keys, content = [], tokens.astype("<i4", copy=False).tobytes()
    size = 4 * page_size
    for at in range(0, len(content) - size + 1, size):
        before = sha256(before + content[at : at + size]).digest()
        keys.append(before)
    return keys
