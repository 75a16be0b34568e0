"""Formats in which models write their thoughts and tool calls, and which of them a model uses."""

from __future__ import annotations

from dataclasses import dataclass

from astraea_jax.models.tokenizer import Tokenizer

NAMES = (
    "deepseek",
    "gemma",
    "glm",
    "harmony",
    "hermes",
    "json",
    "llama3_json",
    "mistral",
    "pythonic",
    "qwen3_coder",
)


@dataclass(frozen=True)
class CallFormat:
    """One format."""

    name: str


def choose(tokenizer: Tokenizer, name: str | None = None) -> CallFormat:
    """The format ``name``, or else the one that the model's chat template shows.

    Raises:
        ValueError: there is no format of this name.
    """
    if name is not None and name not in NAMES:
        raise ValueError(f"there is no call format {name!r}; there are: {', '.join(NAMES)}")
    return CallFormat(name or "json")
