"""An engine whose device is made of dictionaries: no arrays, no compiler, and tokens that show every misplaced page."""

from __future__ import annotations

import threading
import time
from collections import deque
from dataclasses import dataclass, replace
from types import SimpleNamespace

import numpy as np
from support.device import VOCABULARY, Device
from support.resampled import adjusted, logprobs, masked

from astraea_jax.engine.config import EngineConfig
from astraea_jax.engine.engine import Engine
from astraea_jax.engine.extras import Extras
from astraea_jax.models import resolve
from astraea_jax.models.config import ModelConfig
from astraea_jax.models.tokenizer import Tokenizer
from astraea_jax.scheduler.plan import Plan

MODEL = ModelConfig(
    vocab_size=VOCABULARY,
    hidden_size=16,
    intermediate_size=16,
    num_layers=1,
    num_heads=2,
    num_kv_heads=2,
    head_dim=8,
    max_position=64,
    tie_embeddings=True,
)
PAGE_BYTES = 2 * 4 * 2 * 8 * 4
"""Bytes of four tokens' keys and values, two heads of eight numbers."""
STUB = EngineConfig(
    max_seqs=3, max_step_tokens=8, page_size=4, kv_bytes=13 * PAGE_BYTES, max_queued=6, dtype="float32", max_context=44
)
"""Twelve pages: less than three requests may want."""
TOKENIZER = Tokenizer.from_folder(resolve("astraea-tiny"))


@dataclass(frozen=True)
class Launched:
    """A step that has been computed at dispatch."""

    plan: Plan
    tokens: list[int]
    dispatched: float
    logprobs: np.ndarray | None = None
    done: bool = True


class StubRunner:
    """Stands in for :class:`~astraea_jax.engine.runner.Runner`; its tokens are those of :mod:`support.device`."""

    block_sharding = None
    executables = 1

    def __init__(self) -> None:
        self.device: Device | None = None
        self.fault: AssertionError | None = None
        """Fault that the device has found in a plan; not raised, or else the engine would take it for the step's."""
        self.failing: deque[str] = deque()
        """Calls that are to raise: ``"dispatch"`` or ``"read"``, each the next time it comes."""
        self.broken: BaseException | None = None
        """Raised by :meth:`reset`: the device is gone."""
        self.compiles: BaseException | None = None
        """Raised by :meth:`compile`."""
        self.go = threading.Event()
        """Reads wait for it."""
        self.go.set()

    def compile(self, progress) -> None:
        if self.compiles:
            raise self.compiles
        progress(1, 1)

    def set_sampling(self, slot, params) -> None: ...

    def dispatch(self, plan: Plan) -> Launched:
        self._fail("dispatch")
        try:
            tokens = self.device.run(plan)
        except AssertionError as error:
            self.fault, tokens = self.fault or error, [0] * plan.samples
        return Launched(plan, tokens, time.perf_counter())

    def resample(self, step: Launched, extras: Extras) -> Launched:
        """Draws as the real one does, from logits of 1 for the device's token and 0 for the others."""
        logits = np.zeros((len(step.tokens), VOCABULARY), np.float32)
        logits[range(len(logits)), step.tokens] = 1
        drawn = adjusted(logits, extras.entries)
        drawn[extras.masked] = masked(drawn[extras.masked], extras.masks)
        tokens = list(step.tokens)
        for row in extras.rows:
            tokens[row] = self.device.last[int(step.plan.slots[row])] = int(drawn[row].argmax())
        reported = logprobs(logits, np.array(tokens)) if extras.logprobs else None
        return replace(step, tokens=tokens, logprobs=reported)

    def read(self, step: Launched) -> list[int]:
        self.go.wait()
        self._fail("read")
        return step.tokens

    def reset(self) -> None:
        if self.broken:
            raise self.broken
        self.device.kv.clear()
        self.device.table[:] = 0

    def close(self) -> None: ...

    def _fail(self, call: str) -> None:
        if self.failing and self.failing[0] == call:
            self.failing.popleft()
            raise RuntimeError(f"the test lets {call} fail")


def stub_engine(config: EngineConfig = STUB) -> tuple[Engine, StubRunner]:
    """An engine that has not been started, and its runner."""
    runner = StubRunner()
    engine = Engine(SimpleNamespace(config=MODEL), TOKENIZER, config, runner=lambda *_: runner)
    runner.device = Device(engine._scheduler)
    return engine, runner
