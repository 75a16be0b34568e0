"""Several replicas of a model in one process behind the face of one engine: data parallelism.

Every replica is an :class:`Engine` with devices, KV and a thread of its own. A router places programs on them
(:mod:`astraea_jax.scheduler.placement`): a program stays with the replica that has its KV unless another one would be
so much faster that it pays to compute that again. When a replica dies, its programs go to the others, which compute
their KV again, because every request comes with its whole prompt.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import asdict
from functools import partial
from pathlib import Path

from astraea_jax.engine.calls import checked_call
from astraea_jax.engine.config import EngineConfig
from astraea_jax.engine.engine import Engine
from astraea_jax.engine.events import Key, checked_hand_over, checked_key
from astraea_jax.engine.generation import Generation, Observer
from astraea_jax.engine.homes import Homes
from astraea_jax.engine.interface import Serving
from astraea_jax.engine.lifecycle import State
from astraea_jax.engine.loading import load_model, random_model
from astraea_jax.engine.sampling import SamplingParams
from astraea_jax.errors import RequestError
from astraea_jax.models.checkpoint import Progress
from astraea_jax.scheduler.config import SchedulerStats
from astraea_jax.scheduler.handover import HandOver
from astraea_jax.scheduler.load import together
from astraea_jax.scheduler.placement import Report
from astraea_jax.scheduler.registry import NAME_TAKEN, UNKNOWN_SESSION
from astraea_jax.scheduler.view import Held
from astraea_jax.scheduler.wait import Wait


class Replicas:
    """Engines of one model and one configuration; the methods are documented at :class:`Engine`."""

    def __init__(self, engines: Sequence[Engine]):
        self.replicas = tuple(engines)
        first = self.replicas[0]
        self.config, self.model_config, self.tokenizer = first.config, first.model_config, first.tokenizer
        self.layout = first.layout
        """Layout of one replica."""
        self._homes = Homes(self.replicas, self.config.max_programs * len(self.replicas), self.config.session_ttl_s)

    @property
    def live(self) -> bool:
        """Whether any replica accepts requests."""
        return any(engine.live for engine in self.replicas)

    @property
    def state(self) -> State:
        """SERVING if any replica serves, else that of the replica which is least far in its life."""
        states = [engine.state for engine in self.replicas]
        return State.SERVING if State.SERVING in states else min(states, key=list(State).index)

    @property
    def in_progress(self) -> int:
        """Requests accepted and not yet ended, of all replicas."""
        return sum(engine.in_progress for engine in self.replicas)

    def watch(self, changed: Callable[[], object]) -> None:
        """Call ``changed`` after every change of any replica's state."""
        for engine in self.replicas:
            engine.watch(changed)

    def observe(self, ended: Observer) -> None:
        """Call ``ended`` with every request that ends on any replica."""
        for engine in self.replicas:
            engine.observe(ended)

    def start(self, progress: Callable[[int, int], None] = lambda done, total: None) -> None:
        """Start every replica at the same time; if one fails, the others are shut down.

        One that is retired before it serves has not failed, as long as another one serves. ``progress(done, total)``
        counts executables of all of them.
        """
        seen = dict.fromkeys(self.replicas, (0, 0))

        def of_one(engine: Engine, done: int, total: int) -> None:
            with self._homes.lock:
                seen[engine] = done, total
                counted = [counts for of, counts in seen.items() if of not in self._homes.retired]
                if counted and all(total for _, total in counted):
                    progress(*map(sum, zip(*counted, strict=True)))

        with ThreadPoolExecutor(len(self.replicas)) as pool:
            starts = {pool.submit(engine.start, partial(of_one, engine)): engine for engine in self.replicas}
            try:
                for start in as_completed(starts):
                    retired, error = self._homes.retired, start.exception()
                    if error is not None and (starts[start] not in retired or len(retired) == len(starts)):
                        raise error
            except BaseException:
                for engine in self.replicas:
                    engine.shutdown(0)
                raise

    def shutdown(self, grace_s: float = 30.0) -> int:
        """Shut down every replica at the same time; returns how many requests that has cut off."""
        with ThreadPoolExecutor(len(self.replicas)) as pool:
            return sum(pool.map(lambda engine: engine.shutdown(grace_s), self.replicas))

    def generate(
        self,
        prompt: Sequence[int],
        params: SamplingParams | None = None,
        *,
        session: str | None = None,
        final: bool = False,
        salt: str = "",
        owner: str = "",
        parent: str | None = None,
        priority: int = 0,
    ) -> Generation:
        """Queue one request on the replica that the router chooses."""
        call = checked_call(
            (self.layout.max_context, self.model_config.vocab_size),
            prompt,
            params,
            session=session,
            final=final,
            salt=salt,
            owner=owner,
            parent=parent,
            priority=priority,
        )
        return self._homes.submit(call)

    def end_session(self, session: str, *, owner: str = "") -> None:
        """End a program, on the replica that has it."""
        key = checked_key(session, owner)
        with self._homes.lock:
            home = self._homes.of(key)
            self._homes.forget(key)
        if home is not None:
            home.end_session(session, owner=owner)

    def waits(self, session: str, wait: Wait, *, owner: str = "") -> None:
        """Say what a program waits for, to the replica that has it."""
        home = self._homes.of(checked_key(session, owner))
        if home is not None:
            home.waits(session, wait, owner=owner)

    def tool_called(self, session: str, tool: str, *more: str, owner: str = "") -> None:
        """Say which tools a program waits for, to the replica that has it."""
        self.waits(session, Wait((tool, *more)), owner=owner)

    def fork(self, session: str, child: str, *, owner: str = "") -> Future[None]:
        """Fork a session, on the replica that has it."""
        key = checked_key(child, owner)
        with self._homes.lock:
            home, other = self._home_of(checked_key(session, owner)), self._homes.of(key)
            if other is not None and other is not home and (self._homes.busy(key) or other.knows(child, owner=owner)):
                raise RequestError(NAME_TAKEN)
            forked = home.fork(session, child, owner=owner)
            self._homes.settle(key, home)
        return forked

    async def replace_tail(self, session: str, prompt: Sequence[int], *, owner: str = "", salt: str = "") -> bool:
        """Have the next prompt of a waiting session computed ahead, on the replica that has it."""
        home = self._home_of(checked_key(session, owner))
        return await home.replace_tail(session, prompt, owner=owner, salt=salt)

    def held(
        self, prompt: Sequence[int], *, salt: str = "", session: str | None = None, owner: str = ""
    ) -> Future[Held]:
        """Ask how much of a prompt would be found computed, on the session's replica or else the least busy one."""
        home = self._homes.of(checked_key(session, owner) if session is not None else None)
        return (home or self._homes.least_busy()).held(prompt, salt=salt, session=session, owner=owner)

    def _home_of(self, session: Key) -> Engine:
        home = self._homes.of(session)
        if home is None:
            raise RequestError(UNKNOWN_SESSION)
        return home

    def stats(self) -> SchedulerStats:
        """Sums over all replicas."""
        fields: dict[str, int] = Counter()
        decisions: dict[str, int] = Counter()
        for engine in self.replicas:
            of_one = asdict(engine.stats())
            decisions.update(of_one.pop("decisions"))
            fields.update(of_one)
        return SchedulerStats(**fields, decisions=dict(decisions))

    def report(self) -> Report:
        """Say how loaded the replicas that serve are together."""
        return together([engine.report() for engine in self.replicas if engine.live] or [self.replicas[0].report()])

    def drain(self) -> None:
        """Say in the reports of all replicas that they drain."""
        for engine in self.replicas:
            engine.drain()

    async def retire(self, number: int, grace_s: float = 30.0) -> int:
        """Take one replica out of service, for good; see :meth:`.homes.Homes.retire`.

        Raises:
            ValueError: there is no such replica, or the grace is no time.
        """
        if type(number) is not int or not 0 <= number < len(self.replicas):
            raise ValueError(f"there is no replica {number!r}; they are 0 to {len(self.replicas) - 1}")
        return await self._homes.retire(self.replicas[number], grace_s)

    def hand_over(self) -> Future[list[HandOver]]:
        """Let waiting sessions go, those of the replica that has most of them."""

        def most(engine: Engine) -> tuple[bool, int]:
            stats = engine.stats()
            return engine.live, stats.in_tool_wait + stats.in_human_wait

        return max(self.replicas, key=most).hand_over()

    def take_over(self, handed: HandOver) -> Future[None]:
        """Take over a session that another server has let go, on the least busy replica.

        One that has come back before is refused by the replica where it is now.
        """
        handed = checked_hand_over(handed, self.layout.max_context, self.model_config.vocab_size)
        assert isinstance(handed.key, tuple)
        with self._homes.lock:
            home = self._homes.of(handed.key) or self._homes.least_busy()
            taken = home.take_over(handed)
            self._homes.settle(handed.key, home)
        return taken

    def counts(self) -> dict[str, int]:
        """Sums over all replicas."""
        counts: Counter[str] = Counter()
        for engine in self.replicas:
            counts.update(engine.counts())
        return dict(counts)

    def check(self) -> None:
        """Check every replica that serves."""
        for engine in self.replicas:
            if engine.live:
                engine.check()


def load_engine(
    model: str | Path,
    config: EngineConfig | None = None,
    *,
    random_weights: bool = False,
    progress: Progress | None = None,
) -> Serving:
    """Load a model and make what serves it, without starting it.

    Weights are read once and copied from the devices of the first replica to the others.

    Args:
        model: a checkpoint folder, the bundled ``"astraea-tiny"``, or with ``random_weights`` a published shape.
        config: sizes and policy; with ``data_parallel`` above 1 there are several replicas.
        random_weights: measure a shape without its weights; it speaks the tokens of astraea-tiny.
        progress: of reading the weights.

    Raises:
        CheckpointError, StartupError: it cannot be served here; the message says why.
    """
    config = config or EngineConfig()
    loaded = random_model(str(model), config) if random_weights else load_model(model, config, progress)
    engines = [Engine(loaded.decoder, loaded.tokenizer, config, mesh) for mesh in loaded.meshes]
    return Replicas(engines) if len(engines) > 1 else engines[0]
