"""Log-probabilities in the two shapes in which OpenAI's APIs write them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from astraea_jax.engine.generation import TokenLogprob
from astraea_jax.models.tokenizer import Tokenizer

T = TypeVar("T")

MANY_TOKENS = 2048
"""Tokens from which their texts are found in a thread; that takes some milliseconds."""
_threads = ThreadPoolExecutor(2, thread_name_prefix="astraea-token-texts")
LOWEST = -9999.0
"""What JSON gets for the logarithm of 0."""


async def written(tokens: int, write: Callable[[], T]) -> T:
    """Return ``write()``, which finds the text of so many tokens, computed in a thread if they are many.

    Nothing is refused here, as what has been generated has an end.
    """
    if tokens < MANY_TOKENS:
        return write()
    return await asyncio.get_running_loop().run_in_executor(_threads, write)


def count(found: Sequence[TokenLogprob]) -> int:
    """Count the tokens whose texts are shown."""
    return sum(1 + len(one.top) for one in found)


def chat_logprobs(tokenizer: Tokenizer, found: Iterable[TokenLogprob]) -> dict[str, Any]:
    """Write log-probabilities in the shape of chat completions."""
    return {"content": [_entry(tokenizer, one) for one in found], "refusal": None}


def _entry(tokenizer: Tokenizer, one: TokenLogprob) -> dict[str, Any]:
    top = [_token(tokenizer, token, logprob) for token, logprob in one.top]
    return {**_token(tokenizer, one.token_id, one.logprob), "top_logprobs": top}


def _token(tokenizer: Tokenizer, token: int, logprob: float) -> dict[str, Any]:
    text = token_text(tokenizer, token)
    return {"token": text, "logprob": max(logprob, LOWEST), "bytes": [*text.encode()]}


def token_text(tokenizer: Tokenizer, token: int) -> str:
    """Text of one token by itself; U+FFFD for a part of a character."""
    return tokenizer.delimiters.get(token) or tokenizer.decode([token])


def text_logprobs(tokenizer: Tokenizer, found: Iterable[TokenLogprob], offset: int) -> dict[str, Any]:
    """Write log-probabilities in the shape of completions, whose text begins at ``offset``."""
    found = [*found]
    texts = [token_text(tokenizer, one.token_id) for one in found]
    offsets = []
    for text in texts:
        offsets.append(offset)
        offset += len(text)
    return {
        "tokens": texts,
        "token_logprobs": [max(one.logprob, LOWEST) for one in found],
        "top_logprobs": [
            {token_text(tokenizer, token): max(logprob, LOWEST) for token, logprob in (*one.top, one[:2])}
            for one in found
        ],
        "text_offset": offsets,
    }
