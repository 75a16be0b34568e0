"""Calls without any tag around them: the rest of a turn is nothing else."""

from __future__ import annotations

import regex

from astraea_jax.agents.call_bodies import Tools, unmarked_calls
from astraea_jax.agents.json_calls import ARGUMENT_KEYS, MAX_CALL_CHARS, NAME_KEYS, ToolCall

_KEY = "|".join([*NAME_KEYS, *ARGUMENT_KEYS, "type", "id", "call_id"])
BEGINNINGS = {
    "json": regex.compile(rf"""\s*+(?:```\w{{0,16}}\s*+)?\[?\s*+\{{\s*+(?:"(?:{_KEY})"|'(?:{_KEY})')\s*+:"""),
    "python-call-list": regex.compile(r"\s*+\[\s*+[A-Za-z_][\w.-]{0,127}\s{0,4}\("),
}
"""Beginning of a text that may be calls, by content parser; other texts need not be held back."""


class BareCalls:
    """A text that may turn out to be calls.

    Args:
        content: content parser of the calls.
        tools: what is known of the tools.
    """

    def __init__(self, content: str, tools: Tools):
        self.text = ""
        self._content = content
        self._tools = tools
        self._begun = False

    @staticmethod
    def may_begin(content: str, text: str) -> bool:
        """Return whether ``text`` is the beginning of calls, or may become one."""
        return BEGINNINGS[content].match(text, partial=True) is not None

    def feed(self, text: str, last: bool) -> list[ToolCall] | None:
        """Take more text; returns the calls, or one that tells an error, or none; None: it is not known yet."""
        self.text += text
        if not self._begun:
            found = BEGINNINGS[self._content].match(self.text, partial=True)
            if found is None:
                return []
            self._begun = not found.partial
        if len(self.text) > MAX_CALL_CHARS:
            return []
        return unmarked_calls(self._content, self.text, self._tools) if last else None
