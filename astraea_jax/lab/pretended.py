"""Devices that are pretended: they take the time of a real one and none of the host's processors.

With them a machine without an accelerator can tell what the host's own work costs beside one. Tokens are random, and
those that a grammar allows where there is one; or they are those of a script, so that a model seems to think, to call
tools and to answer.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from astraea_jax.engine.dispatch import InFlight
from astraea_jax.engine.extras import Extras
from astraea_jax.engine.resampling import WORD, mask_words
from astraea_jax.engine.sampling import SamplingParams
from astraea_jax.kv_cache.arrays import FULL
from astraea_jax.scheduler.plan import Plan

REMEMBERED = 1_024
"""Requests whose script is kept; that of an older one is written again."""


@dataclass(frozen=True)
class Pretended(InFlight):
    """A step that is done when its time has come."""

    ready: float = 0.0
    """Time by ``time.perf_counter``."""

    @property
    def done(self) -> bool:
        return time.perf_counter() >= self.ready


class PretendedRunner:
    """Runs steps of equal length, one after the other.

    Args:
        step_s: seconds of a step.
        vocab_size: of the tokens.
        avoided: tokens that are not drawn where a grammar allows others, so that texts do not end.
    """

    block_sharding = None
    groups = (FULL,)
    executables = 0

    def __init__(self, step_s: float, vocab_size: int, avoided: frozenset[int]):
        self._step_s, self._vocab_size = step_s, vocab_size
        self._rng = np.random.default_rng(0)
        kept = np.zeros(WORD * mask_words(vocab_size), np.uint8)
        kept[:vocab_size] = 1
        kept[[token for token in avoided if token < vocab_size]] = 0
        self._kept = np.packbits(kept, bitorder="little").view(np.uint32)
        self._free = 0.0  # when the device has done all that it was given

    def compile(self, progress: Callable[[int, int], None]) -> None: ...

    def set_sampling(self, slot: int, params: SamplingParams) -> None: ...

    def dispatch(self, plan: Plan) -> InFlight:
        now = time.perf_counter()
        self._free = max(self._free, now) + self.seconds(plan)
        return Pretended(plan, self.sampled(plan), now, ready=self._free)

    def seconds(self, plan: Plan) -> float:
        """Return how long a step takes."""
        return self._step_s

    def sampled(self, plan: Plan) -> Any:
        """Return the tokens that a step samples."""
        return self._rng.integers(0, self._vocab_size, plan.samples, np.int32)

    def resample(self, step: InFlight, extras: Extras) -> InFlight:
        tokens: Any = np.array(step.tokens)
        tokens[extras.masked] = [self._allowed(mask.view(np.uint32)) for mask in extras.masks]
        self._free = max(self._free, time.perf_counter())  # where masks come late, the next step begins late, too
        return replace(step, tokens=tokens)

    def _allowed(self, mask: np.ndarray) -> int:
        """Draw a token whose bit is set, from a word of the mask that is drawn first: words are fewer than tokens."""
        preferred = mask & self._kept
        mask = preferred if preferred.any() else mask
        at = int(self._rng.choice(np.flatnonzero(mask)))
        bits = np.flatnonzero(np.unpackbits(mask[at : at + 1].view(np.uint8), bitorder="little"))
        return WORD * at + int(self._rng.choice(bits))

    def read(self, step: InFlight) -> list[int]:
        assert isinstance(step, Pretended)
        time.sleep(max(0.0, step.ready - time.perf_counter()))
        return np.asarray(step.tokens).tolist()

    def gather(self, pages: Sequence[int], group: int) -> Any: ...

    def scatter(self, blocks: Sequence[Any], pages: np.ndarray, group: int) -> None: ...

    def put(self, block: Any, sharding: Any) -> Any: ...

    def reset(self) -> None: ...

    def close(self) -> None: ...


class ScriptedRunner(PretendedRunner):
    """Runs steps whose model writes what a script says.

    Args:
        write: from the tokens of a prompt to those that the model writes after it, its stop token the last one.
        step_s: seconds of a step.
        token_s: seconds more for each of its tokens, so that KV which is lost costs time.
    """

    def __init__(self, write: Callable[[Sequence[int]], Sequence[int]], step_s: float = 0.0, token_s: float = 0.0):
        super().__init__(step_s, 1, frozenset())
        self._write, self._token_s = write, token_s
        self._written: dict[int, Sequence[int]] = {}
        """Number of a request -> what the model writes; the last ones. A step may come after the one that ends it."""

    def seconds(self, plan: Plan) -> float:
        return self._step_s + self._token_s * plan.tokens

    def sampled(self, plan: Plan) -> Any:
        tokens = np.zeros(plan.samples, np.int32)
        places = (plan.starts[: plan.samples] + plan.counts[: plan.samples]).tolist()
        for row, (request, place) in enumerate(zip(plan.requests, places, strict=False)):
            if request.number not in self._written:
                self._written[request.number] = self._write(request.prompt)
                if len(self._written) > REMEMBERED:
                    self._written.pop(next(iter(self._written)))
            written = self._written[request.number]
            tokens[row] = written[min(place - len(request.prompt), len(written) - 1)]
        return tokens
