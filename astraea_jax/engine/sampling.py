"""How the next token is chosen: per-request parameters, and the choice itself on the device."""

from __future__ import annotations

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from astraea_jax.errors import RequestError

MAX_STOPS = 16
"""Stop strings or stop tokens of one request."""


@dataclass(frozen=True)
class SamplingParams:
    """Per-request generation settings; temperature 0 is greedy.

    Raises:
        RequestError: a value is not finite or out of its range.
    """

    max_tokens: int = 256
    temperature: float = 0.0
    top_k: int = 0
    """Keep the k likeliest tokens; 0 keeps all."""
    top_p: float = 1.0
    """Keep the smallest set of likeliest tokens with at least this probability."""
    min_p: float = 0.0
    """Drop tokens less likely than this share of the likeliest."""
    seed: int = 0
    """The tokens drawn depend on the seed and the position only, not on the batch."""
    stop: tuple[str, ...] = ()
    """Generation ends before the first of these strings."""
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        _check_int("max_tokens", self.max_tokens, 1, 2**31 - 1)
        _check_float("temperature", self.temperature, 0.0, 100.0)
        _check_int("top_k", self.top_k, 0, 2**31 - 1)
        _check_float("top_p", self.top_p, 0.0, 1.0)
        _check_float("min_p", self.min_p, 0.0, 1.0)
        _check_int("seed", self.seed, 0, 2**32 - 1)
        if self.top_p == 0:
            raise RequestError("top_p is 0.0; use a value in (0, 1], or temperature 0 for greedy choice")
        for name, values in (("stop", self.stop), ("stop_token_ids", self.stop_token_ids)):
            if len(values) > MAX_STOPS:
                raise RequestError(f"{name} has {len(values)} entries; at most {MAX_STOPS} are served")
        if any(not isinstance(s, str) or not 0 < len(s) <= 256 for s in self.stop):
            raise RequestError("stop strings must be 1 to 256 characters long")


def _check_int(name: str, value: int, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise RequestError(f"{name} is {value!r}; it must be an integer in [{low}, {high}]")


def _check_float(name: str, value: float, low: float, high: float) -> None:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or not low <= value <= high:
        raise RequestError(f"{name} is {value!r}; it must be a finite number in [{low}, {high}]")


def sample(
    logits: jax.Array,
    temperature: jax.Array,
    top_k: jax.Array,
    top_p: jax.Array,
    min_p: jax.Array,
    seeds: jax.Array,
    positions: jax.Array,
) -> jax.Array:
    """Next token of every row, ``[R]`` int32, from ``logits [R, V]`` float32.

    The other arguments are ``[R]``: float32, but ``top_k`` and ``positions`` int32 and ``seeds`` uint32. Rows at
    temperature 0 take the likeliest token; if all do, nothing is drawn. Filters apply in the order top-k, top-p,
    min-p, on the probabilities at the row's temperature. Thresholds are found by bisection: no sort of V.
    """
    greedy = jnp.argmax(logits, axis=-1).astype(jnp.int32)

    def draw() -> jax.Array:
        logp = jax.nn.log_softmax(logits / jnp.where(temperature > 0, temperature, 1.0)[:, None])
        wanted = jnp.where(top_k > 0, top_k, logits.shape[-1])
        logp = _keep_likeliest(logp, jnp.ones_like(logp), wanted.astype(jnp.float32))
        logp = jax.nn.log_softmax(logp)
        logp = _keep_likeliest(logp, jnp.exp(logp), top_p)
        logp = jnp.where(logp >= logp.max(-1, keepdims=True) + jnp.log(min_p)[:, None], logp, -jnp.inf)
        noise = jax.vmap(lambda seed, at: _gumbel(seed, at, logits.shape[-1]))(seeds, positions)
        return jnp.where(temperature > 0, jnp.argmax(logp + noise, axis=-1).astype(jnp.int32), greedy)

    return jax.lax.cond(jnp.any(temperature > 0), draw, lambda: greedy)


def _gumbel(seed: jax.Array, position: jax.Array, size: int) -> jax.Array:
    key = jnp.stack([seed, position.astype(jnp.uint32)])
    return jax.random.gumbel(jax.random.wrap_key_data(key, impl="threefry2x32"), (size,))


def _keep_likeliest(logp: jax.Array, mass: jax.Array, enough: jax.Array) -> jax.Array:
    """Mask ``logp [R, V]`` to the fewest likeliest tokens whose ``mass [R, V]`` sums to at least ``enough [R]``."""
    high = logp.max(-1)
    low = jnp.full_like(high, -100.0)  # probabilities below e^-100 do not matter; nothing is cut if they are wanted

    def halve(_: int, bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = bounds
        middle = 0.5 * (low + high)
        ok = jnp.sum(jnp.where(logp >= middle[:, None], mass, 0.0), axis=-1) >= enough
        return jnp.where(ok, middle, low), jnp.where(ok, high, middle)

    # Invariant: the tokens at or above `low` are enough, or `low` still is the bottom.
    low, high = jax.lax.fori_loop(0, 40, halve, (low, high))
    keep = (logp >= low[:, None]) | (low <= -100.0)[:, None]
    return jnp.where(keep, logp, -jnp.inf)
