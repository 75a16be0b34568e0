"""Programs that move to another replica, as plain data: not their KV, which is computed again, but its tokens."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass


@dataclass(frozen=True)
class HandOver:
    """A program that waits, as another replica of the same model can go on with it."""

    key: Hashable
    """Its caller's name for it."""
    owner: Hashable
    salt: bytes | None
    """The start of its chain of block hashes; see :func:`~.prefix.salted`."""
    tokens: tuple[int, ...]
    """Prompt and output of its last request, with which its next prompt most likely begins."""
    parent: Hashable | None = None
    """Key of the program in whose job it takes part."""
