"""Token counts in OpenAI's shape."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from astraea_jax.frontends.http.turns import Turn


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
    }
