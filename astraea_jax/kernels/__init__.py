"""Attention kernels: one interface, one implementation per backend."""

from .backend import Backend, Batch
from .choice import BACKENDS, choose, grouped_product
from .gpu import Triton
from .native.attention import Native
from .reference import Reference

__all__ = ["BACKENDS", "Backend", "Batch", "Native", "Reference", "Triton", "choose", "grouped_product"]
