"""Reads a model's turn while it is written: thoughts, text for the user, and tool calls.

Nothing that a model writes is an exception here, and nothing is lost: a call that cannot be read is given back as text.
However the text is cut into pieces, the same reply comes out.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from astraea_jax.agents.bare_calls import BareCalls
from astraea_jax.agents.call_bodies import Tools, read_body, read_item
from astraea_jax.agents.call_end import CallBody
from astraea_jax.agents.call_stream import CallStream, next_call
from astraea_jax.agents.formats import CallFormat, kind
from astraea_jax.agents.json_calls import MAX_CALLS, ToolCall
from astraea_jax.agents.parts import (
    CallArguments,
    CallBegan,
    CallDropped,
    CallEnded,
    Part,
    Reply,
    Said,
    Span,
    Thought,
    Trimmed,
)
from astraea_jax.agents.regions import Closed, Inside, Opened, Piece, Regions
from astraea_jax.agents.reply_calls import ReplyCalls

__all__ = [
    "CallArguments",
    "CallBegan",
    "CallDropped",
    "CallEnded",
    "Part",
    "Reply",
    "ReplyReader",
    "Said",
    "Thought",
]

SLICE = 512
"""Characters that are split at once: what follows the opening tag of a call is split again."""
LONGEST_FEED = 4096
"""Characters that are taken at once: what is still to be read is copied again and again."""
MAX_BARE = 8
"""Places of a turn at which calls without any tag are looked for."""


class ReplyReader:
    """Reads one turn.

    Whitespace between markup and text belongs to neither: it is in no part.

    Args:
        format: how the model writes thoughts and calls.
        prompt: text of the prompt, whose end tells whether the model begins within a thought.
        tools: OpenAI-shaped function schemas, or what is known of the tools; None: calls are not looked for and stay
            text.
        ids: makes the id of the next call; by default they are numbered, as the format has ids.
        early: tell each call while it is written, and drop it if it turns out unreadable; otherwise calls come as a
            whole, and none is dropped.
    """

    def __init__(
        self,
        format: CallFormat,
        prompt: str = "",
        tools: Sequence[Mapping[str, Any]] | Tools | None = (),
        ids: Callable[[], str] | None = None,
        *,
        early: bool = True,
    ):
        self._format = format
        self._calls = ReplyCalls(ids or map(format.call_id, itertools.count()).__next__, early=early)
        self._looks_for_calls = tools is not None
        self._tools = tools if isinstance(tools, Tools) else Tools.of(tools or ())
        self._regions = Regions(format.split if self._looks_for_calls else format.thoughts_only)
        self._opened: Opened | None = None
        self._body: CallBody | None = None
        self._between: str | None = None
        """Text behind a call that has ended its region by itself, until it is clear whether another one follows."""
        self._bare: BareCalls | None = None
        self._bare_tries = MAX_BARE if self._looks_for_calls and format.bare else 0
        self._bare_error: str | None = None
        self._may_be_bare = True
        """Nothing was said since the turn or the last thought began: what follows may be a call without a tag."""
        self._after_call = False
        self._in_thought = False
        self._clear()
        if begun := format.begun(prompt):
            self._advance(begun)
            if self._regions.held:  # a whole tag, perhaps: any more text decides
                self._advance(" ")
            calls = [part for part in self._parts if not isinstance(part, Said | Thought)]
            self._clear()
            self._parts += calls
        self._prompted = self._in_thought
        """The model is still in a thought that the prompt has opened."""

    def _clear(self) -> None:
        self.spans: list[Span] = []
        """The whole turn; joined, they are its text."""
        self._parts: list[Part] = []
        self._thought, self._said = Trimmed(), Trimmed()

    @property
    def outcomes(self) -> list[ToolCall]:
        """All calls in order, those that cannot be read among them."""
        return self._calls.outcomes

    @property
    def reply(self) -> Reply:
        """The turn as read so far: all of it, once it is finished."""
        errors = [call.error for call in self.outcomes if call.error is not None]
        return Reply(self._thought.shown, self._said.shown, list(self._calls.read), errors)

    def feed(self, text: str) -> list[Part]:
        """Take the next piece of text and return what it completes."""
        for at in range(0, len(text), LONGEST_FEED):
            self._advance(text[at : at + LONGEST_FEED])
        return self._take_parts()

    def finish(self) -> list[Part]:
        """Return what was held back; the turn is over."""
        self._advance("", last=True)
        if self._bare_error and not self.outcomes:
            self._parts += self._calls.refuse(self._bare_error)
        if self._prompted and self._looks_for_calls:
            self._run_what_ends_the_thought()
        self._show(Thought, self._thought.rest())
        self._show(Said, self._said.rest())
        return self._take_parts()

    def _take_parts(self) -> list[Part]:
        parts, self._parts = self._parts, []
        return parts

    def _show(self, part: type[Thought] | type[Said], text: str) -> None:
        if text:
            self._parts.append(part(text))

    def _advance(self, text: str, last: bool = False) -> None:
        while True:
            if self._body is not None:
                text = self._grow_call(self._body, text, last)
            elif self._between is not None:
                text = self._look_for_next(self._between + text, last)
            elif self._bare is not None:
                text = self._grow_bare(self._bare, text, last)
            else:
                text = self._split(text, last)
            waiting = self._body or self._bare or self._between or self._regions.held
            if not text and not (last and waiting):
                return

    def _split(self, text: str, last: bool) -> str:
        """Read text up to where a call begins or may begin; returns what is still to be read."""
        now, later = text[:SLICE], text[SLICE:]
        for piece in self._regions.read(now, last and not later):
            match kind(piece.field):
                case "tool_calls":
                    return self._begin_call(piece) + later
                case "thinking":
                    self._think(piece)
                case "draft":
                    self._say(piece.text, "draft")
                    self._may_be_bare = isinstance(piece, Closed)
                case "markup" if self._after_call or not piece.text:
                    self.spans.append(Span("markup", piece.text))
                case "content" if not isinstance(piece, Inside):
                    self.spans.append(Span("markup", piece.text))
                    self._said.cut()
                case _:
                    if self._may_be_a_call(piece):
                        return self._regions.cut(piece.end - len(piece.text)) + later
                    self._say(piece.text)
        return later

    def _think(self, piece: Piece) -> None:
        self.spans.append(Span("thought", piece.text))
        if isinstance(piece, Inside):
            self._show(Thought, self._thought.add(piece.text))
            return
        self._in_thought = isinstance(piece, Opened)
        self._prompted = False
        self._may_be_bare = True
        self._thought.cut()
        self._said.cut()
        if self._in_thought and self._thought.shown:
            self._thought.add("\n\n")

    def _say(self, text: str, kind: Any = "text") -> None:
        self.spans.append(Span(kind, text))
        self._show(Said, self._said.add(text))
        if not text.isspace():
            self._may_be_bare = self._after_call = False

    def _may_be_a_call(self, piece: Piece) -> bool:
        """Hold back a text that may be calls without a tag."""
        text = piece.text.lstrip()
        bare = self._format.bare
        if not (bare and text and self._may_be_bare and self._bare_tries and BareCalls.may_begin(bare, text)):
            return False
        self._bare_tries -= 1
        self._bare = BareCalls(bare, self._tools)
        if self._tools.names is not None:
            self._parts += self._calls.open(CallStream.bare(bare, self._tools.names))
        return True

    def _grow_bare(self, bare: BareCalls, text: str, last: bool) -> str:
        calls = bare.feed(text, last)
        self._parts += self._calls.tell(text)
        if calls is None:
            return ""
        self._bare = None
        if calls and calls[0].error is None:
            self._run(calls, bare.text)
            return ""
        self._parts += self._calls.refuse()
        self._bare_error = calls[0].error if calls else self._bare_error
        self._may_be_bare = False
        return bare.text

    def _begin_call(self, piece: Piece) -> str:
        assert isinstance(piece, Opened)
        return self._open(piece, self._regions.cut(piece.end))

    def _open(self, piece: Opened, rest: str, read: Callable[..., list[ToolCall]] = read_body) -> str:
        if self._calls.full:
            self._stop_calls()
            self._say(piece.text, "unreadable")
            return rest
        self._opened = piece
        form = self._format.fields[piece.field]
        self._body = CallBody(form, partial(read, form, piece.captures, tools=self._tools), self._tell)
        self._parts += self._calls.open(CallStream.within(form, piece.captures))
        return rest

    def _tell(self, text: str) -> int | None:
        self._parts += self._calls.tell(text)
        return self._calls.ends_at

    def _grow_call(self, body: CallBody, text: str, last: bool) -> str:
        ended = body.feed(text, last)
        if ended is None:
            return ""
        assert self._opened is not None
        self._body, written = None, self._opened.text + ended.text
        if ended.error is None:
            self._run(ended.calls, written)
            self._between = "" if ended.itself and "name" not in self._opened.captures else None
        else:
            self._parts += self._calls.refuse(ended.error)
            self._say(written, "unreadable")
        return ended.rest

    def _look_for_next(self, text: str, last: bool) -> str:
        """Go on with the next call of a region that has no closing tag, or with what follows its calls."""
        found = next_call(text, last)
        if found is None:
            self._between = text
            return ""
        self._between = None
        separators, call = found
        if call:
            assert self._opened is not None
            return self._open(Opened(self._opened.field, separators, 0), call, read_item)
        if separators:
            self.spans.append(Span("markup", separators))
        return text[len(separators) :]

    def _run(self, calls: Sequence[ToolCall], written: str) -> None:
        self._said.cut()
        self.spans.append(Span("call", written, tuple(calls)))
        self._may_be_bare, self._after_call = False, True
        room = MAX_CALLS - len(self.outcomes)
        self._parts += self._calls.end(calls)
        if len(calls) > room:
            self._stop_calls()

    def _stop_calls(self) -> None:
        self._parts += self._calls.refuse(f"too many calls: at most {MAX_CALLS} in one turn are run")
        self._regions = Regions(self._format.thoughts_only)
        self._bare_tries = 0

    def _run_what_ends_the_thought(self) -> None:
        """Run the calls at the very end of a thought that was never closed: the model waits for their results."""
        inner = ReplyReader(self._format, "", self._tools)
        inner.feed("".join(span.text for span in self.spans))
        inner.finish()
        ending = itertools.takewhile(
            lambda span: span.calls or span.kind == "markup" or not span.text.strip(), reversed(inner.spans)
        )
        for span in reversed(list(ending)):
            if span.calls:
                self._run(span.calls, "")
