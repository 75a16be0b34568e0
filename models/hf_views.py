"""Tensors of other families as views with the names and the shapes that :mod:`.hf_layout` knows; nothing is read."""

from __future__ import annotations

import re
from collections.abc import Iterator

from .config import Experts, ModelConfig
from .narrow_files import NarrowTensor
from .safetensors_files import StoredTensor

Tensor = StoredTensor | NarrowTensor
Tensors = dict[str, Tensor]

PICTURES = re.compile(r"(model\.)?(vision_tower|multi_modal_projector)\.")
"""Tensors beside the text decoder of a model that sees pictures, too; these are not served."""
TEXT = (
    ("language_model.model.", "model."),
    ("model.language_model.", "model."),
    ("language_model.lm_head.", "lm_head."),
)
"""How names of its text decoder begin, in transformers 4 and 5 -> how those of a model that only reads do."""
SANDWICH = {
    "post_attention_layernorm": "attention_out_layernorm",
    "pre_feedforward_layernorm": "post_attention_layernorm",
    "post_feedforward_layernorm": "mlp_out_layernorm",
}
"""Norms of Gemma -> names by what they do here."""


def canonical(tensors: Tensors, config: ModelConfig, ignored: range) -> Tensors:
    """The tensors of a checkpoint's text decoder by the names of Llama and Qwen3-MoE.

    Args:
        tensors: of the files, by name.
        config: of the decoder.
        ignored: layers that are not part of it.
    """
    sees = any(name.startswith(prefix) for name in tensors for prefix, _ in TEXT)
    found: Tensors = {}
    for tensor in tensors.values():
        name = tensor.name
        if sees:
            if PICTURES.match(name):
                continue
            name = next((own + name.removeprefix(prefix) for prefix, own in TEXT if name.startswith(prefix)), name)
        layer = re.match(r"model\.layers\.(\d{1,9})\.", name)
        if layer is not None and int(layer[1]) in ignored:
            continue
        if config.sandwich_norms and layer is not None:
            module = name.split(".")[3]
            name = name.replace(module, SANDWICH.get(module, module))
        found.update({part.name: part for part in _parts(tensor._replace(name=name), config)})
    return found


def _parts(tensor: Tensor, config: ModelConfig) -> Iterator[Tensor]:
    """The tensor, or those that are fused in it."""
    name = tensor.name
    before, _, kind = name.rpartition(".")
    module = before.rpartition(".")[2]
    if module == "qkv_proj" and tensor.shape:
        h, n, k = config.head_dim, config.num_heads, config.num_kv_heads
        yield from _rows(tensor, "qkv_proj", {"q_proj": n * h, "k_proj": k * h, "v_proj": k * h})
    elif module == "gate_up_proj" and tensor.shape:
        yield from _rows(tensor, "gate_up_proj", {"gate_proj": tensor.shape[0] // 2, "up_proj": tensor.shape[0] // 2})
    elif module == "experts" and config.experts is not None:
        yield from _experts(tensor, before, kind, config.experts)
    elif module == "router" and config.experts is not None:
        yield tensor._replace(name=f"{before.removesuffix('router')}gate.{kind}")
    else:
        yield tensor


def _rows(tensor: Tensor, fused: str, sizes: dict[str, int]) -> Iterator[Tensor]:
    """Consecutive rows under the names of modules; rows that are left over keep the name, and are then refused."""
    begin = 0
    for module, size in sizes.items():
        yield tensor.part(tensor.name.replace(fused, module), (slice(begin, begin + size),))
        begin += size
    if begin < tensor.shape[0]:
        yield tensor


def _experts(tensor: Tensor, before: str, kind: str, experts: Experts) -> Iterator[Tensor]:
    """A tensor of all experts as one of each: ``gate_up_proj``, ``down_proj``, or their biases.

    transformers 5 holds ``[E, out, in]``, gate before up; gpt-oss ``[E, in, out]``, gate and up in turns.
    """
    fused, bias = kind.removesuffix("_bias"), kind.endswith("_bias")
    modules = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}.get(fused)
    if modules is None or len(tensor.shape) != 3 - bias or tensor.shape[0] != experts.count:
        yield tensor
        return
    in_turns, count = experts.activation_limit is not None, len(modules)
    outputs = tensor.shape[-1 if in_turns else 1]
    for e in range(experts.count):
        for i, module in enumerate(modules):
            name = f"{before}.{e}.{module}.{'bias' if bias else 'weight'}"
            if in_turns:
                own = slice(i, None, count)
                yield tensor.part(name, (e, own) if bias else (e, slice(None), own), transposed=not bias)
            else:
                yield tensor.part(name, (e, slice(i * outputs // count, (i + 1) * outputs // count)))
