"""Choice of the attention backend: the configured one, or the first that can serve this kind of device."""

from __future__ import annotations

import logging
from typing import Any

from astraea_jax.errors import StartupError

from .backend import Backend
from .gpu import Triton
from .grouped import GroupedProduct
from .grouped_reference import GroupedReference
from .grouped_tpu import GroupedTPU
from .grouped_triton import GroupedTriton
from .native.attention import Native
from .native.grouped import GroupedNative
from .pallas_tpu import PallasInterpreted, PallasTPU
from .published_tpu import JaxRPA, TokamaxRPA
from .reference import Reference

log = logging.getLogger(__name__)

_ALL: tuple[type[Backend], ...] = (Reference, Native, Triton, TokamaxRPA, JaxRPA, PallasTPU, PallasInterpreted)
BACKENDS: dict[str, type[Backend]] = {backend.name: backend for backend in _ALL}
PREFERRED = {"cpu": ("native", "reference"), "gpu": ("triton",), "tpu": ("tokamax", "jax-rpa", "pallas")}
"""JAX platform -> backends, best first; every other platform uses the reference."""

ONLY_ON = {"native": "cpu", **dict.fromkeys(PREFERRED["tpu"], "tpu")}
"""Backend -> the platform that it is for; the others are for any, or say so themselves."""

GROUPED: dict[str, type[GroupedProduct]] = {"tpu": GroupedTPU}
"""JAX platform -> what multiplies for mixtures of experts; every other platform uses the reference."""


def grouped_product(platform: str, backend: Backend | None = None) -> GroupedProduct:
    """What multiplies for mixtures of experts on this kind of device, beside this backend of attention."""
    if isinstance(backend, Triton):
        return GroupedTriton(backend)
    return GroupedNative() if isinstance(backend, Native) else GROUPED.get(platform, GroupedReference)()


def choose(
    name: str | None,
    platform: str,
    *,
    kv_heads: int,
    head_dim: int,
    page_size: int,
    dtype: Any,
    sinks: bool = False,
    compute_capability: int | None = None,
) -> Backend:
    """The backend called ``name``, or if None the first preferred one that supports the pages of one device.

    Args:
        name: name of the backend, or None.
        platform: kind of device, as JAX names it.
        kv_heads: see :meth:`Backend.page_shape`, as for the next three.
        head_dim: as above.
        page_size: as above.
        dtype: as above.
        sinks: whether the model's heads have sinks.
        compute_capability: compute capability of absent GPUs to compile for.

    Raises:
        StartupError: the backend is not available, or none is; the message gives the reasons.
    """
    refusals: list[str] = []
    for candidate in (name,) if name is not None else PREFERRED.get(platform, ("reference",)):
        try:
            if (kind := ONLY_ON.get(candidate, platform)) != platform:
                raise StartupError(
                    f"attention {candidate!r} is for {kind.upper()}s, but JAX runs on {platform}; start without it"
                )
            backend = (
                Triton(compute_capability=compute_capability)
                if compute_capability and candidate == "triton"
                else BACKENDS[candidate]()
            )
            backend.page_shape(kv_heads, page_size, head_dim, dtype)
            if sinks and not backend.has_sinks:
                able = next(n for n in PREFERRED.get(platform, ("reference",)) if BACKENDS[n].has_sinks)
                raise StartupError(f"attention {candidate!r} has no sinks, which this model needs; choose {able!r}")
        except StartupError as error:
            refusals.append(str(error))
            continue
        if refusals:
            log.warning("attention: %s, because %s", candidate, "; ".join(refusals))
        else:
            log.info("attention: %s", candidate)
        return backend
    raise StartupError("; ".join(refusals))
