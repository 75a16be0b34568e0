"""Several copies of a model in one process, in the place of one engine: data parallelism.

Every copy is an :class:`Engine` with devices, KV and a thread of its own. A program stays with the copy that has its
KV; a new one goes to the copy with the fewest requests in progress (join the shortest queue), and among equals to the
one that has been given the fewest programs. When a copy dies, its programs go to the others, which compute their KV
again, because every request comes with its whole prompt.
"""

from __future__ import annotations

import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from functools import partial
from pathlib import Path

from astraea_jax.engine.config import EngineConfig
from astraea_jax.engine.engine import Engine, owned
from astraea_jax.engine.generation import Generation
from astraea_jax.engine.loading import ModelOnDevices, load_model, random_model
from astraea_jax.engine.sampling import SamplingParams
from astraea_jax.models.checkpoint import Progress
from astraea_jax.scheduler.config import SchedulerStats


class Replicas:
    """Engines of one model and one configuration behind the face of one; see :class:`Engine`."""

    def __init__(self, engines: Sequence[Engine]):
        self.engines = tuple(engines)
        first = self.engines[0]
        self.config, self.model_config, self.tokenizer = first.config, first.model_config, first.tokenizer
        self.layout = first.layout
        """Of one copy."""
        self._lock = threading.Lock()
        self._homes: OrderedDict[str, Engine] = OrderedDict()
        """Session -> who has its KV, the longest idle first; as many as all engines together remember."""
        self._given = Counter(dict.fromkeys(self.engines, 0))
        """Sessions in ``_homes``."""

    @property
    def live(self) -> bool:
        """Whether any copy serves."""
        return any(engine.live for engine in self.engines)

    def start(self, progress: Callable[[int, int], None] = lambda done, total: None) -> None:
        """Compile and start every copy at the same time; ``progress(done, total)`` counts steps of all of them."""
        seen = dict.fromkeys(self.engines, (0, 0))

        def of_one(engine: Engine, done: int, total: int) -> None:
            with self._lock:
                seen[engine] = done, total
                compiled, wanted = map(sum, zip(*seen.values(), strict=True))
                if all(total for _, total in seen.values()):
                    progress(compiled, wanted)

        self._on_each(lambda engine: engine.start(partial(of_one, engine)))

    def generate(
        self,
        prompt: Sequence[int],
        params: SamplingParams | None = None,
        *,
        session: str | None = None,
        final: bool = False,
        salt: str = "",
        owner: str = "",
    ) -> Generation:
        """As :meth:`Engine.generate`, on the copy that has the session's KV, or else on the least busy one."""
        session = owned(owner, session)
        with self._lock:
            home = self._homes.get(session) if session is not None else None
            if home is None or not home.live:
                home = min(self.engines, key=lambda e: (not e.live, e.in_progress, self._given[e]))
            generation = home.generate(prompt, params, session=session, final=final, salt=salt)
            if session is not None:
                self._settle(session, home)
        return generation

    def end_session(self, session: str, *, owner: str = "") -> None:
        """As :meth:`Engine.end_session`."""
        session = owned(owner, session) or session
        with self._lock:
            home = self._forget(session)
        if home is not None:
            home.end_session(session)

    def tool_called(self, session: str, tool: str, *, owner: str = "") -> None:
        """As :meth:`Engine.tool_called`."""
        session = owned(owner, session) or session
        with self._lock:
            home = self._homes.get(session)
        if home is not None:
            home.tool_called(session, tool)

    def watch(self, callback: Callable[[], None]) -> None:
        """As :meth:`Engine.watch`, of every copy."""
        for engine in self.engines:
            engine.watch(callback)

    @property
    def replicas(self) -> tuple[Engine, ...]:
        """The engines behind this face."""
        return self.engines

    def stats(self) -> SchedulerStats:
        """Counts of all copies together."""
        fields: dict[str, int] = Counter()
        decisions: dict[str, int] = Counter()
        for engine in self.engines:
            of_one = asdict(engine.stats())
            decisions.update(of_one.pop("decisions"))
            fields.update(of_one)
        return SchedulerStats(**fields, decisions=dict(decisions))

    def counts(self) -> dict[str, int]:
        """As :meth:`Engine.counts`, of all copies together."""
        counts: Counter[str] = Counter()
        for engine in self.engines:
            counts.update(engine.counts())
        return dict(counts)

    def shutdown(self, grace_s: float = 30.0) -> None:
        """As :meth:`Engine.shutdown`, of all copies at the same time."""
        self._on_each(lambda engine: engine.shutdown(grace_s))

    def _settle(self, session: str, home: Engine) -> None:
        self._forget(session)
        self._homes[session] = home
        self._given[home] += 1
        if len(self._homes) > self.config.max_programs * len(self.engines):
            self._forget(next(iter(self._homes)))

    def _forget(self, session: str) -> Engine | None:
        home = self._homes.pop(session, None)
        if home is not None:
            self._given[home] -= 1
        return home

    def _on_each(self, act: Callable[[Engine], None]) -> None:
        with ThreadPoolExecutor(len(self.engines)) as pool:
            for done in [pool.submit(act, engine) for engine in self.engines]:
                done.result()


Serving = Engine | Replicas
"""What front doors serve."""


def from_folder(model: str | Path, config: EngineConfig | None = None, *, progress: Progress | None = None) -> Serving:
    """Load a checkpoint folder, or the bundled ``"astraea-tiny"``, as often as the configuration says."""
    config = config or EngineConfig()
    return _copies(load_model(model, config, progress), config)


def with_random_weights(shape: str, config: EngineConfig | None = None) -> Serving:
    """As :meth:`Engine.with_random_weights`, as often as the configuration says."""
    config = config or EngineConfig()
    return _copies(random_model(shape, config), config)


def _copies(model: ModelOnDevices, config: EngineConfig) -> Serving:
    """One engine, or several: the weights are read once and copied from the devices of the first to the others."""
    engines = [Engine(model.decoder, model.tokenizer, config, mesh) for mesh in model.meshes]
    return Replicas(engines) if len(engines) > 1 else engines[0]
