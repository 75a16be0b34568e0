"""Sampling: the parameters of a request, and drawing its next token on the device."""

from __future__ import annotations

import dataclasses
import secrets
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import islice
from numbers import Integral, Real
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np

from astraea_jax.errors import RequestError, shown

MAX_STOPS = 16
"""Stop strings or stop tokens of one request."""

MAX_STOP_CHARS = 256

MAX_BIASES = 300
"""Tokens that the logit bias of one request may name."""

MAX_LOGPROBS = 20
"""Most probable tokens that are reported beside the chosen one."""

LEAST_REPETITION_PENALTY = 0.01
"""Below it logits that are divided by it may leave what float32 holds."""

MIN_TEMPERATURE = 1e-5
"""Below it a request is greedy: float32 cannot tell a draw from argmax any more."""


class Matcher(Protocol):
    """Follows one text through a grammar, token by token. Only the thread of the serving loop uses it."""

    @property
    def finished(self) -> bool:
        """Whether the text is complete and nothing may follow it."""

    @property
    def free(self) -> bool:
        """Whether any token may come next, so that nobody needs to ask :meth:`fill`."""

    def fill(self, row: np.ndarray) -> None:
        """Write which tokens may come next into ``row [ceil(V / 32)]`` int32: bit t % 32 of word t // 32 is token t."""

    def accept(self, token: int) -> bool:
        """Go on by a token; False: the grammar does not allow it here."""


@runtime_checkable
class Grammar(Protocol):
    """A compiled grammar, which any number of requests may share."""

    def matcher(self) -> Matcher:
        """Begin at the start of a text; must be cheap, because the serving loop waits for it."""


@dataclass(frozen=True)
class SamplingParams:
    """Sampling of one request's tokens, and where it ends.

    Numbers may be NumPy's. Every field is checked and converted to the type below when the object is made.

    Raises:
        RequestError: a value has the wrong type, is not finite or out of its range; the message names the field.
    """

    max_tokens: int = 256
    temperature: float = 0.0
    """0 is greedy: the most probable token, the first one of several."""
    top_k: int = 0
    """Sample from the k most probable tokens only; 0: from all."""
    top_p: float = 1.0
    """Sample from the fewest most probable tokens that have at least this probability together."""
    min_p: float = 0.0
    """Drop tokens whose probability is below this share of the highest one."""
    seed: int | None = None
    """The same seed gives the same tokens, whatever else is in the batch; None: every request draws afresh."""
    stop: tuple[str, ...] = ()
    """Strings that end the text: it is cut before the first one. One string is accepted as it is; None: there are none.
    A special token may be one, or be a part of one."""
    stop_token_ids: tuple[int, ...] = ()
    """Tokens that end the request; their text is left out."""
    ignore_eos: bool = False
    """Go on after the tokens that end the model's turns."""
    presence_penalty: float = 0.0
    """Taken from the logit of every token that has been generated; below 0 it makes them likelier."""
    frequency_penalty: float = 0.0
    """Taken from the logit of a token once for each time that it has been generated."""
    repetition_penalty: float = 1.0
    """Divides the logits above 0, and multiplies those below, of tokens in the prompt or in what has been generated."""
    min_tokens: int = 0
    """Tokens before which neither a token nor a string may end the request; a grammar may."""
    logit_bias: tuple[tuple[int, float], ...] = ()
    """Tokens, and what is added to their logits; a mapping is accepted. None: there are none."""
    logprobs: int | None = None
    """Report the logarithm of the probability of every chosen token, and of so many most probable ones; None: of none.
    They are those of the model, before temperature, penalties, bias and grammar."""
    grammar: Grammar | None = None
    """What the text must look like; the request ends with ``"stop"`` where nothing may follow."""

    def __post_init__(self) -> None:
        top_p = _number("top_p", self.top_p, 0.0, 1.0)
        if top_p == 0:
            raise RequestError("top_p is 0.0; use a value in (0, 1], or temperature 0 for greedy sampling")
        if not isinstance(self.ignore_eos, bool):
            raise RequestError(f"ignore_eos is {shown(self.ignore_eos)}; it must be True or False")
        repetition_penalty = _number("repetition_penalty", self.repetition_penalty, LEAST_REPETITION_PENALTY, 10.0)
        if self.grammar is not None and not isinstance(self.grammar, Grammar):
            raise RequestError(f"grammar is {shown(self.grammar)}; it must be a compiled grammar")
        max_tokens = _integer("max_tokens", self.max_tokens, 1, 2**31 - 1)
        min_tokens = _integer("min_tokens", self.min_tokens, 0, 2**31 - 1)
        if min_tokens > max_tokens:
            raise RequestError(f"min_tokens is {min_tokens}, which is more than max_tokens {max_tokens}")
        checked: dict[str, Any] = {
            "max_tokens": max_tokens,
            "temperature": _number("temperature", self.temperature, 0.0, 100.0),
            "top_k": _integer("top_k", self.top_k, 0, 2**31 - 1),
            "top_p": top_p,
            "min_p": _number("min_p", self.min_p, 0.0, 1.0),
            "seed": None if self.seed is None else _integer("seed", self.seed, 0, 2**32 - 1),
            "stop": _stops(self.stop),
            "stop_token_ids": tuple(
                _integer("stop_token_ids", token, 0, 2**31 - 1)
                for token in _several("stop_token_ids", self.stop_token_ids)
            ),
            "presence_penalty": _number("presence_penalty", self.presence_penalty, -2.0, 2.0),
            "frequency_penalty": _number("frequency_penalty", self.frequency_penalty, -2.0, 2.0),
            "repetition_penalty": repetition_penalty,
            "min_tokens": min_tokens,
            "logit_bias": _biases(self.logit_bias),
            "logprobs": None if self.logprobs is None else _integer("logprobs", self.logprobs, 0, MAX_LOGPROBS),
        }
        for name, value in checked.items():
            object.__setattr__(self, name, value)

    @property
    def plain(self) -> bool:
        """Whether one draw from the model's logits is all that a token takes."""
        penalized = self.presence_penalty != 0 or self.frequency_penalty != 0 or self.repetition_penalty != 1
        return not (
            penalized or self.min_tokens or self.logit_bias or self.logprobs is not None or self.grammar is not None
        )

    def seeded(self) -> SamplingParams:
        """Return these parameters with a random seed if they have none; whoever accepts a request calls this once."""
        return self if self.seed is not None else dataclasses.replace(self, seed=secrets.randbits(32))


