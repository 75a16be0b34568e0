"""Mixtures of experts over several devices: each has its own experts, or its share of the features of all.

Activations are the same on all devices, so nothing moves but one sum per mixture, of which the shared experts are part.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, PartitionSpec

from astraea_jax.kernels.grouped import GroupedProduct, mixed
from astraea_jax.models.config import CheckpointError
from astraea_jax.models.experts import Mixture
from astraea_jax.models.matrix import Matrix
from astraea_jax.models.operations import Operations
from astraea_jax.models.sharding import TP, spec


def with_mixtures(ops: Operations, alone: Operations, mesh: Mesh, grouped: GroupedProduct) -> Operations:
    """``ops`` with mixtures of experts on the devices of a mesh of one axis, ``"tp"``.

    Each device does its part by ``grouped``, and by the operations of a device ``alone``.
    """
    return replace(ops, mixed=partial(_mixed, mesh, grouped, alone))


def _mixed(
    mesh: Mesh,
    grouped: GroupedProduct,
    ops: Operations,
    x: jax.Array,
    index: jax.Array,
    weights: jax.Array,
    of: Mixture,
) -> jax.Array:
    """What experts and shared experts make of tokens; see :data:`~astraea_jax.models.experts.Mixed`.

    Args:
        mesh: of one axis, ``"tp"``.
        grouped: products with the experts' matrices, on one device.
        ops: products with the shared experts' matrices, on one device.
        x: ``[T, D]``.
        index: ``[T, k]``, the experts of every token.
        weights: ``[T, k]``, their weights.
        of: the experts.
    """
    graph, state = nnx.split(of)
    paths = nnx.to_flat_state(state)
    specs = nnx.from_flat_state(
        [(path, leaf.replace(spec(("layers", 0, "mlp", *path), leaf.shape, mesh))) for path, leaf in paths]
    )

    def on_each(x: jax.Array, index: jax.Array, weights: jax.Array, state: Any) -> jax.Array:
        mixture: Mixture = nnx.merge(graph, state)
        rank, held = jax.lax.axis_index(TP), mixture.gate_up.weight.shape[0]
        _check(mixture.gate_up)
        _check(mixture.down)
        if held < mixture.experts.count:
            index = index - rank * held
        elif mixture.down_bias is not None:  # all devices have all experts, and one adds their biases
            bias = mixture.down_bias[...]
            mixture.down_bias = nnx.Param(jnp.where(rank == 0, bias, jnp.zeros_like(bias)))
        out = mixed(grouped, x, index, weights, mixture)
        if mixture.shared is not None:
            out = out + mixture.shared(x, ops)
        return jax.lax.psum(out, TP)

    everywhere = PartitionSpec()
    compute: Any = jax.shard_map(
        on_each,
        mesh=mesh,
        in_specs=(everywhere, everywhere, everywhere, specs),
        out_specs=everywhere,
        check_vma=False,  # kernels do not say along which axes their arrays vary
    )
    result: jax.Array = compute(x, index, weights, state)
    return result


def _check(matrix: Matrix) -> None:
    """Refuse a share of a matrix that is not one of its scales too."""
    if matrix.form is not None:
        codes, scales = matrix.weight.shape, matrix.scales.shape
        if scales[1:] != matrix.form.grid(codes[1] * matrix.form.per_item, codes[2]):
            raise CheckpointError(
                f"devices would share scales of experts' matrices, since {codes[1] * matrix.form.per_item} inputs and "
                f"{codes[2]} outputs of each are no whole blocks; choose a smaller tensor_parallel, or one that "
                "divides the number of experts"
            )
