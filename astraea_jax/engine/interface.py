"""Describes what callers need of "something that generates": an engine here, several, or one on a server."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Protocol

from astraea_jax.engine.generation import Delta, Usage
from astraea_jax.engine.sampling import SamplingParams
from astraea_jax.errors import RequestError
from astraea_jax.models.tokenizer import Tokenizer

MAX_NAME = 256
"""Characters of the name of a session or a tool."""


class Stream(Protocol):
    """A running request, such as :class:`astraea_jax.engine.generation.Generation`."""

    @property
    def usage(self) -> Usage | None: ...
    def __aiter__(self) -> AsyncIterator[Delta]: ...
    def cancel(self) -> None: ...


class Model(Protocol):
    """What an agent needs of an engine."""

    @property
    def tokenizer(self) -> Tokenizer: ...
    def generate(
        self, prompt: Sequence[int], params: SamplingParams | None = None, *, session: str | None, final: bool
    ) -> Stream: ...
    def tool_called(self, session: str, tool: str) -> None: ...
    def end_session(self, session: str) -> None: ...


def check_name(what: str, name: object) -> None:
    """Check that ``name`` can name ``what``, a session or a tool.

    Raises:
        RequestError: it is not text of 1 to ``MAX_NAME`` printable characters.
    """
    if not isinstance(name, str):
        raise RequestError(f"the name of a {what} must be text, not {type(name).__name__}")
    if not 1 <= len(name) <= MAX_NAME:
        raise RequestError(f"the name of a {what} has {len(name)} characters; it must have 1 to {MAX_NAME}")
    if not name.isprintable():
        raise RequestError(f"the name of a {what} has characters that cannot be printed: {name[:60]!r}")