def _stops(value: Any) -> tuple[str, ...]:
    given = (value,) if isinstance(value, str) else _several("stop", value)
    stops = tuple(str.__str__(stop) if isinstance(stop, str) else stop for stop in given)
    for stop in stops:
        if not isinstance(stop, str) or not 0 < len(stop) <= MAX_STOP_CHARS:
            raise RequestError(f"stop holds {shown(stop)}; stop strings must be 1 to {MAX_STOP_CHARS} characters long")
        if any("\ud800" <= char <= "\udfff" for char in stop):
            raise RequestError(f"stop holds {shown(stop)}; half a surrogate pair is no text")
    return stops


def _biases(value: Any) -> tuple[tuple[int, float], ...]:
    pairs = _several("logit_bias", value.items() if isinstance(value, Mapping) else value, MAX_BIASES)
    biases: dict[int, float] = {}
    for pair in pairs:
        if not isinstance(pair, tuple | list) or len(pair) != 2:
            raise RequestError(f"logit_bias holds {shown(pair)}; it must be pairs of a token id and a number")
        token = _integer("a token of logit_bias", pair[0], 0, 2**31 - 1)
        if token in biases:
            raise RequestError(f"logit_bias names token {token} twice")
        biases[token] = _number(f"logit_bias of token {token}", pair[1], -100.0, 100.0)
    return tuple(biases.items())


def _several(name: str, value: Any, most: int = MAX_STOPS) -> tuple[Any, ...]:
    """The items of a list, tuple, set or array of at most ``most``; None: no items."""
    if value is None:
        return ()
    try:
        if isinstance(value, str | bytes | Mapping) or not isinstance(value, Iterable):
            raise TypeError
        items = tuple(islice(value, most + 1))
    except TypeError:
        raise RequestError(f"{name} is {shown(value)}; it must be a list") from None
    if len(items) > most:
        raise RequestError(f"{name} has more than {most} entries, which is the most that is served")
    return items


def _integer(name: str, value: Any, low: int, high: int) -> int:
    if isinstance(value, bool) or not isinstance(value, Integral) or not low <= int(value) <= high:
        raise RequestError(f"{name} is {shown(value)}; it must be an integer in [{low}, {high}]")
    return int(value)


def _number(name: str, value: Any, low: float, high: float) -> float:
    ordered: Any = value  # integers beyond float64, too
    try:
        allowed = not isinstance(value, bool) and isinstance(value, Real) and low <= ordered <= high  # nan is not
    except TypeError:  # NumPy's times are numbers that no other number can be compared with
        allowed = False
    if not allowed:
        raise RequestError(f"{name} is {shown(value)}; it must be a finite number in [{low}, {high}]")
    return float(value)


