"""The seam between the serving loop and the runner: steps under way, and the calls that the loop makes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import jax

from astraea_jax.engine.extras import Extras
from astraea_jax.engine.sampling import SamplingParams
from astraea_jax.kv_cache.offload import Pools
from astraea_jax.scheduler.plan import Plan


@dataclass(frozen=True)
class InFlight:
    """A dispatched step; its tokens are read after the next step has been dispatched."""

    plan: Plan
    tokens: jax.Array
    """The sampled token of each row, int32; -1 where the logits were not finite. Rows beyond the plan's say nothing."""
    dispatched: float
    """Time of dispatch by ``time.perf_counter``."""
    logprobs: jax.Array | None = None
    """Of every row, see :func:`.resampling.logprobs`; None: no row wants them."""

    @property
    def done(self) -> bool:
        """Whether the device has finished it."""
        return all(array.is_ready() for array in (self.tokens, self.logprobs) if array is not None)  # type: ignore[attr-defined]


class StepRunner(Pools, Protocol):
    """The interface through which the loop uses the device; the :class:`~.runner.Runner` implements it.

    Only the loop's thread calls it, but for :meth:`compile`, which comes before.
    """

    block_sharding: Any
    """Sharding of a block of pages on the device."""

    @property
    def executables(self) -> int: ...
    def compile(self, progress: Callable[[int, int], None]) -> None: ...
    def set_sampling(self, slot: int, params: SamplingParams) -> None: ...
    def dispatch(self, plan: Plan) -> InFlight: ...
    def resample(self, step: InFlight, extras: Extras) -> InFlight: ...
    def read(self, step: InFlight) -> list[int]: ...
    def put(self, block: Any, sharding: Any) -> Any: ...
    def reset(self) -> None:
        """Make the arrays anew, all pages empty, after a step has raised; raises if the device is gone."""

    def close(self) -> None: ...
