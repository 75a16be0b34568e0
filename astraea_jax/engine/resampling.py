"""Drawing from the logits of a step, for rows that need more than the most probable token.

The step takes the most probable token of every row; rows with a temperature are drawn at once. What penalties, biases
and grammars make of a row's logits depends on the token before, which the host learns while the forward of the step
runs; then it changes some logits, masks others, and has those rows drawn again. If all rows are greedy, nothing here
runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from astraea_jax.engine.sampling import MAX_LOGPROBS
from astraea_jax.engine.step import COLUMNS, Step, remembered

ENTRIES = 4096
"""Logits that one execution adjusts."""

ENTRY = 4
"""Values of an adjustment: the flat index of a logit; bits of bias, factor and addend."""

WORD = 32
"""Tokens of one word of a mask."""


def mask_words(vocab_size: int) -> int:
    """Words of a mask over the vocabulary."""
    return -(-vocab_size // WORD)


def adjusted(logits: jax.Array, entries: jax.Array) -> jax.Array:
    """``logits [R, V]`` after ``entries [E, ENTRY]`` int32, of which those beyond the logits are ignored.

    Each adds a bias to its logit, then divides it by a factor if it is above 0 and multiplies it otherwise, then adds
    an addend. No logit may have two.
    """
    row, token = jnp.divmod(entries[:, 0], logits.shape[1])
    bias, factor, addend = jax.lax.bitcast_convert_type(entries[:, 1:], jnp.float32).T
    biased = logits.at[row, token].get(mode="fill", fill_value=0.0) + bias
    changed = jnp.where(biased > 0, biased / factor, biased * factor) + addend
    return logits.at[row, token].set(changed, mode="drop")


def masked(logits: jax.Array, masks: jax.Array) -> jax.Array:
    """``logits [R, V]``, -inf for tokens whose bit in ``masks [R, mask_words(V)]`` int32 is 0."""
    bits = (masks[:, :, None] >> jnp.arange(WORD)) & 1
    return jnp.where(bits.reshape(len(masks), -1)[:, : logits.shape[1]] == 1, logits, -jnp.inf)


def logprobs(logits: jax.Array, sampled: jax.Array) -> jax.Array:
    """Log-probabilities of ``sampled [R]`` and of the most probable tokens, k of them: ``[R, 1 + 2 * k]`` int32.

    A row holds the bits of the sampled token's float32, those of the others, the highest first, and their ids.
    """
    logp = jax.nn.log_softmax(logits)
    chosen = jnp.take_along_axis(logp, jnp.maximum(sampled, 0)[:, None], axis=1)
    top, ids = jax.lax.top_k(logp, min(MAX_LOGPROBS, logits.shape[1]))
    values = jax.lax.bitcast_convert_type(jnp.concatenate((chosen, top), axis=1), jnp.int32)
    return jnp.concatenate((values, ids.astype(jnp.int32)), axis=1)


def lowerings(step: Step, rows: int) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Names and lowerings of the executables for steps of R ``rows``: "adjust", "redraw" and "logprobs"."""
    logits, sampled = step.logits(rows), _replicated(step, rows)
    sharding, replicated = logits.sharding, step.replicated

    def redraw(logits: Any, last: Any, sampled: Any, rows: Any, masks: Any) -> tuple[jax.Array, jax.Array]:
        drawn = jnp.where(rows[:, 3] > 0, step.sampled(masked(logits, masks), rows), sampled)
        return remembered(last, rows, drawn), drawn

    adjust = jax.jit(adjusted, out_shardings=sharding)
    yield "adjust", partial(adjust.lower, logits, _replicated(step, ENTRIES, ENTRY))
    again = jax.jit(redraw, out_shardings=replicated, donate_argnums=1)
    described, masks = _replicated(step, rows, COLUMNS), _replicated(step, rows, mask_words(step.vocab_size))
    yield "redraw", partial(again.lower, logits, step.last, sampled, described, masks)
    yield "logprobs", partial(jax.jit(logprobs, out_shardings=replicated).lower, logits, sampled)


def _replicated(step: Step, *shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, np.int32, sharding=step.replicated)
