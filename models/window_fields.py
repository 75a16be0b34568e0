"""Which layers have a sliding window, as a ``config.json`` says it."""

from __future__ import annotations

from collections.abc import Callable

from .config import CheckpointError
from .config_file import Json, flag, size, whole

Slides = Callable[[Json, int], list[bool]]
"""``slides(fields, count)``: for each layer whether it has a window, unless ``layer_types`` says otherwise."""


def windows(fields: Json, slides: Slides, count: int, *, typed: bool) -> tuple[int | None, tuple[int, ...]]:
    """Keys in the window, and the layers that have one.

    Args:
        fields: of the file.
        slides: which layers have one by the family's own rule.
        count: number of layers.
        typed: whether the family reads ``layer_types``; else it must agree with the rule.

    Raises:
        CheckpointError: ``layer_types`` has another length or unknown types, or the window is missing or absurd.
    """
    expected, types = slides(fields, count), _layer_types(fields, count)
    if types is not None and types != expected:
        if not typed:
            raise CheckpointError(
                "config.json: layer_types are not what this family makes of sliding_window; remove them"
            )
        expected = types
    if not any(expected):
        return None, ()
    if fields.get("use_sliding_window", True) in (False, None):
        named = "layer_types name layers with a window" if types else f"sliding_window is {fields['sliding_window']!r}"
        raise CheckpointError(
            f"config.json: {named}, but use_sliding_window is not true; remove the one or correct the other"
        )
    return size(fields, "sliding_window"), tuple(i for i, one in enumerate(expected) if one)


def _layer_types(fields: Json, count: int) -> list[bool] | None:
    types = fields.get("layer_types")
    if types is None:
        return None
    known = {"full_attention": False, "sliding_attention": True}
    if not isinstance(types, list) or len(types) != count or not all(isinstance(name, str) for name in types):
        raise CheckpointError(f"config.json: layer_types must name the type of each of the {count} layers")
    if unknown := sorted({*types} - {*known}):
        raise CheckpointError(f"layer_types {', '.join(unknown)} are not served; {' and '.join(known)} are")
    return [known[name] for name in types]


def all_layers(fields: Json, count: int) -> list[bool]:
    """All of them, if there is a window (Mistral)."""
    return [fields.get("sliding_window") is not None] * count


def flagged(fields: Json, count: int) -> list[bool]:
    """All of them, if ``use_sliding_window`` says so (Qwen3-MoE)."""
    return [flag(fields, "use_sliding_window") and fields.get("sliding_window", 4096) is not None] * count


def flagged_from(fields: Json, count: int) -> list[bool]:
    """Those from ``max_window_layers`` on, if ``use_sliding_window`` says so (Qwen2, Qwen3)."""
    first = whole(fields, "max_window_layers", 28) if any(flagged(fields, count)) else count
    return [i >= first for i in range(count)]


def by_pattern(period: int) -> Slides:
    """All but the last of every ``period`` (Gemma, gpt-oss); Gemma 3 may name another in ``sliding_window_pattern``."""

    def slides(fields: Json, count: int) -> list[bool]:
        every = size(fields, "sliding_window_pattern", period)
        return [(i + 1) % every != 0 for i in range(count)]

    return slides