def likeliest(logits: jax.Array) -> jax.Array:
    """The first of the highest of each row of ``logits [R, V]``: ``[R]`` int32, and V if one is not a number.

    A maximum and a minimum, since XLA for CPUs computes argmax number by number, and takes ten times as long.
    """
    places = jnp.arange(logits.shape[-1], dtype=jnp.int32)
    highest = logits == logits.max(-1, keepdims=True)
    return jnp.where(highest, places, logits.shape[-1]).min(-1)


def sample(
    logits: jax.Array,
    temperature: jax.Array,
    top_k: jax.Array,
    top_p: jax.Array,
    min_p: jax.Array,
    seeds: jax.Array,
    positions: jax.Array,
) -> jax.Array:
    """Sample the next token of every row: ``[R]`` int32 from ``logits [R, V]`` float32.

    The other arguments are ``[R]``: float32, but ``top_k`` and ``positions`` int32 and ``seeds`` uint32. Rows below
    ``MIN_TEMPERATURE`` take the argmax; if all do, nothing is drawn. The filters apply in the order top-k, top-p,
    min-p, on the probabilities at the row's temperature. Of equally probable tokens top-k and top-p keep the first
    ones, as argmax does. A row draws the same token whatever the other rows are. Its maximum must be finite.
    """
    greedy = likeliest(logits)

    def draw() -> jax.Array:
        draws = temperature >= MIN_TEMPERATURE  # not shared with `any` below, which devices would have to add up then
        # Differences to the maximum are divided, because logits themselves can overflow at a low temperature.
        scaled = (logits - logits.max(-1, keepdims=True)) / jnp.where(draws, temperature, 1.0)[:, None]
        logp = jax.nn.log_softmax(scaled)
        wanted = jnp.where(top_k > 0, top_k, logits.shape[-1])
        logp = _keep_most_probable(logp, jnp.ones_like(logp), wanted.astype(jnp.float32))
        logp = jax.nn.log_softmax(logp)
        logp = _keep_most_probable(logp, jnp.exp(logp), top_p)
        logp = jnp.where(logp >= logp.max(-1, keepdims=True) + jnp.log(min_p)[:, None], logp, -jnp.inf)
        noise = jax.vmap(lambda seed, at: _gumbel(seed, at, logits.shape[-1]))(seeds, positions)
        return jnp.where(draws, likeliest(logp + noise), greedy)

    return jax.lax.cond(jnp.any(temperature >= MIN_TEMPERATURE), draw, lambda: greedy)


def _gumbel(seed: jax.Array, position: jax.Array, size: int) -> jax.Array:
    key = jnp.stack([seed, position.astype(jnp.uint32)])
    return jax.random.gumbel(jax.random.wrap_key_data(key, impl="threefry2x32"), (size,))


LOWEST = -100.0
"""Tokens below a probability of e^-100 do not matter; no filter tells them apart."""


def _keep_most_probable(logp: jax.Array, mass: jax.Array, enough: jax.Array) -> jax.Array:
    """Mask ``logp [R, V]`` to the fewest most probable tokens whose ``mass [R, V]`` sums to at least ``enough [R]``."""
    bound = _threshold(logp, mass, enough, logp.max(-1))
    edge = jnp.where(logp >= bound[:, None], logp, jnp.inf).min(-1, keepdims=True)
    tied = logp == edge
    missing = enough - jnp.sum(jnp.where(logp > edge, mass, 0.0), axis=-1)
    before = jnp.cumsum(jnp.where(tied, mass, 0.0), axis=-1) - mass  # the mass of equally probable tokens ahead
    taken = before < jnp.maximum(missing, jnp.finfo(jnp.float32).tiny)[:, None]
    keep = (logp > edge) | (tied & taken) | (bound <= LOWEST)[:, None]
    return jnp.where(keep, logp, -jnp.inf)


def _threshold(logp: jax.Array, mass: jax.Array, enough: jax.Array, highest: jax.Array) -> jax.Array:
    """Bisect for the highest bound ``[R]`` with enough ``mass [R, V]`` at or above it; ``LOWEST`` if none has.

    A search of some passes over V, because a sort takes longer.
    """

    def halve(_: int, bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = bounds
        middle = 0.5 * (low + high)
        ok = jnp.sum(jnp.where(logp >= middle[:, None], mass, 0.0), axis=-1) >= enough
        return jnp.where(ok, middle, low), jnp.where(ok, high, middle)

    return jax.lax.fori_loop(0, 40, halve, (jnp.full_like(highest, LOWEST), highest))[0]
