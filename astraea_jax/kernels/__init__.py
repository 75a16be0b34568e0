"""Attention kernels: one interface, one implementation per backend."""

from .backend import Backend, Batch
from .gpu import Triton
from .reference import Reference

BACKENDS: dict[str, type[Backend]] = {"reference": Reference, "triton": Triton}
DEFAULTS = {"gpu": "triton"}
"""Backend of each kind of device, as JAX names it; of any other: the reference."""

__all__ = ["BACKENDS", "DEFAULTS", "Backend", "Batch", "Reference", "Triton"]
