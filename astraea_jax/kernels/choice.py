"""Which backend of attention serves: the one that is named, or the first for this kind of device that can."""

from __future__ import annotations

import logging
from typing import Any

from astraea_jax.errors import StartupError

from .backend import Backend
from .pallas_tpu import PallasInterpreted, PallasTPU
from .reference import Reference
from .tpu import JaxRPA, TokamaxRPA

log = logging.getLogger(__name__)

_ALL: tuple[type[Backend], ...] = (Reference, TokamaxRPA, JaxRPA, PallasTPU, PallasInterpreted)
BACKENDS: dict[str, type[Backend]] = {backend.name: backend for backend in _ALL}
PREFERRED: dict[str, tuple[str, ...]] = {"tpu": ("tokamax", "jax-rpa", "pallas")}
"""Platform of JAX -> backends, best first; the reference on all others."""


def choose(
    name: str | None, platform: str, *, heads: int, kv_heads: int, head_dim: int, page_size: int, dtype: Any
) -> Backend:
    """The backend called ``name``, or if None the first preferred one that serves these sizes of one device.

    Raises:
        StartupError: it cannot be had, or none can; the message gives the reason and the way out.
    """
    refusals: list[str] = []
    for candidate in (name,) if name is not None else PREFERRED.get(platform, ("reference",)):
        backend = BACKENDS[candidate]()
        refusal = backend.refusal(heads, kv_heads, head_dim, page_size, dtype)
        if backend.platforms and platform not in backend.platforms:
            refusal = f"it runs on {' and '.join(backend.platforms)}, and this is {platform}"
        if refusal is None:
            if refusals:
                log.warning("attention: %s, because of others %s", candidate, "; ".join(refusals))
            else:
                log.info("attention: %s", candidate)
            return backend
        refusals.append(f"{candidate}: {refusal}")
    way_out = "leave attention unset, or choose" if name is not None else "choose"
    raise StartupError(f"attention cannot be had ({'; '.join(refusals)}); {way_out} one of {', '.join(BACKENDS)}")
