"""Layout of a decoder's parameters in a Hugging Face checkpoint, and how they are joined from its tensors."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from .config import CheckpointError, ModelConfig, joined_block
from .hf_views import Tensor, Tensors

log = logging.getLogger(__name__)

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
TOP = {"embed.weight": "model.embed_tokens", "norm.scale": "model.norm", "lm_head.weight": "lm_head"}
LAYER = {
    "input_norm.scale": ("input_layernorm",),
    "post_attention_norm.scale": ("post_attention_layernorm",),
    "attention.qkv.weight": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attention.o.weight": ("self_attn.o_proj",),
    "attention.q_norm.scale": ("self_attn.q_norm",),
    "attention.k_norm.scale": ("self_attn.k_norm",),
    "attention_out_norm.scale": ("attention_out_layernorm",),
    "mlp_out_norm.scale": ("mlp_out_layernorm",),
    "mlp.gate_up.weight": ("mlp.gate_proj", "mlp.up_proj"),
    "mlp.down.weight": ("mlp.down_proj",),
    "mlp.router.weight": ("mlp.gate",),
    "mlp.shared.gate_up.weight": ("mlp.shared_experts.gate_proj", "mlp.shared_experts.up_proj"),
    "mlp.shared.down.weight": ("mlp.shared_experts.down_proj",),
}
"""Parameter -> modules, by their names in checkpoints of Llama and Qwen3-MoE, which it joins block by block; those that
such models lack have names of ours. The tensors are called ``weight``, or ``bias`` for a parameter ``…_bias``."""
EXPERTS = {
    "mlp.gate_up.weight": ("gate_proj", "up_proj"),
    "mlp.down.weight": ("down_proj",),
}
"""The same within ``mlp.experts.e``, for parameters whose first axis is that of the experts."""
SINGLE = {
    "attention.sinks": "self_attn.sinks",
    "mlp.correction": "mlp.gate.e_score_correction_bias",
}
"""Parameters that are one tensor."""


class HfTensor(NamedTuple):
    """A Hugging Face tensor that is a parameter of a decoder, or a part of one."""

    name: str
    shape: tuple[int, ...]
    """Shape in the file: ``[out, in]`` for projections."""
    transposed: bool
    part: tuple[int, ...]
    """Shape in the decoder. Parts that are joined have outputs ``[blocks, w, size]`` and lie side by side in w."""
    order: tuple[int, ...] | None = None
    """Dimensions of each head in the order in which a decoder has them (:attr:`.rope.Rope.partial`)."""
    offset: float = 0.0
    """Added to it, in float32."""


def hf_tensors(path: tuple[Any, ...], shape: tuple[int, ...], config: ModelConfig) -> list[list[HfTensor]]:
    """Tensors that make up the parameter at ``path``, as ``("layers", 0, "attention", "o", "weight")``, in order.

    They are in one list, or in one for each expert.
    """
    parts = [str(part) for part in path]
    if parts[-1] == "router":
        parts.append("weight")
    if bias := parts[-1].endswith("_bias"):
        parts[-1:] = [parts[-1].removesuffix("_bias"), "weight"]
    if parts[0] != "layers":
        name = ".".join(parts)
        return [[_joined([TOP[name]], shape, 1, 1, config, bias=False, transposed=parts[0] != "embed")[0]]]
    layer, name = f"model.layers.{parts[1]}", ".".join(parts[2:])
    if name in SINGLE:
        return [[HfTensor(f"{layer}.{SINGLE[name]}", shape, False, shape)]]
    if len(shape) == 3 - bias and name in EXPERTS:
        assert config.experts is not None
        block = joined_block(config.experts.size, config.num_kv_heads)
        experts = [[f"{layer}.mlp.experts.{e}.{module}" for module in EXPERTS[name]] for e in range(shape[0])]
        return [_joined(modules, shape[1:], 2, block, config, bias=bias) for modules in experts]
    modules = [f"{layer}.{module}" for module in LAYER[name]]
    if "qkv" in parts:
        width, block = config.num_heads // config.num_kv_heads + 2, config.head_dim
    else:
        width, block = 2, _block(config, shared="shared" in parts)
    return [_joined(modules, shape, width, block, config, bias=bias)]


def _block(config: ModelConfig, *, shared: bool) -> int:
    """Consecutive features of the gate or the up projection, where they are joined."""
    if not shared:
        return config.ffn_block
    assert config.experts is not None
    return joined_block(config.experts.shared_size, config.num_kv_heads)


def _joined(
    modules: Sequence[str],
    shape: tuple[int, ...],
    width: int,
    block: int,
    config: ModelConfig,
    *,
    bias: bool,
    transposed: bool = True,
) -> list[HfTensor]:
    """Tensors of modules that lie side by side in a parameter, in blocks, ``width`` together."""
    found, flat = [], bias or len(shape) == 1
    for i, module in enumerate(modules):
        part = shape
        if len(modules) > 1:  # every part but the first has width 1
            own = 1 if i else width - len(modules) + 1
            part = (*shape[:-1], shape[-1] // (width * block), own, block)
        there = (math.prod(part),) if flat else (math.prod(part[1:]), part[0]) if transposed else part
        norm = module.endswith("norm")
        turned = config.rope.partial != 1.0 and module.endswith(("q_proj", "k_proj", "q_norm", "k_norm"))
        found.append(
            HfTensor(
                f"{module}.{'bias' if bias else 'weight'}",
                there,
                transposed and not flat,
                part,
                config.rope.order(config.head_dim) if turned else None,
                config.norm_offset if norm else 0.0,
            )
        )
    return found


def settle_head(folder: Path, config: ModelConfig, tensors: Tensors, dtype: Any) -> ModelConfig:
    """Decide about an ``lm_head`` in the files of a model that ties it to its embedding, as transformers 5 does.

    If it differs from the embedding, it is used and the model is not tied; if it is equal, it is dropped; if there is
    no embedding, it is used for both. Returns the configuration that holds then; ``tensors`` is changed to fit.
    """
    if not config.tie_embeddings or HEAD not in tensors:
        return config
    head = tensors.pop(HEAD)
    if EMBEDDING not in tensors:
        tensors[EMBEDDING] = head
    elif not _equal(head, tensors[EMBEDDING], dtype):
        log.warning("%s: tie_word_embeddings is true, but %s differs from the embedding and is used", folder, HEAD)
        tensors[HEAD] = head
        return replace(config, tie_embeddings=False)
    return config


def _equal(one: Tensor, other: Tensor, dtype: Any) -> bool:
    """Whether two tensors are the same once they are cast to ``dtype``; they are compared a few rows at a time."""
    a, b, rows = one.array(), other.array(), 1024
    return a.shape == b.shape and all(
        np.array_equal(a[i : i + rows].astype(dtype), b[i : i + rows].astype(dtype)) for i in range(0, len(a), rows)
    )


def check_tensors(folder: Path, wanted: Sequence[HfTensor], tensors: Tensors) -> None:
    """Compare names and shapes before anything is read.

    Raises:
        CheckpointError: tensors are missing, are not accounted for, or have another shape.
    """
    names, found = {part.name for part in wanted}, set(tensors)
    if missing := sorted(names - found):
        raise CheckpointError(
            f"{folder} lacks {len(missing)} tensors: {', '.join(missing[:5])}{' …' * (len(missing) > 5)}; fetch it "
            "again, or take config.json and weights from the same checkpoint"
        )
    if extra := sorted(name for name in found - names if not _adds_nothing(tensors[name])):
        raise CheckpointError(
            f"{folder} holds {len(extra)} tensors that config.json does not account for: {', '.join(extra[:5])}"
            f"{' …' * (len(extra) > 5)}; take config.json and weights from the same checkpoint"
        )
    for part in wanted:
        if (shape := tensors[part.name].shape) != part.shape:
            raise CheckpointError(f"tensor {part.name} has shape {shape}; config.json makes it {part.shape}")


def _adds_nothing(tensor: Tensor) -> bool:
    """Whether a tensor is a constant, or a bias of zeros, which tools for quantization write for every matrix."""
    return tensor.name.endswith("rotary_emb.inv_freq") or (
        tensor.name.endswith("_proj.bias") and len(tensor.shape) == 1 and not tensor.array().any()
    )


def read_joined(stored: Sequence[Tensor], parts: Sequence[HfTensor]) -> np.ndarray:
    """The tensors of one parameter, or of one expert's, joined in its shape but for blocks.

    Several dtypes become one that holds them all exactly.

    Raises:
        CheckpointError: a tensor's dtype is not one of weights.
    """
    arrays = [_as_part(one.array(), part) for one, part in zip(stored, parts, strict=True)]
    if len(arrays) == 1:
        return np.array(arrays[0])  # a copy: arrays on a CPU may share memory, and the file may be written to
    if len(dtypes := {array.dtype for array in arrays}) > 1:
        common = np.float64 if np.dtype(np.float64) in dtypes else np.float32
        arrays = [array.astype(common) for array in arrays]
    return np.concatenate(arrays, axis=-2)


def _as_part(array: np.ndarray, part: HfTensor) -> np.ndarray:
    """A tensor of the file in the shape, order and numbers of the decoder."""
    array = (array.T if part.transposed else array).reshape(part.part)
    if part.order is not None:
        array = array[..., part.order]
    return array if part.offset == 0 else array.astype(np.float32) + np.float32(part.offset)
