"""How a decoder is spread over devices: tensor parallelism (Megatron-LM, arXiv 1909.08053) by rules over named axes.

Every parameter names its axes, and the rules say which of them the mesh divides. Heads go with their key/value head and
feed-forward features with their gate, so a layer needs two sums over the devices and nothing else moves.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from .config import CheckpointError, ModelConfig
from .decoder import Decoder
from .quantize import SCALE

TP = "tp"
"""The axis of the mesh."""

AXES: dict[str, tuple[str, ...]] = {
    "embed.weight": ("vocab", "embed"),
    "attention.qkv": ("embed", "heads"),
    "attention.qkv_bias": ("heads",),
    "attention.o": ("heads", "embed"),
    "mlp.gate_up": ("embed", "ffn"),
    "mlp.down": ("ffn", "embed"),
    "lm_head.weight": ("embed", "vocab"),
}
"""Last names of a parameter's path -> its logical axes, of which its scales have the last. What is not here, the norms,
every device holds."""


@dataclass(frozen=True)
class Rules:
    """Logical axis -> axis of the mesh that divides it; None: nothing does."""

    heads: str | None = TP
    """Key/value heads, each with the query heads that share it; what is laid out by them has them outermost."""
    ffn: str | None = TP
    vocab: str | None = TP
    """If the mesh divides it; or else every device holds the whole embedding and the whole output projection."""
    embed: str | None = None


RULES = Rules()


def mesh_of(devices: Sequence[jax.Device]) -> Mesh:
    """A mesh of these devices with the one axis ``"tp"``."""
    return Mesh(np.array(devices), (TP,))


def default_mesh() -> Mesh:
    """The first device alone."""
    return mesh_of(jax.local_devices()[:1])


def check_mesh(config: ModelConfig, mesh: Mesh, rules: Rules = RULES) -> None:
    """Refuse a mesh that does not divide the model.

    Raises:
        CheckpointError: with the numbers, and the sizes that would do.
    """
    sizes = {"heads": (config.num_kv_heads, "key/value heads"), "ffn": (config.intermediate_size, "feed-forward size")}
    for axis, (size, name) in sizes.items():
        if size % _divisor(axis, mesh, rules):
            fit = [n for n in range(1, config.num_kv_heads + 1) if all(size % n == 0 for size, _ in sizes.values())]
            raise CheckpointError(
                f"{mesh.size} devices cannot divide this model: its {name} ({size}) is no multiple of {mesh.size}; "
                f"choose a tensor_parallel of {', '.join(map(str, fit))}"
            )


def spec(path: Sequence[Any], shape: Sequence[int], mesh: Mesh, rules: Rules = RULES) -> PartitionSpec:
    """How the parameter at ``path``, such as ``("layers", 0, "attention", "qkv")``, of this shape is divided.

    In the stack of all layers (``("layers", "layer", …)``) it is divided as in each of them.
    """
    parts = [str(part) for part in path]
    if parts[:2] == ["layers", "layer"]:
        of_one = spec(("layers", 0, *parts[2:]), shape[1:], mesh, rules)
        return PartitionSpec(None, *of_one) if of_one else of_one
    name = ".".join(parts[2:] if parts[0] == "layers" else parts)
    scale = name.endswith(SCALE)
    name = name.removesuffix(SCALE)
    axes = AXES.get(name, ())
    if scale:
        axes = axes[-1:]
    divided = [
        getattr(rules, axis) if size % _divisor(axis, mesh, rules) == 0 else None for axis, size in zip(axes, shape)
    ]
    while divided and divided[-1] is None:
        divided.pop()
    return PartitionSpec(*divided)


def _divisor(axis: str, mesh: Mesh, rules: Rules) -> int:
    """Pieces that the mesh cuts a logical axis into."""
    divided_by = getattr(rules, axis)
    return 1 if divided_by is None else int(mesh.shape[divided_by])


def placed(state: nnx.State[Any, Any], mesh: Mesh, rules: Rules = RULES) -> nnx.State[Any, Any]:
    """A decoder's state as shapes with their shardings, for loading and for compiling; no array is made."""

    def place(path: Sequence[Any], leaf: Any) -> Any:
        sharding = NamedSharding(mesh, spec(path, leaf.shape, mesh, rules))
        return leaf.replace(jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding))

    return nnx.from_flat_state([(path, place(path, leaf)) for path, leaf in nnx.to_flat_state(state)])


def abstract_decoder(
    config: ModelConfig, dtype: Any, mesh: Mesh, *, narrow: Any = None, stacked: bool = False
) -> Decoder:
    """A decoder, its layers stacked or not, whose arrays are shapes with their shardings.

    Raises:
        CheckpointError: the mesh does not divide the model.
    """
    check_mesh(config, mesh)

    def make() -> Decoder:
        decoder = Decoder(config, dtype=dtype, narrow=narrow, rngs=nnx.Rngs(0))
        if stacked:
            decoder.stack()
        return decoder

    graph, state = nnx.split(nnx.eval_shape(make))
    decoder: Decoder = nnx.merge(graph, placed(state, mesh))
    return decoder
