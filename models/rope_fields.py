"""Rotary embeddings as a ``config.json`` says them, in the words of transformers 4 or 5."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from .config import CheckpointError
from .config_file import Json, flag, number, numbers, optional_number, part, size
from .rope import Linear, Llama3, LongRope, Proportional, Rope, Scaling, Yarn

ORIGINAL = "original_max_position_embeddings"
KINDS = ("default", "linear", "llama3", "yarn", "longrope", "proportional")


class Context(NamedTuple):
    """What a rotary embedding depends on, beside its own parameters."""

    head_dim: int
    max_position: int
    """Positions of the model."""
    longest: int
    """Positions that will be served."""
    original: int | None
    """Positions before the model was stretched, where the file says it beside the parameters, which wins."""
    partial: bool
    """Whether the family may rotate a part of each head only."""


def rope_parameters(fields: Json, default: Json) -> dict[str, Any]:
    """The parameters of one rotary embedding for all layers; ``rope_scaling`` wins, as in transformers.

    Raises:
        CheckpointError: they are no object, or one for each type of layer.
    """
    own = fields.get("rope_parameters")
    rope = fields.get("rope_scaling") or (default if own is None else own)
    if not isinstance(rope, dict) or any(isinstance(value, dict) for value in rope.values()):
        raise CheckpointError(f"config.json: rope parameters are {rope!r}; one object for all layers is served")
    beside = {"rope_theta": fields.get("rope_theta", 10_000.0)}
    if (partial := fields.get("partial_rotary_factor")) is not None:
        beside["partial_rotary_factor"] = partial
    return {**beside, **rope}


def rope_parameters_by_type(fields: Json) -> tuple[dict[str, Any], dict[str, Any]]:
    """The parameters of layers that see everything, and of those with a window (Gemma 3)."""
    both = part(fields, "rope_parameters")
    if both and not both.keys() <= {"full_attention", "sliding_attention"}:
        raise CheckpointError("config.json: rope_parameters must be an object for full_attention and sliding_attention")
    full = {"rope_theta": fields.get("rope_theta", 1e6), **part(both, "full_attention"), **part(fields, "rope_scaling")}
    sliding = {"rope_theta": fields.get("rope_local_base_freq", 1e4), **part(both, "sliding_attention")}
    return full, sliding


def read_rope(rope: Json, context: Context) -> Rope:
    """Read the parameters of a rotary embedding.

    Raises:
        CheckpointError: they are of a kind that is not served, or absurd.
    """
    theta, kind = number(rope, "rope_theta"), rope.get("rope_type", rope.get("type", "default"))
    partial = number(rope, "partial_rotary_factor", 1.0) if rope.get("partial_rotary_factor") is not None else 1.0
    if not 0 < partial <= 1:
        raise CheckpointError(f"partial_rotary_factor = {partial!r} is not served, only what is above 0 and at most 1")
    if kind == "proportional":
        return Rope(theta, Proportional(partial, number(rope, "factor", 1.0)))
    if partial != 1.0 and not context.partial:
        raise CheckpointError(f"partial_rotary_factor = {partial!r} is not served for this family, only 1.0")
    rotated = Rope(theta, partial=partial).rotated(context.head_dim)
    if rotated < 2 or rotated % 2:
        raise CheckpointError(
            f"partial_rotary_factor = {partial!r} rotates {rotated} of {context.head_dim} dimensions; "
            "an even number is needed"
        )
    return Rope(theta, _scaling(kind, theta, rope, rotated, context), partial)


def _scaling(kind: object, theta: float, rope: Json, rotated: int, context: Context) -> Scaling | None:
    if kind == "default":
        return None
    if kind == "su":
        kind = "longrope"  # its name in Phi-3's first files
    if kind == "linear":
        return Linear(number(rope, "factor"))
    if kind not in KINDS:
        raise CheckpointError(f"rope_type {kind!r} is not served; these are: {', '.join(KINDS)}")
    own = {ORIGINAL: context.original} if context.original is not None else rope
    original = size(own, ORIGINAL, context.max_position)
    if kind == "llama3":
        return _llama3(rope, original)
    if kind == "longrope":
        return _longrope(rope, original, rotated, context)
    if theta <= 1:
        raise CheckpointError(f"config.json: rope_theta is {theta}; with yarn it must be greater than 1")
    return _yarn(rope, original, context)


def _llama3(rope: Json, original: int) -> Llama3:
    low, high = number(rope, "low_freq_factor"), number(rope, "high_freq_factor")
    if high <= low:
        raise CheckpointError("config.json: high_freq_factor of the rope must be greater than low_freq_factor")
    return Llama3(number(rope, "factor"), low, high, original)


def _yarn(rope: Json, original: int, context: Context) -> Yarn:
    factor = optional_number(rope, "factor") or context.max_position / original
    fast, slow = number({"beta_fast": rope.get("beta_fast") or 32}, "beta_fast"), rope.get("beta_slow") or 1
    slow = number({"beta_slow": slow}, "beta_slow")
    if fast <= slow:
        raise CheckpointError("config.json: beta_fast of the rope must be greater than beta_slow")
    return Yarn(factor, original, fast, slow, flag(rope, "truncate", True), _yarn_magnitude(rope, factor))


def _yarn_magnitude(rope: Json, factor: float) -> float:
    """``attention_factor``, or what follows from the stretch (arXiv 2309.00071, section 3.4; DeepSeek-V2's mscale)."""
    if (given := optional_number(rope, "attention_factor")) is not None:
        return given

    def magnitude(scale: float) -> float:
        return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0

    ours, all_dims = rope.get("mscale") or None, rope.get("mscale_all_dim") or None
    if ours is None or all_dims is None:
        return magnitude(1.0)
    return magnitude(number(rope, "mscale")) / magnitude(number(rope, "mscale_all_dim"))


def _longrope(rope: Json, original: int, rotated: int, context: Context) -> LongRope:
    """The factors of the longest context that will be served, for all contexts.

    transformers changes between the two while a text grows, after which its cached keys are wrong.
    """
    if original < 2:
        raise CheckpointError(f"config.json: {ORIGINAL} is {original}; with longrope it must be greater than 1")
    stretch = optional_number(rope, "factor") or context.max_position / original
    magnitude = optional_number(rope, "attention_factor")
    if magnitude is None:
        magnitude = math.sqrt(1 + math.log(stretch) / math.log(original)) if stretch > 1 else 1.0
    factors = {long: numbers(rope, f"{'long' if long else 'short'}_factor", rotated // 2) for long in (False, True)}
    long = context.longest > original
    return LongRope(factors[long], magnitude, long)
