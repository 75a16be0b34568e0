"""Calls of ``generate``, checked once, before anybody decides who runs them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from astraea_jax.engine.events import Key, check_tokens, checked_key, checked_name, checked_priority, checked_prompt
from astraea_jax.engine.sampling import SamplingParams
from astraea_jax.errors import RequestError, shown


@dataclass(frozen=True, slots=True)
class Call:
    """A request that can run on any engine of its model; see :meth:`~.engine.Engine.generate`."""

    prompt: tuple[int, ...]
    params: SamplingParams
    """With a seed."""
    session: Key | None
    final: bool
    salt: str
    owner: str
    parent: Key | None
    priority: int


def checked_call(
    limits: tuple[int, int],
    prompt: Sequence[int],
    params: SamplingParams | None,
    *,
    session: str | None,
    final: bool,
    salt: str,
    owner: str,
    parent: str | None,
    priority: int,
) -> Call:
    """Return a call with plain values; ``limits`` are the longest context, and the size of the vocabulary.

    Raises:
        RequestError: an argument is not what it should be; the message says which.
    """
    params = SamplingParams() if params is None else params
    if not isinstance(params, SamplingParams):
        raise RequestError(f"params are of type {type(params).__name__}; they must be SamplingParams")
    if not isinstance(final, bool):
        raise RequestError(f"final is {shown(final)}; it must be True or False")
    max_context, vocab_size = limits
    check_tokens(params, vocab_size)
    ids = checked_prompt(prompt, params.max_tokens, max_context, vocab_size)
    owner = checked_name("owner", owner, empty=True)
    return Call(
        prompt=ids,
        params=params.seeded(),
        session=None if session is None else checked_key(session, owner),
        final=final,
        salt=checked_name("cache salt", salt, empty=True),
        owner=owner,
        parent=None if parent is None else checked_key(parent, owner),
        priority=checked_priority(priority),
    )
