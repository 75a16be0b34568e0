"""The needs of requests beyond plain sampling: adjustments of logits, grammars, log-probabilities.

A :class:`Tracker` follows the tokens of one request on the host; :class:`Extras` is what the trackers of a step's rows
have for the device.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from astraea_jax.engine.generation import TokenLogprob
from astraea_jax.engine.resampling import ENTRY, mask_words
from astraea_jax.engine.sampling import SamplingParams

FORBIDDEN = -1e30
"""The bias of tokens that ``min_tokens`` forbids. It is finite, so that they can be drawn where a grammar permits no
other."""


class GrammarFault(Exception):
    """A matcher has failed, or contradicts itself."""


@dataclass(frozen=True)
class Extras:
    """Everything that the rows of one step need beyond plain sampling."""

    rows: list[int]
    """Rows to draw again."""
    entries: np.ndarray
    """``[n, ENTRY]`` int32, adjustments of their logits; see :func:`~.resampling.adjusted`."""
    masked: list[int]
    """Those of the rows that have a mask."""
    masks: np.ndarray
    """``[len(masked), mask_words(V)]`` int32."""
    logprobs: bool
    """Whether any row wants log-probabilities."""


class Adjustments:
    """The logits of one request that differ from the model's.

    Args:
        params: penalties, biases and min_tokens.
        prompt: its tokens.
        stops: tokens that end it.
        vocab_size: V.
    """

    def __init__(self, params: SamplingParams, prompt: Sequence[int], stops: frozenset[int], vocab_size: int):
        self._params, self._vocab_size = params, vocab_size
        self._counts: Counter[int] = Counter()
        self._generated = 0
        self._stops = [token for token in stops if token < vocab_size] if params.min_tokens else []
        biases = dict(params.logit_bias)
        repeated = prompt if params.repetition_penalty != 1 else ()
        tokens = np.unique(np.array([*repeated, *biases, *self._stops], np.int64)).tolist()
        self._at = {token: i for i, token in enumerate(tokens)}
        self._tokens = np.array(tokens, np.int32)
        self._values = np.tile(np.array([0, 1, 0], np.float32), (len(tokens), 1))  # bias, factor, addend
        for token in set(repeated):
            self._values[self._at[token], 1] = params.repetition_penalty
        for token, bias in biases.items():
            self._values[self._at[token], 0] = bias
        for token in self._stops:
            self._values[self._at[token], 0] = FORBIDDEN

    @property
    def penalizes(self) -> bool:
        """Whether it matters what has been generated."""
        p = self._params
        return p.presence_penalty != 0 or p.frequency_penalty != 0 or p.repetition_penalty != 1

    @property
    def active(self) -> bool:
        """Whether any logit differs now."""
        return bool(self.penalizes or self._params.logit_bias or self._generated < self._params.min_tokens)

    def push(self, token: int) -> None:
        """Take in a token that has been generated."""
        self._generated += 1
        if self._generated == self._params.min_tokens:
            biases = dict(self._params.logit_bias)
            for stop in self._stops:
                self._values[self._at[stop], 0] = biases.get(stop, 0.0)
        if self.penalizes:
            self._counts[token] += 1
            at = self._at.setdefault(token, len(self._at))
            if at == len(self._tokens):
                self._grow()
            p = self._params
            self._tokens[at] = token
            self._values[at, 1:] = p.repetition_penalty, -p.presence_penalty - p.frequency_penalty * self._counts[token]

    def _grow(self) -> None:
        more = max(16, len(self._tokens))
        self._tokens = np.concatenate((self._tokens, np.zeros(more, np.int32)))
        self._values = np.concatenate((self._values, np.tile(np.array([0, 1, 0], np.float32), (more, 1))))

    def entries(self, row: int) -> np.ndarray:
        """The adjustments ``[n, ENTRY]`` int32 of its row in a step."""
        n = len(self._at)
        entries = np.empty((n, ENTRY), np.int32)
        np.add(self._tokens[:n], row * self._vocab_size, out=entries[:, 0])
        entries[:, 1:] = self._values[:n].view(np.int32)
        return entries


class Tracker:
    """Follows one request whose sampling depends on more than its logits, or that wants to know about them.

    Args:
        params: not plain.
        prompt: its tokens.
        stops: tokens that end it.
        vocab_size: V.

    Raises:
        GrammarFault: the grammar makes no matcher.
    """

    def __init__(self, params: SamplingParams, prompt: Sequence[int], stops: frozenset[int], vocab_size: int):
        self.logprobs = params.logprobs
        self.adjustments = Adjustments(params, prompt, stops, vocab_size)
        try:
            self.matcher = params.grammar.matcher() if params.grammar is not None else None
        except Exception as error:
            raise GrammarFault("the grammar cannot be followed") from error

    def push(self, token: int) -> bool:
        """Take in a token that has been generated and does not end the request; True: the grammar allows no more.

        Raises:
            GrammarFault: the grammar does not allow it, or the matcher fails.
        """
        self.adjustments.push(token)
        if self.matcher is None:
            return False
        try:
            if self.matcher.accept(token):
                return self.matcher.finished
        except Exception as error:
            raise GrammarFault("the grammar cannot be followed") from error
        raise GrammarFault(f"the grammar does not allow token {token}, which its own mask allowed")


class Collector:
    """Collects the extras of a step, row by row."""

    def __init__(self, vocab_size: int):
        self._words = mask_words(vocab_size)
        self._rows: list[int] = []
        self._entries = [np.empty((0, ENTRY), np.int32)]
        self._masked: list[int] = []
        self._masks: list[np.ndarray] = []
        self._logprobs = False

    def add(self, row: int, tracker: Tracker) -> None:
        """Add what a request needs, whose row this is.

        Raises:
            GrammarFault: the matcher fails, or allows no token; nothing has been added then.
        """
        if masked := tracker.matcher is not None and not tracker.matcher.free:
            mask = np.zeros(self._words, np.int32)
            try:
                tracker.matcher.fill(mask)
            except Exception as error:
                raise GrammarFault("the grammar cannot be followed") from error
            if not mask.any():
                raise GrammarFault("the grammar allows no token here")
            self._masked.append(row)
            self._masks.append(mask)
        if tracker.adjustments.active:
            self._entries.append(tracker.adjustments.entries(row))
        if masked or tracker.adjustments.active:
            self._rows.append(row)
        self._logprobs |= tracker.logprobs is not None

    def collected(self) -> Extras | None:
        """All of it; None: the step is as it should be."""
        if not (self._rows or self._logprobs):
            return None
        masks = np.array(self._masks, np.int32).reshape(-1, self._words)
        return Extras(self._rows, np.concatenate(self._entries), self._masked, masks, self._logprobs)


def token_logprob(reported: np.ndarray, token: int, top: int) -> TokenLogprob:
    """Read the log-probabilities of a ``token`` and ``top`` others from a row of :func:`~.resampling.logprobs`."""
    ids = reported[1 + len(reported) // 2 :]
    values = reported[: 1 + len(ids)].view(np.float32).tolist()
    return TokenLogprob(token, values[0], tuple(zip(ids[:top].tolist(), values[1:], strict=False)))
