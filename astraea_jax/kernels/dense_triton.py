"""Products with matrices of fewer bits on NVIDIA GPUs, by the kernel of grouped products with one group."""

from __future__ import annotations

from typing import Any

import jax
from jax.sharding import Mesh, PartitionSpec

from astraea_jax.models.matrix import Matrix, multiply
from astraea_jax.models.narrow import Codes
from astraea_jax.models.sharding import TP

from .grouped_triton import GroupedTriton

WIDENED_FROM = 256
"""Rows from which a matrix with one scale of each output is widened in memory for cuBLAS, whose product of many rows
gains more than that costs. Guessed, not measured yet."""


def multiply_narrow(grouped: GroupedTriton, mesh: Mesh | None, x: jax.Array, matrix: Matrix) -> jax.Array:
    """In the place of :func:`astraea_jax.models.matrix.multiply`, which it leaves matrices in 16 bits to.

    Each device of the mesh multiplies its own part; where devices divide the inputs, the results are summed. Without a
    mesh a device works alone.
    """
    form = matrix.form
    if form is None or (form.inputs is None and form.per_item == 1 and len(x) >= WIDENED_FROM):
        return multiply(x, matrix)
    if mesh is None or mesh.size == 1:
        return grouped.multiplied(x, matrix.codes, form)
    shape = x.shape[1], matrix.weight.shape[1]
    if not form.divisible(shape, mesh.size, summed=matrix.summed):
        return multiply(x, matrix)
    of_input, of_output = (TP, None) if matrix.summed else (None, TP)
    scales = PartitionSpec(None if form.inputs is None else of_input, of_output)
    parts: tuple[Any, ...] = PartitionSpec(of_input, of_output), scales, scales if form.zeros else None
    codes = Codes(*parts)

    def on_device(x: jax.Array, codes: Codes) -> jax.Array:
        out = grouped.multiplied(x, codes, form)
        return jax.lax.psum(out, TP) if matrix.summed else out

    product: Any = jax.shard_map(
        on_device,
        mesh=mesh,
        in_specs=(PartitionSpec(None, of_input), codes),
        out_specs=PartitionSpec(None, of_output),
        check_vma=False,  # kernels do not say along which axes their arrays vary
    )
    out: jax.Array = product(x, matrix.codes)
    return out
