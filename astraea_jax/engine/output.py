"""The text of a request as it grows, cut before its first stop string."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from astraea_jax.engine.sampling import SamplingParams


class Text(Protocol):
    """Decodes tokens one by one, such as :class:`astraea_jax.models.tokenizer.TextStream`."""

    delimiters: Mapping[int, str]
    """Tokens that are not text (beginning, end and padding of sequences), and how they are written."""

    def push(self, token: int) -> str: ...
    def flush(self) -> str: ...


class Output:
    """Decodes the tokens of one request and looks for its stop strings.

    Special tokens such as ``<tool_call>`` are text like others. Tokens that end the request have no text; nor have
    those that begin, end or pad sequences, unless a stop string asks for them. Text that may be the beginning of a stop
    string is held back until that is certain. The text of the first ``min_tokens`` is no part of a stop string.

    Args:
        stream: decodes tokens.
        params: has the stop strings.
        eos: tokens that end the request.
    """

    def __init__(self, stream: Text, params: SamplingParams, eos: frozenset[int]):
        self._stream = stream
        self._stops, self._free = params.stop, params.min_tokens
        self._longest = max((len(stop) for stop in params.stop), default=1)
        written = {token for token, text in stream.delimiters.items() if any(text in stop for stop in params.stop)}
        self._silent = (stream.delimiters.keys() - written) | eos.union(params.stop_token_ids)
        self._held = ""
        self.stop: str | None = None
        """The stop string that has appeared."""

    @property
    def stopped(self) -> bool:
        """Whether a stop string has appeared."""
        return self.stop is not None

    def push(self, token: int) -> str:
        """Return the text that is certain after ``token``."""
        self._free -= 1
        if token in self._silent:
            return ""
        text = self._held + self._stream.push(token)
        if not self._stops or self._free >= 0:
            return text
        return self._cut(text, len(text) - self._longest + 1)

    def flush(self) -> str:
        """Return what was held back, when the request has ended."""
        text = self._held + self._stream.flush()
        return "" if self.stopped else self._cut(text, len(text))

    def _cut(self, text: str, certain: int) -> str:
        # The stop that is complete first counts, however the text is divided into tokens.
        found = [(at + len(stop), at, stop) for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            _, at, self.stop = min(found)
            self._held = ""
            return text[:at]
        certain = max(certain, 0)
        self._held = text[certain:]
        return text[:certain]
