"""Reads the first call of a region while it is written, so that clients get its arguments as they come."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import regex

from astraea_jax.agents.call_bodies import NAMED, WHOLE
from astraea_jax.agents.json_calls import MAX_CALL_CHARS
from astraea_jax.agents.json_copy import JsonCopy
from astraea_jax.agents.response_templates import ResponseTemplateField

_FENCE = r"\s*+(?:```\w{0,16}\s*+)?+"
_ARGUMENTS = regex.compile(rf"{_FENCE}(?=\{{)")
_CALL = regex.compile(
    rf'{_FENCE}(?:\[\s*+)?+\{{\s*+"name"\s*+:\s*+"(?P<name>[^"\\\x00-\x1f]{{1,256}})"'
    r'\s*+,\s*+"(?:arguments|parameters)"\s*+:\s*+(?=\{)'
)
_CALL_END, _NO_MORE = regex.compile(r"\s*+\}"), regex.compile("")
_NEXT = regex.compile(r"[\s;,\]]{0,64}+")
_NOTHING = regex.compile("(?!)")
MAX_BEGINNING = 1024
"""Characters in which the arguments must begin; if they begin later, the call comes as a whole."""


class CallStream:
    """Tells the name of a call and then its arguments, as far as they are certain if the call can be read at all.

    Only arguments that are JSON in the text can be told; others come as a whole once the call has ended. The brace that
    closes the arguments is never told, so that what was told of a call that turns out unreadable is no JSON.

    Args:
        name: of the tool, if the opening tag has told it.
        beginning: matches what stands before the arguments; may have the group ``name``.
        tools: names of all tools; a call of another one is not told. None: any may be called.
    """

    def __init__(self, name: str | None, beginning: regex.Pattern[str], tools: Collection[str] | None = None):
        self.name = name or None
        """None: it is not known yet."""
        self.arguments = ""
        """All that was told of them."""
        self.ends_at: int | None = None
        """Position in the region at which the first call ends, if nothing around it has to be closed."""
        self._beginning: regex.Pattern[str] | None = beginning
        self._tools = tools
        self._held = ""
        self._room = MAX_CALL_CHARS
        self._copy: JsonCopy | None = None
        self._begins_at = 0
        self._end: regex.Pattern[str] | None = None
        """Matches what is left of the call behind its arguments."""
        self._tail = ""

    @classmethod
    def within(cls, form: ResponseTemplateField, captures: Mapping[str, str]) -> CallStream:
        """Return the call that a region of the field ``form`` begins with."""
        plain = form.content == "json" and not form.content_args.get("string_delims")
        if plain and form.transform == WHOLE:
            return cls(None, _CALL)
        if form.transform == NAMED:
            return cls(captures.get("name", "").strip(), _ARGUMENTS if plain else _NOTHING)
        return cls(None, _NOTHING)

    @classmethod
    def bare(cls, content: str, tools: Collection[str]) -> CallStream:
        """Return the first of calls without any tag, which must be a tool's that is there."""
        return cls(None, _CALL if content == "json" else _NOTHING, tools)

    def feed(self, text: str) -> str:
        """Take the next text of the region; returns what it adds to the arguments."""
        text, self._room = text[: self._room], max(0, self._room - len(text))
        if self._copy is None:
            text = self._begin(text)
        if self._copy is None:
            return ""
        before = self._copy.taken
        added = self._copy.feed(text)
        self.arguments += added
        if self._copy.ended and self._end is not None:
            self._find_end(text[max(0, self._copy.taken - before) :])
        return added

    def _find_end(self, text: str) -> None:
        """Look for the end of the call in the text that follows its arguments."""
        assert self._end is not None
        assert self._copy is not None
        self._tail += text
        found = self._end.match(self._tail, partial=True)
        if found is not None and found.partial and len(self._tail) < MAX_BEGINNING:
            return
        self._end = None
        if found is not None and not found.partial:
            self.ends_at = self._begins_at + self._copy.taken + found.end()

    def _begin(self, text: str) -> str:
        if self._beginning is None:
            return ""
        text = self._held + text
        found = self._beginning.match(text[:MAX_BEGINNING], partial=True)
        if found is not None and found.partial and len(text) < MAX_BEGINNING:
            self._held = text
            return ""
        at_name, self._beginning, self._held = self.name is not None, None, ""
        if found is None or found.partial:
            return ""
        name = self.name or found["name"]
        if self._tools is not None and name not in self._tools:
            return ""
        self.name, self._copy, self._begins_at = name, JsonCopy(), found.end()
        if "`" not in found[0]:
            self._end = _NO_MORE if at_name else _CALL_END
        return text[found.end() :]


def next_call(text: str, last: bool) -> tuple[str, str] | None:
    """Split text that follows a call into separators and the next call of the same region, which may be empty.

    Returns:
        None: more text decides. A closing bracket that no call follows is a separator.
    """
    end = _NEXT.match(text).end()
    if text[end : end + 1] == "{":
        return text[:end], text[end:]
    if end == len(text) < 64 and not last:
        return None
    return text[: text.rfind("]", 0, end) + 1], ""
