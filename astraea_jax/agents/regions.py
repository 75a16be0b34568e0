"""Splits a turn, while it is written, into the regions of its format: thoughts, text and the beginnings of calls."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from astraea_jax.agents.response_templates import ResponseParser, ResponseTemplate

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


class Regions:
    """The parser of transformers, kept free of the past: its time and memory do not grow with the turn.

    Args:
        template: has only text fields, one of which has no opening tag.
    """

    def __init__(self, template: ResponseTemplate):
        self.template = template
        self.buffer = ""
        """What the last :meth:`read` has looked at."""
        self.held = ""
        """Text that may be the beginning of a tag."""
        self._opening = ""
        """The tag that has opened the region we are in; empty: none has."""

    def read(self, text: str, last: bool = False) -> Iterator[Piece]:
        """Pieces of ``text`` and what was held back; all of it if the text is the ``last`` one."""
        self.buffer = text = self.held + text
        self.held = ""
        parser = ResponseParser(self.template, prefix=self._opening and self._opening + WITHIN)
        events = parser.feed(text)
        if last:
            events += parser.finalize()[1]
        at = 0
        for event in events:
            name = event["field"]
            form = self.template.fields[name]
            if event["type"] == "region_chunk":
                at += len(event["text"])
                yield Inside(name, event["text"], at)
            elif event["type"] == "region_open" and name != self.template.implicit:
                found = form.open_re.match(text, at)
                at, self._opening = found.end(), found[0]
                captures = {key: value for key, value in found.groupdict().items() if value is not None}
                yield Opened(name, found[0], at, captures)
            elif event["type"] == "region_close" and name != self.template.implicit:
                found = form.close_re and form.close_re.match(text, at)
                at, self._opening = (found.end() if found else at), ""
                yield Closed(name, found[0] if found else "", at)
        if last and at < len(text):  # behind a closing tag of no length, the parser stops
            yield Inside(self.template.implicit or "", text[at:], len(text))
            at = len(text)
        self.held = text[at:]

    def cut(self, at: int) -> str:
        """Leave the region and the text behind position ``at`` of the buffer, which is returned."""
        self.held = self._opening = ""
        return self.buffer[at:]
