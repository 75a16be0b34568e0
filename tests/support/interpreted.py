"""The Triton backend on a CPU: the very kernels, run by Triton's interpreter. Needs PyTorch, whose tensors it wants.

Import this before anything imports Triton: the interpreter must be chosen first.
"""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"

import jax
import jax.numpy as jnp
import numpy as np
import torch

from astraea_jax.kernels import triton_kernels, triton_products
from astraea_jax.kernels.gpu import Triton

KERNELS = {**vars(triton_kernels), **vars(triton_products)}


class Interpreted(Triton):
    """Launches become calls of the host; what a kernel has to fill is NaN before."""

    def __post_init__(self) -> None:
        """Neither a GPU nor jax-triton is needed."""

    def launch(self, kernel, grid, operands, constants, *, out=None, warps=4, stages=1):
        refs = {name: x for name, x in operands.items() if isinstance(x, jax.Ref)}
        arrays = {name: x[...] if name in refs else x for name, x in operands.items() if hasattr(x, "shape")}
        numbers = {name: x for name, x in operands.items() if name not in arrays}
        results = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in refs.items()} | (out or {})

        def run(*values: jax.Array) -> tuple[np.ndarray, ...]:
            tensors = {name: _tensor(np.asarray(x)) for name, x in zip(arrays, values, strict=True)}
            for name, x in (out or {}).items():
                tensors[name] = _tensor(
                    np.full(x.shape, np.nan if jnp.issubdtype(x.dtype, jnp.floating) else -1, x.dtype)
                )
            KERNELS[kernel][grid](**tensors, **numbers, **constants)
            return tuple(_array(tensors[name], x.dtype) for name, x in results.items())

        filled = jax.pure_callback(run, tuple(results.values()), *arrays.values())
        for ref, value in zip(refs.values(), filled):
            ref[...] = value
        return filled[len(refs) :]


def _tensor(x: np.ndarray) -> torch.Tensor:
    """A copy, of the same bits; PyTorch names the types that NumPy has from ml_dtypes alike."""
    if x.dtype.isbuiltin == 1:
        return torch.from_numpy(x.copy())
    bits = x.view(np.dtype(f"u{x.dtype.itemsize}")).copy()
    return torch.from_numpy(bits).view(getattr(torch, x.dtype.name))


def _array(x: torch.Tensor, dtype: np.dtype) -> np.ndarray:
    if np.dtype(dtype).isbuiltin == 1:
        return x.numpy()
    return x.view(torch.uint8).numpy().view(dtype)
