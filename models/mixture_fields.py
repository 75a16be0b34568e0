"""Mixtures of experts as a ``config.json`` says them."""

from __future__ import annotations

from .config import CheckpointError, Experts
from .config_file import Json, flag, number, size, whole

MAX_EXPERTS = 4096
"""Far more than any layer has."""


def qwen_experts(fields: Json, count: int) -> Experts:
    """Qwen3-MoE's, for a model with so many layers."""
    step, listed = size(fields, "decoder_sparse_step", 1), fields.get("mlp_only_layers") or []
    if not isinstance(listed, list) or not all(isinstance(i, int) and not isinstance(i, bool) for i in listed):
        raise CheckpointError(f"config.json: mlp_only_layers is {listed!r}; a list of layers is needed")
    return _checked(
        Experts(
            count=size(fields, "num_experts", size(fields, "num_local_experts", 128)),
            chosen=size(fields, "num_experts_per_tok", 8),
            size=size(fields, "moe_intermediate_size", 768),
            normalized=flag(fields, "norm_topk_prob"),
            dense_layers=tuple(i for i in range(count) if i in listed or (i + 1) % step),
        )
    )


def gpt_oss_experts(fields: Json) -> Experts:
    """Those of gpt-oss."""
    return _checked(
        Experts(
            count=size(fields, "num_local_experts", size(fields, "num_experts", 128)),
            chosen=size(fields, "num_experts_per_tok", 4),
            size=size(fields, "intermediate_size"),
            scores="softmax of chosen",
            biases=True,
            activation_limit=number(fields, "swiglu_limit", 7.0),
        )
    )


def glm_experts(fields: Json, count: int) -> Experts:
    """GLM-4.5's, for a model with so many layers."""
    features = size(fields, "moe_intermediate_size", 1408)
    return _checked(
        Experts(
            count=size(fields, "n_routed_experts", size(fields, "num_local_experts", 128)),
            chosen=size(fields, "num_experts_per_tok", 8),
            size=features,
            scores="sigmoid",
            normalized=flag(fields, "norm_topk_prob", True),
            scale=number(fields, "routed_scaling_factor", 1.0),
            corrected=True,
            groups=size(fields, "n_group", 1),
            chosen_groups=size(fields, "topk_group", 1),
            shared_size=features * whole(fields, "n_shared_experts", 1),
            dense_layers=tuple(range(min(whole(fields, "first_k_dense_replace", 1), count))),
        )
    )


def _checked(experts: Experts) -> Experts:
    """The same, if as many can be chosen."""
    e = experts
    if e.count > MAX_EXPERTS:
        raise CheckpointError(f"config.json: there are {e.count} experts; at most {MAX_EXPERTS} are served")
    if e.chosen > e.count:
        raise CheckpointError(f"config.json: num_experts_per_tok is {e.chosen}; there are {e.count} experts")
    if e.chosen_groups > e.groups or (
        e.groups > 1
        and (e.count % e.groups or e.count // e.groups < 2 or e.chosen > e.chosen_groups * (e.count // e.groups))
    ):
        raise CheckpointError(
            f"config.json: {e.chosen} of {e.count} experts cannot be chosen from {e.chosen_groups} of {e.groups} groups"
        )
    return experts
