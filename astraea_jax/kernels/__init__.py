"""Attention kernels: one interface, one implementation per backend."""

from .backend import Backend, Batch
from .reference import Reference

BACKENDS: dict[str, type[Backend]] = {"reference": Reference}

__all__ = ["BACKENDS", "Backend", "Batch", "Reference"]
