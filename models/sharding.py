"""Tensor parallelism (Megatron-LM, arXiv 1909.08053) by rules over named axes.

Every parameter names its axes, and the rules say which of them the mesh divides. Query heads stay with their key/value
head and feed-forward features with their gate, so a layer needs two all-reduces and no other communication.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from .config import CheckpointError, ModelConfig
from .decoder import Decoder
from .experts import Mixture
from .matrix import Forms, plain
from .mlp import MLP

log = logging.getLogger(__name__)

TP = "tp"
"""Name of the mesh's axis."""

AXES: dict[str, tuple[str, ...]] = {
    "embed.weight": ("vocab", "embed"),
    "attention.qkv.weight": ("embed", "heads"),
    "attention.qkv_bias": ("heads",),
    "attention.o.weight": ("heads", "embed"),
    "attention.sinks": ("heads",),
    "mlp.gate_up.weight": ("embed", "ffn"),
    "mlp.down.weight": ("ffn", "embed"),
    "mlp.gate_up_bias": ("experts", "ffn"),
    "mlp.down_bias": ("experts", "embed"),
    "mlp.shared.gate_up.weight": ("embed", "ffn"),
    "mlp.shared.down.weight": ("ffn", "embed"),
    "lm_head.weight": ("embed", "vocab"),
}
"""End of a parameter's path -> its logical axes; its scales and zeros have the same, and matrices of every expert have
``experts`` before. Other parameters (norms and routers) are replicated."""


@dataclass(frozen=True)
class Rules:
    """Logical axis -> axis of the mesh that divides it. None: it is not divided."""

    heads: str | None = TP
    """Key/value heads, each with the query heads that share it. They are outermost in what is laid out by heads."""
    experts: str | None = TP
    """Divided if their number allows; otherwise the features of every expert are."""
    ffn: str | None = TP
    vocab: str | None = TP
    """Divided if its size allows; otherwise embedding and output projection are replicated."""
    embed: str | None = None


RULES = Rules()


def mesh_of(devices: Sequence[jax.Device]) -> Mesh:
    """A mesh of ``devices`` with the single axis ``"tp"``."""
    return Mesh(np.array(devices), (TP,))


def default_mesh() -> Mesh:
    """A mesh of the first device only."""
    return mesh_of(jax.local_devices()[:1])


def check_mesh(config: ModelConfig, mesh: Mesh, rules: Rules = RULES) -> None:
    """Refuse a mesh that does not divide the model.

    Raises:
        CheckpointError: a size is not divisible; the message names numbers of devices that would fit.
    """
    for axis, name, sizes in _divided(config):
        if all(size % _divisor(axis, mesh, rules) for size in sizes):
            raise CheckpointError(
                f"{mesh.size} devices cannot divide this model: its {name} ({' or '.join(map(str, sizes))}) is no "
                f"multiple of {mesh.size}; choose a tensor_parallel of {', '.join(map(str, _dividing(config)))}"
            )


def _divided(config: ModelConfig) -> list[tuple[str, str, tuple[int, ...]]]:
    """Logical axes and names of what devices divide, with the sizes of which one must be divisible."""
    experts = config.experts
    found: list[tuple[str, str, tuple[int, ...]]] = [("heads", "key/value heads", (config.num_kv_heads,))]
    if not all(kind.has_experts for kind in config.layer_kinds):
        found.append(("ffn", "feed-forward size", (config.intermediate_size,)))
    if experts is not None:
        found.append(("ffn", "number of experts or their feed-forward size", (experts.count, experts.size)))
        if experts.shared_size:
            found.append(("ffn", "shared experts' feed-forward size", (experts.shared_size,)))
    return found


def _dividing(config: ModelConfig) -> list[int]:
    """Numbers of devices that divide the model."""
    sizes = [sizes for _, _, sizes in _divided(config)]
    most = config.num_kv_heads
    return [n for n in range(1, most + 1) if all(any(size % n == 0 for size in one) for one in sizes)]


