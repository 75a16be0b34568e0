"""Layout of a decoder's parameters in a Hugging Face checkpoint, and how they are joined from its tensors."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from .config import CheckpointError, ModelConfig
from .safetensors_files import StoredTensor

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
    "mlp.gate_up.weight": ("mlp.gate_proj", "mlp.up_proj"),
    "mlp.down.weight": ("mlp.down_proj",),
}
"""Parameter -> Hugging Face modules, which it joins block by block. The tensors are called ``weight``, or ``bias`` for
``attention.qkv_bias``."""


class HfTensor(NamedTuple):
    """A Hugging Face tensor that is a parameter of a decoder, or a part of one."""

    name: str
    shape: tuple[int, ...]
    """Shape in the file: ``[out, in]`` for projections."""
    transposed: bool
    part: tuple[int, ...]
    """Shape in the decoder. Parts that are joined have outputs ``[blocks, w, size]`` and lie side by side in w."""


def hf_tensors(path: tuple[Any, ...], shape: tuple[int, ...], config: ModelConfig) -> list[HfTensor]:
    """Tensors that make up the parameter at ``path``, as ``("layers", 0, "attention", "o", "weight")``, in order."""
    parts = [str(part) for part in path]
    bias = parts[-1].endswith("_bias")
    if bias:
        parts[-1:] = [parts[-1].removesuffix("_bias"), "weight"]
    if parts[0] == "layers":
        modules = [f"model.layers.{parts[1]}.{module}" for module in LAYER[".".join(parts[2:])]]
    else:
        modules = [TOP[".".join(parts)]]
    block = config.head_dim if parts[-2] == "qkv" else config.ffn_block
    joined = config.num_heads // config.num_kv_heads + 2 if parts[-2] == "qkv" else 2
    found = []
    for i, module in enumerate(modules):
        part = shape
        if len(modules) > 1:  # every part but the first has width 1
            width = 1 if i else joined - len(modules) + 1
            part = (*shape[:-1], shape[-1] // (joined * block), width, block)
        flat = bias or len(shape) == 1
        transposed = not flat and parts[0] != "embed"
        there = (math.prod(part),) if flat else (math.prod(part[1:]), part[0]) if transposed else part
        found.append(HfTensor(f"{module}.{'bias' if bias else 'weight'}", there, transposed, part))
    return found


def settle_head(folder: Path, config: ModelConfig, tensors: dict[str, StoredTensor], dtype: Any) -> ModelConfig:
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


def _equal(one: StoredTensor, other: StoredTensor, dtype: Any) -> bool:
    """Whether two tensors are the same once they are cast to ``dtype``; they are compared a few rows at a time."""
    a, b, rows = one.array(), other.array(), 1024
    return a.shape == b.shape and all(
        np.array_equal(a[i : i + rows].astype(dtype), b[i : i + rows].astype(dtype)) for i in range(0, len(a), rows)
    )


def check_tensors(folder: Path, wanted: Sequence[HfTensor], tensors: dict[str, StoredTensor]) -> None:
    """Compare names and shapes before anything is read.

    Raises:
        CheckpointError: tensors are missing, are not accounted for, or have another shape.
    """
    names, found = {part.name for part in wanted}, set(tensors)
    if missing := sorted(names - found):
        raise CheckpointError(
            f"{folder} lacks {len(missing)} tensors: {', '.join(missing[:5])}{' …' * (len(missing) > 5)}"
        )
    if extra := sorted(name for name in found - names if not name.endswith("rotary_emb.inv_freq")):
        raise CheckpointError(
            f"{folder} holds {len(extra)} tensors that config.json does not account for: {', '.join(extra[:5])}"
        )
    for part in wanted:
        if (shape := tensors[part.name].shape) != part.shape:
            raise CheckpointError(f"tensor {part.name} has shape {shape}; config.json makes it {part.shape}")


def read_joined(stored: Sequence[StoredTensor], parts: Sequence[HfTensor]) -> np.ndarray:
    """The tensors of one parameter, joined in its shape; several dtypes become one that holds them all exactly.

    Raises:
        CheckpointError: a tensor's dtype is not one of weights.
    """
    arrays = [
        (array.T if part.transposed else array).reshape(part.part)
        for array, part in zip((one.array() for one in stored), parts, strict=True)
    ]
    if len(arrays) == 1:
        return np.array(arrays[0])  # a copy: arrays on a CPU may share memory, and the file may be written to
    if len(dtypes := {array.dtype for array in arrays}) > 1:
        common = np.float64 if np.dtype(np.float64) in dtypes else np.float32
        arrays = [array.astype(common) for array in arrays]
    return np.concatenate(arrays, axis=-2)
