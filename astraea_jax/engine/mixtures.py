"""Mixtures of experts over several devices: each has its own experts, or its share of the features of all.

Activations are the same on all devices, so nothing moves but one sum per mixture, of which the shared experts are part
unless every device has all of them.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, PartitionSpec

from astraea_jax.kernels import Backend
from astraea_jax.kernels.choice import grouped_product
from astraea_jax.kernels.dense_triton import multiply_narrow
from astraea_jax.kernels.grouped import GroupedProduct, mixed
from astraea_jax.kernels.grouped_triton import GroupedTriton
from astraea_jax.kernels.native.attention import Native
from astraea_jax.kernels.native.products import multiply, product
from astraea_jax.models.experts import Mixture
from astraea_jax.models.operations import Attend, Operations
from astraea_jax.models.sharding import TP, spec


def operations(
    attend: Attend,
    backend: Backend,
    mesh: Mesh,
    tokens: jax.Array | None = None,
    samples: jax.Array | None = None,
) -> Operations:
    """Attention, and products as the devices of a mesh of one axis, ``"tp"``, do them beside its backend.

    Args:
        attend: attention.
        backend: the backend of attention.
        mesh: the devices.
        tokens: ``[]`` int32, how many tokens are no padding; None: all.
        samples: ``[]`` int32, how many rows sample, so that the head may leave out the others; None: all.
    """
    grouped = grouped_product(mesh.devices.flat[0].platform, backend)
    shared, alone = Operations(attend), Operations(attend)
    if isinstance(grouped, GroupedTriton):
        shared = replace(shared, multiply=partial(multiply_narrow, grouped, mesh))
        alone = replace(alone, multiply=partial(multiply_narrow, grouped, None))
    elif isinstance(backend, Native) and mesh.size == 1:
        layers, head = partial(multiply, used=tokens), partial(product, used=samples)
        shared, alone = (replace(one, multiply=layers, product=head) for one in (shared, alone))
    padded = tokens if isinstance(backend, Native) else None
    return replace(shared, mixed=partial(_mixed, mesh, grouped, alone, padded))


def _mixed(
    mesh: Mesh,
    grouped: GroupedProduct,
    ops: Operations,
    tokens: jax.Array | None,
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
        tokens: ``[]`` int32, how many are no padding, which has no experts; None: all.
        x: ``[T, D]``.
        index: ``[T, k]``, the experts of every token.
        weights: ``[T, k]``, their weights.
        of: the experts.
    """
    if tokens is not None:
        index = jnp.where(jnp.arange(len(x))[:, None] < tokens, index, -1)
    graph, state = nnx.split(of)
    undivided = of.shared is not None and not of.shared.divisible(mesh.size)
    everywhere = PartitionSpec()

    def partition(path: Any, leaf: Any) -> PartitionSpec:
        whole = undivided and path[0] == "shared"
        return everywhere if whole else spec(("layers", 0, "mlp", *path), leaf.shape, mesh)

    paths = nnx.to_flat_state(state)
    specs = nnx.from_flat_state([(path, leaf.replace(partition(path, leaf))) for path, leaf in paths])

    def on_each(x: jax.Array, index: jax.Array, weights: jax.Array, state: Any) -> jax.Array:
        mixture: Mixture = nnx.merge(graph, state)
        rank, held = jax.lax.axis_index(TP), mixture.gate_up.weight.shape[0]
        if held < mixture.experts.count:
            index = index - rank * held
        elif mixture.down_bias is not None:  # all devices have all experts, and one adds their biases
            bias = mixture.down_bias[...]
            mixture.down_bias = nnx.Param(jnp.where(rank == 0, bias, jnp.zeros_like(bias)))
        out = mixed(grouped, x, index, weights, mixture)
        if mixture.shared is None:
            return jax.lax.psum(out, TP)
        beside = mixture.shared(x, ops)
        return jax.lax.psum(out, TP) + beside if undivided else jax.lax.psum(out + beside, TP)

    compute: Any = jax.shard_map(
        on_each,
        mesh=mesh,
        in_specs=(everywhere, everywhere, everywhere, specs),
        out_specs=everywhere,
        check_vma=False,  # kernels do not say along which axes their arrays vary
    )
    result: jax.Array = compute(x, index, weights, state)
    return result