def _check_blocks(decoder: Decoder, mesh: Mesh) -> None:
    """Refuse a mesh whose devices would have parts of experts that are no whole blocks of codes and scales.

    Raises:
        CheckpointError: that is so; the message names numbers of devices that would fit.
    """
    mixtures = [module for _, module in nnx.iter_modules(decoder) if isinstance(module, Mixture)]
    odd = next((one for one in mixtures if not one.divisible(mesh.size)), None)
    if odd is not None:
        fit = [n for n in _dividing(decoder.config) if all(one.divisible(n) for one in mixtures)]
        count, form = odd.experts.count, odd.down.form or odd.gate_up.form
        raise CheckpointError(
            f"{mesh.size} devices cannot divide this model: they do not divide its {count} experts, and their parts of "
            f"each would be no whole blocks of {form and form.codes} codes that share a scale; choose a "
            f"tensor_parallel of {', '.join(map(str, fit))}, or weights in another format"
        )


def _undivided(decoder: Decoder, mesh: Mesh) -> list[tuple[Any, ...]]:
    """Paths of shared experts whose parts would be no whole blocks of codes and scales: each device has all of them."""
    shared = [(path, module) for path, module in nnx.iter_modules(decoder) if path[-1:] == ("shared",)]
    return [path for path, module in shared if isinstance(module, MLP) and not module.divisible(mesh.size)]


def spec(path: Sequence[Any], shape: Sequence[int], mesh: Mesh, rules: Rules = RULES) -> PartitionSpec:
    """Partition of the parameter at ``path``, as ``("layers", 0, "attention", "o", "weight")``, with this shape.

    A parameter of stacked layers (``("layers", "layers", 0, …)``) is divided as that of a single layer.
    """
    parts = [str(part) for part in path]
    if parts[:2] == ["layers", "layers"]:
        of_one = spec(("layers", 0, *parts[3:]), shape[1:], mesh, rules)
        return PartitionSpec(None, *of_one) if of_one else of_one
    if parts[-3:-1] == ["stack", "whole"]:  # see :class:`.matrix.InStack`
        of_one = spec((*path[:-3], path[-1]), shape[1:], mesh, rules)
        return PartitionSpec(None, *of_one) if of_one else of_one
    name = ".".join(parts[2:] if parts[0] == "layers" else parts)
    axes = AXES.get(re.sub(r"\.(scales|zeros)$", ".weight", name), ())
    if axes and len(shape) == len(axes) + 1:
        axes = ("experts", *axes)
    divided: list[str | None] = []
    for axis, size in zip(axes, shape):
        by = getattr(rules, axis) if size % _divisor(axis, mesh, rules) == 0 else None
        divided.append(None if by in divided else by)
    while divided and divided[-1] is None:
        divided.pop()
    return PartitionSpec(*divided)


def _divisor(axis: str, mesh: Mesh, rules: Rules) -> int:
    """Number of pieces that the mesh cuts a logical axis into."""
    divided_by = getattr(rules, axis)
    return 1 if divided_by is None else int(mesh.shape[divided_by])


def placed(decoder: Decoder, mesh: Mesh, rules: Rules = RULES) -> nnx.State[Any, Any]:
    """A decoder's state as shapes with shardings, for loading and compiling; no array is made.

    Raises:
        CheckpointError: the mesh does not divide its experts.
    """
    _check_blocks(decoder, mesh)
    undivided = _undivided(decoder, mesh)

    def place(path: tuple[Any, ...], leaf: Any) -> Any:
        whole = any(path[: len(prefix)] == prefix for prefix in undivided)
        partition = PartitionSpec() if whole else spec(path, leaf.shape, mesh, rules)
        return leaf.replace(jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, partition)))

    return nnx.from_flat_state([(path, place(path, leaf)) for path, leaf in nnx.to_flat_state(nnx.state(decoder))])


def abstract_decoder(
    config: ModelConfig, dtype: Any, mesh: Mesh, *, forms: Forms = plain, stacked: bool = False
) -> Decoder:
    """A decoder whose arrays are only shapes with shardings; its layers may be stacked.

    Raises:
        CheckpointError: the mesh does not divide the model, or its experts in these forms.
    """
    check_mesh(config, mesh)

    def make() -> Decoder:
        decoder = Decoder(config, dtype=dtype, forms=forms, rngs=nnx.Rngs(0))
        if stacked:
            decoder.stack()
        return decoder

    shapes = nnx.eval_shape(make)
    if undivided := _undivided(shapes, mesh):
        log.info(
            "%d devices do not divide the shared experts of %d layers into whole blocks that share a scale: "
            "each holds all of these",
            mesh.size,
            len(undivided),
        )
    decoder: Decoder = nnx.merge(nnx.graphdef(shapes), placed(shapes, mesh))
    return decoder
