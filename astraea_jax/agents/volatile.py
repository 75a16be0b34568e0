"""Takes out of a chat what known clients change at every request: ``volatile.json`` lists it, with its sources."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from importlib.resources import files
from typing import Any

PATTERNS: list[tuple[frozenset[str], re.Pattern[str]]] = [
    (frozenset(entry["roles"]), re.compile(entry["pattern"]))
    for entry in json.loads((files(__package__) / "volatile.json").read_text(encoding="utf-8"))
]
"""Roles, and what is volatile in their text."""
ROLES = frozenset().union(*(roles for roles, _ in PATTERNS))


def without_volatile(messages: Sequence[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[int]]:
    """Return normalised messages without what is volatile, and the place of each in ``messages``.

    A message or a content part that was nothing else is left out, unless nothing would be left.
    """
    kept, places = [], []
    for place, message in enumerate(messages):
        stable = _stable(message) if message["role"] in ROLES else message
        if stable is not None:
            kept.append(stable)
            places.append(place)
    return (kept, places) if kept else ([*messages], [*range(len(messages))])


def _stable(message: dict[str, Any]) -> dict[str, Any] | None:
    content = message.get("content")
    patterns = [pattern for roles, pattern in PATTERNS if message["role"] in roles]
    if isinstance(content, str):
        stable: Any = _without(content, patterns)
    elif isinstance(content, list):
        texts = [(_without(part["text"], patterns), part) for part in content]
        stable = [{**part, "text": text} for text, part in texts if text or not part["text"]]
    else:
        return message
    return message if stable == content else {**message, "content": stable} if stable else None


def _without(text: str, patterns: Sequence[re.Pattern[str]]) -> str:
    for pattern in patterns:
        text = pattern.sub("", text)
    return text
