"""White space between thoughts, text and calls, which begins no block of an answer by itself."""

from __future__ import annotations


class Blank:
    """White space that is kept until a block of its kind begins."""

    def __init__(self) -> None:
        self._held: dict[str, str] = {}  # kind of block -> white space that belongs to the next one

    def first(self, kind: str, text: str) -> str:
        """Return the text with which a block begins, now that ``text`` has come; empty: none begins yet."""
        text = self._held.pop(kind, "") + text
        if text.strip():
            return text
        self._held[kind] = text
        return ""

    def clear(self) -> None:
        """Forget all of it: a block has begun."""
        self._held.clear()
