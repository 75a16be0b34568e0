"""Finds where a call ends while it is written: a closing tag within a string ends nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import regex

from astraea_jax.agents.json_calls import MAX_CALL_CHARS, ToolCall, reason
from astraea_jax.agents.response_templates import ResponseTemplateField

DOUBLE, SINGLE = ('"', r'(?:\\.)++|"'), ("'", r"(?:\\.)++|'")
LONGEST_QUOTE = 512
"""No delimiter of strings is longer."""


class Quoting:
    """Tells whether the end of a growing text lies within quotes, in linear time.

    Args:
        quotes: patterns of what opens a string, and of what closes it or is an escape.
    """

    def __init__(self, quotes: Sequence[tuple[str, str]]):
        self._open = regex.compile("|".join(f"({begin})" for begin, _ in quotes), regex.DOTALL)
        self._close = [regex.compile(end, regex.DOTALL) for _, end in quotes]
        self._within: int | None = None
        self._tail = ""

    def encloses(self, more: str) -> bool:
        """Return whether the end lies within quotes, with ``more`` text."""
        text, at = self._tail + more, 0
        while found := (self._open if self._within is None else self._close[self._within]).search(text, at):
            at = found.end()
            if self._within is None:
                self._within = found.lastindex - 1
            elif not found[0].startswith("\\"):
                self._within = None
        self._tail = text[max(at, len(text) - LONGEST_QUOTE) :]
        return self._within is not None


@dataclass(frozen=True)
class Ended:
    """A call's region that is over."""

    calls: list[ToolCall]
    error: str | None
    """Why it could not be read."""
    text: str
    """The region and its closing tag, as the model wrote them."""
    rest: str
    """Text that follows and has been looked at already."""
    itself: bool = False
    """The region ended with its first call; others may follow."""


class CallBody:
    """Text of a region that holds calls, up to the closing tag that ends it.

    The first closing tag before which it can be read is the end. If it cannot be read there, a closing tag outside of
    strings may be the end, strings being in double quotes or, failing that, in either.

    Args:
        form: the region's field.
        read: reads the calls of a body, or raises ValueError or RecursionError.
        see: called with the text of the body piece by piece; closing tags are among it if they do not end it. Returns
            where in the body its first call ends, once that is known. There ends a region that has no closing tag.
    """

    def __init__(
        self, form: ResponseTemplateField, read: Callable[[str], list[ToolCall]], see: Callable[[str], int | None]
    ):
        self._close = form.close_re
        self._ends_itself = form.close_re is None or form.close_re.pattern.startswith("(?=")
        self._ends_at: int | None = None
        self._needs_close = form.content == "xml-inline"  # else a call that was cut could pass for a whole one
        self._read, self._see = read, see
        self._open_quotings = [Quoting(quotes) for quotes in _quotings(form)]
        self._before: list[str] = []
        """The region up to where its closing tag is looked for."""
        self._length = 0
        self._looked = 0
        """Pieces of it in which quotes were looked for."""
        self._window = ""
        self._error: str | None = None
        self._extent = 0
        """End of the region if nothing in it can be read."""

    def feed(self, text: str, last: bool = False) -> Ended | None:
        """Take the next text of the turn; returns what is known once the region is over."""
        self._window += text
        while found := self._closing(last):
            self._shift(found.start())
            if ended := self._end_itself() or self._try(found[0]):
                return ended
            self._shift(len(found[0]) or 1)
        return self._end_itself() or (self._cut() if last else None)

    def _end_itself(self) -> Ended | None:
        """End where the first call does, if there is no closing tag to wait for and it can be read by itself."""
        if not self._ends_itself or self._ends_at is None:
            return None
        self._ends_itself = False
        whole = "".join([*self._before, self._window])
        text, rest = whole[: self._ends_at], whole[self._ends_at :]
        try:
            calls = self._read(text.lstrip().removeprefix("["))
        except (ValueError, RecursionError):
            return None
        return Ended(calls, None, text, rest, itself=True)

    def _closing(self, last: bool) -> regex.Match[str] | None:
        found = self._close and self._close.search(self._window, partial=not last)
        if found and not found.partial:
            return found
        self._shift(found.start() if found else len(self._window))
        return None

    def _shift(self, count: int) -> None:
        self._ends_at = self._see(self._window[:count])
        self._before.append(self._window[:count])
        self._length += len(self._before[-1])
        self._window = self._window[count:]

    def _try(self, closing: str) -> Ended | None:
        more, self._looked = "".join(self._before[self._looked :]), len(self._before)
        enclosing = [quoting for quoting in self._open_quotings if quoting.encloses(more)]
        if self._error is None or len(enclosing) < len(self._open_quotings):
            body = "".join(self._before)
            try:
                return Ended(self._read(body), None, body + closing, self._window[len(closing) :])
            except (ValueError, RecursionError) as error:
                self._error = self._error or reason(error)
                self._extent = len(body) + len(closing)
        self._open_quotings = enclosing
        return None if enclosing and self._length <= MAX_CALL_CHARS else self._refused()

    def _cut(self) -> Ended:
        """The turn ends here; the closing tag may be missing, or stand in a string."""
        whole = "".join([*self._before, self._window])
        try:
            if self._needs_close:
                raise ValueError("the closing tag is missing")
            return Ended(self._read(whole), None, whole, "")
        except (ValueError, RecursionError) as error:
            if self._error is None:
                self._error, self._extent = reason(error), len(whole)
        return self._refused()

    def _refused(self) -> Ended:
        whole = "".join([*self._before, self._window])
        return Ended([], self._error, whole[: self._extent], whole[self._extent :])


def _quotings(form: ResponseTemplateField) -> list[list[tuple[str, str]]]:
    arguments: dict[str, Any] = form.content_args
    if form.content == "json":
        if delimiters := arguments.get("string_delims"):
            return [[*((regex.escape(begin), regex.escape(end)) for begin, end in delimiters), DOUBLE]]
        return [[DOUBLE], [DOUBLE, SINGLE]]
    if form.content == "python-call-list":
        return [[DOUBLE, SINGLE]]
    if form.content == "xml-inline" and "value_open" in arguments:
        return [[(arguments["value_open"], arguments["value_close"])]]
    return []
