"""Events that cross from callers to the serving loop: typed values, checked on the caller's side.

The loop trusts them, so everything that a caller passes is looked at here.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import numpy as np

from astraea_jax.engine.generation import Mailbox
from astraea_jax.engine.sampling import SamplingParams
from astraea_jax.errors import RequestError, shown
from astraea_jax.scheduler.handover import HandOver
from astraea_jax.scheduler.view import Held, ProgramView
from astraea_jax.scheduler.wait import Wait

if TYPE_CHECKING:
    from astraea_jax.engine.calls import Call

MAX_NAME = 256
"""Characters of the name of a session, an owner, a cache salt or a tool."""

MAX_TOOLS = 128
"""Tools that a program may wait for at once; of more, as many are looked at."""

T = TypeVar("T")
Key = tuple[str, str]
"""A session: its owner and its name."""


@dataclass(frozen=True, slots=True)
class Question(Generic[T]):
    """Answer in the next turn."""

    answer: Future[T]


@dataclass(frozen=True, slots=True)
class Submit:
    """Queue a request."""

    mailbox: Mailbox
    call: Call


@dataclass(frozen=True, slots=True)
class Cancel:
    """End the request of a mailbox."""

    mailbox: Mailbox


@dataclass(frozen=True, slots=True)
class EndSession:
    """End a program."""

    session: Key


@dataclass(frozen=True, slots=True)
class Waits:
    """Say what a program waits for."""

    session: Key
    wait: Wait


@dataclass(frozen=True, slots=True)
class Fork(Question[None]):
    """Open a program that shares what another has computed, and answer."""

    session: Key
    child: Key


@dataclass(frozen=True, slots=True)
class ReplaceTail:
    """Compute the next prompt of a waiting program ahead."""

    mailbox: Mailbox
    prompt: tuple[int, ...]
    session: Key
    salt: str


@dataclass(frozen=True, slots=True)
class AskHeld(Question[Held]):
    """Answer with what a request of a session would find computed; None: of a new program."""

    prompt: tuple[int, ...]
    block_hashes: tuple[bytes, ...]
    session: Key | None
    salt: str


@dataclass(frozen=True, slots=True)
class Check:
    """Answer once everything before has been taken in; with an AssertionError if the accounts do not balance."""

    answer: Future[None]


@dataclass(frozen=True, slots=True)
class Look(Question[list[ProgramView]]):
    """Answer with a picture of up to ``limit`` programs of an owner; None: of all."""

    limit: int
    owner: str | None


@dataclass(frozen=True, slots=True)
class LetGo(Question[list[HandOver]]):
    """Answer with programs that wait, of these sessions or (None) of any, which other replicas have from now on."""

    sessions: tuple[Key, ...] | None


@dataclass(frozen=True, slots=True)
class TakeOver(Question[None]):
    """Open a program that another replica has let go, and answer."""

    handed: HandOver


@dataclass(frozen=True, slots=True)
class Stop:
    """End the loop."""


Event = Submit | Cancel | EndSession | Waits | ReplaceTail | Check | Question[Any] | Stop


def checked_prompt(prompt: Sequence[int], max_tokens: int, max_context: int, vocab_size: int) -> tuple[int, ...]:
    """``prompt`` as plain integers.

    Raises:
        RequestError: it is no sequence of token ids, empty, too long with ``max_tokens`` more, or holds ids outside of
            ``[0, vocab_size)``.
    """
    try:
        size, ids = len(prompt), np.asarray(prompt)
    except (TypeError, ValueError, OverflowError):
        size, ids = 1, np.empty(1, object)
    if size == 0:
        raise RequestError("the prompt is empty; give at least one token")
    if ids.ndim != 1 or ids.dtype.kind not in "iu" or bool in map(type, prompt):
        raise RequestError("the prompt must be a sequence of token ids, that is of integers")
    if len(ids) + max_tokens > max_context:
        raise RequestError(
            f"a prompt of {len(ids)} tokens and max_tokens {max_tokens} exceed the context of {max_context} tokens"
        )
    if not 0 <= ids.min() <= ids.max() < vocab_size:
        raise RequestError(f"prompt holds a token id outside the vocabulary [0, {vocab_size})")
    return tuple(ids.tolist())


def check_tokens(params: SamplingParams, vocab_size: int) -> None:
    """Check the tokens that ``params`` name.

    Raises:
        RequestError: a token of the logit bias is outside of ``[0, vocab_size)``.
    """
    for token, _ in params.logit_bias:
        if token >= vocab_size:
            raise RequestError(f"logit_bias names token {token}, outside the vocabulary [0, {vocab_size})")


def checked_name(what: str, name: str, *, empty: bool = False) -> str:
    """``name`` as plain text, if it can be one.

    Raises:
        RequestError: it is no text, too long, cannot be encoded, or is empty although it must not be.
    """
    if not isinstance(name, str):
        raise RequestError(f"the {what} is of type {type(name).__name__}; it must be text")
    name = str.__str__(name)  # a subclass may bring methods of its own, which the loop would call
    if len(name) > MAX_NAME:
        raise RequestError(f"the {what} has {len(name)} characters; at most {MAX_NAME} are allowed")
    if not (name or empty):
        raise RequestError(f"the {what} is empty")
    if any("\ud800" <= letter <= "\udfff" for letter in name):
        raise RequestError(f"the {what} holds half of a surrogate pair, which is no character")
    return name


def checked_hand_over(handed: HandOver, max_context: int, vocab_size: int) -> HandOver:
    """``handed`` with plain values.

    Raises:
        RequestError: it is none, or cannot be one of this model.
    """
    if not isinstance(handed, HandOver) or not isinstance(handed.key, tuple) or len(handed.key) != 2:
        raise RequestError(f"{shown(handed)} is no program that another replica has let go")
    if not (handed.salt is None or isinstance(handed.salt, bytes)):
        raise RequestError("the salt of a program is bytes, or None")
    owner, session = handed.key
    parent = handed.parent
    if parent is not None and not (isinstance(parent, tuple) and len(parent) == 2):
        raise RequestError(f"the parent of a program is {shown(parent)}; it must be an owner and a name")
    return HandOver(
        checked_key(session, owner),
        checked_name("owner", owner, empty=True),
        handed.salt,
        checked_prompt(handed.tokens, 1, max_context, vocab_size),
        None if parent is None else checked_key(parent[1], parent[0]),
    )


def checked_key(session: str, owner: str) -> Key:
    """Return the key of the session of that name and owner.

    Raises:
        RequestError: a name cannot be one.
    """
    return checked_name("owner", owner, empty=True), checked_name("session's name", session)


def checked_wait(wait: Wait) -> Wait:
    """``wait`` with plain values; times that make no sense are left to the scheduler, which ignores or clips them.

    Raises:
        RequestError: it is no Wait, a tool's name cannot be one, or a time is no number.
    """
    if not isinstance(wait, Wait):
        raise RequestError(f"the wait is of type {type(wait).__name__}; it must be a Wait")
    if not isinstance(wait.tools, tuple):
        raise RequestError(
            f"the tools of a wait are of type {type(wait.tools).__name__}; they must be a tuple of names"
        )
    tools = tuple(checked_name("tool's name", tool) for tool in wait.tools[:MAX_TOOLS])
    return Wait(tools, _checked_seconds("expected_s", wait.expected_s), _checked_seconds("keep_s", wait.keep_s))


def _checked_seconds(what: str, seconds: float | None) -> float | None:
    if seconds is None:
        return None
    if not isinstance(seconds, int | float) or isinstance(seconds, bool):
        raise RequestError(f"{what} is of type {type(seconds).__name__}; it must be a number of seconds")
    try:
        return float(seconds)
    except OverflowError:  # of a large integer
        return float("inf") if seconds > 0 else float("-inf")


def checked_priority(priority: int) -> int:
    """Return 1 for a priority above 0, else 0: a caller may put its own requests behind others, never before them.

    Raises:
        RequestError: it is no integer.
    """
    if not isinstance(priority, int) or isinstance(priority, bool):
        raise RequestError(f"priority is of type {type(priority).__name__}; it must be an integer")
    return int(int.__gt__(priority, 0))
