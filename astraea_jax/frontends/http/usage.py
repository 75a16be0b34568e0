"""Token counts in OpenAI's shape, and what was reused, in every API's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from astraea_jax.agents.opened import Continuation
from astraea_jax.engine.generation import Usage
from astraea_jax.frontends.http.turns import About, Turn

CACHED_HEADER = "x-cached-tokens"
"""Header of an answer that is no stream: tokens of its prompt that were not computed again."""


def usage_of(*prompts: Sequence[Turn]) -> dict[str, Any]:
    """Counts of the choices of one prompt, or of several; a prompt counts once, whatever its choices."""
    first = [turns[0].usage for turns in prompts if turns[0].usage is not None]
    prompt = sum(usage.prompt_tokens for usage in first)
    output = sum(turn.usage.output_tokens for turns in prompts for turn in turns if turn.usage is not None)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": output,
        "total_tokens": prompt + output,
        "prompt_tokens_details": {"cached_tokens": sum(usage.cached_tokens for usage in first)},
        **report_of(prompts[0][0]),
    }


def cached_header(*turns: Turn) -> dict[str, str]:
    """Return the header that says how many tokens of prompts were reused."""
    return {CACHED_HEADER: str(sum(turn.usage.cached_tokens for turn in turns if turn.usage is not None))}


def report_of(turn: Turn) -> dict[str, Any]:
    """Return what the usage of an answer says of reuse, if its client asked for that or gave hints.

    ``resumed``: where the KV of the program came from, and why some was computed again; ``known``: how much of the
    prompt was known, and why not more; ``wait``: the wait before the request, as predicted and as it was; ``hints``:
    what became of each hint.
    """
    if turn.usage is None or not (turn.about.told or turn.about.outcomes):
        return {}
    return {"astraea": account_of(turn.about, turn.usage)}


def account_of(about: About, usage: Usage) -> dict[str, Any]:
    """Return what was reused for a turn, and how its wait and its hints came out."""
    return {
        "program": about.program,
        "resumed": asdict(usage.resumed),
        "known": known_of(about.known),
        "wait": None if usage.wait is None else asdict(usage.wait),
        "hints": [outcome.plain() for outcome in about.outcomes],
    }


def known_of(known: Continuation | None) -> dict[str, Any] | None:
    """Return how much of a prompt was known: tokens, the message where it ended (None: nowhere), and why."""
    return None if known is None else {"tokens": known.kept, "message": known.message, "why": known.why}
