"""Splits a turn, while it is written, into the regions of its format: thoughts, text and the beginnings of calls."""

from __future__ import annotations

import string
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import regex

from astraea_jax.agents.response_templates import ResponseParser, load_response_template

WITHIN = "\0"
"""Follows an opening tag that is given to the parser again, so that the tag can be no longer than it was."""


@dataclass(frozen=True)
class Piece:
    """A part of the turn."""

    field: str
    """The region's name in the template."""
    text: str
    """As the model wrote it."""
    end: int
    """Position after it, in :attr:`Regions.buffer`."""


@dataclass(frozen=True)
class Opened(Piece):
    """The markup that opens a region."""

    captures: Mapping[str, str] = field(default_factory=dict)


class Closed(Piece):
    """The markup that closes a region."""


class Inside(Piece):
    """Text of a region."""


class Splitting:
    """A template of transformers that splits turns; its regions are all plain text, so that splitting cannot fail.

    Args:
        fields: of the template; their contents are not looked at.
    """

    def __init__(self, fields: Mapping[str, Mapping[str, Any]]):
        plain = {
            "content": "text",
            "content_args": {"strip": False},
            "repeats": True,
            "transform": {"content": "{content}"},
        }
        delimited = {
            name: {key: value for key, value in form.items() if key.startswith(("open", "close"))}
            for name, form in fields.items()
        }
        spec = {name: {**delimiters, **plain} for name, delimiters in delimited.items()}
        self.template = load_response_template({"start_anchor_pattern": "(?!)", "fields": spec})
        forms = self.template.fields.values()
        self.implicit: str = self.template.implicit
        closing = {form.name: [form.close_re] if form.close_re else [] for form in forms}
        closing[self.implicit] += [form.open_re for form in forms if form.open_re]
        self.ending = {name: _beginnings(patterns) for name, patterns in closing.items()}
        """Characters that may begin what ends a region; None: any may."""


def _beginnings(patterns: list[Any]) -> Any:
    tried = {*string.printable, *"".join(pattern.pattern for pattern in patterns)}
    found = [char for char in tried if any(pattern.match(char, partial=True) for pattern in patterns)]
    if any(char.isalnum() for char in found):
        return None
    spaces = r"\s" * any(char.isspace() for char in found)
    return regex.compile(f"[{regex.escape(''.join(found))}{spaces}]" if found else "(?!)")


class Regions:
    """The parser of transformers, kept free of the past: its time and memory do not grow with the turn."""

    def __init__(self, splitting: Splitting):
        self.buffer = ""
        """What the last :meth:`read` has looked at."""
        self.held = ""
        """Text that may be the beginning of a tag."""
        self._splitting = splitting
        self._region = splitting.implicit
        self._opening = ""
        """The tag that has opened the region."""

    def read(self, text: str, last: bool = False) -> Iterator[Piece]:
        """Return pieces of ``text`` and what was held back; all of it if the text is the ``last`` one."""
        ending = self._splitting.ending[self._region]
        self.buffer = self.held + text
        if text and not self.held and ending and not ending.search(text):  # as with most texts
            yield Inside(self._region, text, len(text))
            return
        self.held = ""
        at = 0
        for piece in self._split(self.buffer, last):
            at = piece.end
            yield piece
        if last and at < len(self.buffer):  # behind a closing tag of no length, the parser stops
            yield Inside(self._splitting.implicit, self.buffer[at:], len(self.buffer))
            at = len(self.buffer)
        self.held = self.buffer[at:]

    def cut(self, at: int) -> str:
        """Leave the region and the text behind position ``at`` of the buffer, which is returned."""
        self._enter(self._splitting.implicit, "")
        self.held = ""
        return self.buffer[at:]

    def _split(self, text: str, last: bool) -> Iterator[Piece]:
        template = self._splitting.template
        parser = ResponseParser(template, prefix=self._opening and self._opening + WITHIN)
        events = parser.feed(text)
        if last:
            events += parser.finalize()[1]
        at = 0
        for event in events:
            name = event["field"]
            form = template.fields[name]
            if event["type"] == "region_chunk":
                at += len(event["text"])
                yield Inside(name, event["text"], at)
            elif name == self._splitting.implicit:
                continue
            elif event["type"] == "region_open":
                found = form.open_re.match(text, at)
                at = found.end()
                self._enter(name, found[0])
                captures = {key: value for key, value in found.groupdict().items() if value is not None}
                yield Opened(name, found[0], at, captures)
            elif found := form.close_re and form.close_re.match(text, at):  # else the end of the turn closes it
                at = found.end()
                self._enter(self._splitting.implicit, "")
                yield Closed(name, found[0], at)

    def _enter(self, region: str, opening: str) -> None:
        self._region, self._opening = region, opening
