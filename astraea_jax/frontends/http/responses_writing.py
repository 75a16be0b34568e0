"""A response while it is written: the events of its turn, and its end."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from functools import partial
from typing import Any

from astraea_jax.frontends.http.errors import Failure
from astraea_jax.frontends.http.logprobs import chat_logprobs, count, written
from astraea_jax.frontends.http.responses_asked import Asked
from astraea_jax.frontends.http.responses_output import Event, ResponseBuilder
from astraea_jax.frontends.http.responses_record import Record
from astraea_jax.frontends.http.turns import Turn
from astraea_jax.frontends.http.usage import report_of
from astraea_jax.models.tokenizer import Tokenizer

REFUSED = {429: "rate_limit_exceeded"}
"""Statuses -> codes of responses that have failed; all others are the server's fault."""


class Writing:
    """A response while it is written.

    Args:
        asked: what it answers.
        turn: the model's.
        builder: puts the response together.
        tokenizer: names the tokens of log-probabilities.
    """

    def __init__(self, asked: Asked, turn: Turn, builder: ResponseBuilder, tokenizer: Tokenizer):
        self.asked, self.turn, self.builder = asked, turn, builder
        self._tokenizer = tokenizer
        self.record: Record | None = None
        """Stored with the response."""
        self.ended: dict[str, Any] | None = None
        """The whole response, once it is."""

    async def events(self) -> AsyncIterator[list[Event]]:
        """Events as the model writes; with the last ones, the response is whole and stored."""
        async for delta in self.turn:
            logprobs: Sequence[dict[str, Any]] = ()
            if delta.logprobs:
                write = partial(chat_logprobs, self._tokenizer, delta.logprobs)
                logprobs = (await written(count(delta.logprobs), write))["content"]
            if events := self.builder.add(delta.parts, len(delta.token_ids), logprobs):
                yield events
        assert self.turn.finish_reason is not None  # its last delta is out
        assert self.turn.usage is not None
        yield self.end(self.builder.finish(self.turn.finish_reason, self.turn.usage, report_of(self.turn)))

    def end(self, last: list[Event]) -> list[Event]:
        """Take in the builder's last events, and return them; the response is stored."""
        self.ended = last[-1]["response"]
        self.asked.keep(self.ended, self.record)
        return last

    def failed(self, failure: Failure) -> list[Event]:
        """Return the last events of a response that cannot be finished."""
        return self.builder.fail(REFUSED.get(failure.status, "server_error"), failure.message)
