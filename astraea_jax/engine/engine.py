"""An engine as its callers see it: requests in, from any thread; what they produce out, in the caller's event loop."""

from __future__ import annotations

import asyncio
import atexit
import logging
import math
import os
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from dataclasses import replace
from pathlib import Path

from jax.sharding import Mesh

from astraea_jax.engine.calls import Call, checked_call
from astraea_jax.engine.compilation import use_cache
from astraea_jax.engine.config import EngineConfig
from astraea_jax.engine.dispatch import StepRunner
from astraea_jax.engine.events import Check, Stop, Submit
from astraea_jax.engine.generation import Generation, Mailbox, Observer, Outbox
from astraea_jax.engine.kv_events import KVEvents
from astraea_jax.engine.layout import Layout
from astraea_jax.engine.lifecycle import Lifecycle, State
from astraea_jax.engine.loading import load_model
from astraea_jax.engine.loop import ServingLoop
from astraea_jax.engine.multiprocess import make_runner
from astraea_jax.engine.sampling import SamplingParams
from astraea_jax.engine.sessions import Sessions
from astraea_jax.engine.tenant_weights import parsed
from astraea_jax.engine.times import StepTimes, Work
from astraea_jax.engine.watchdog import watch
from astraea_jax.errors import EngineDead, Fault, StartupError
from astraea_jax.kv_cache.offload import HostStore
from astraea_jax.models.checkpoint import Progress
from astraea_jax.models.decoder import Decoder
from astraea_jax.models.tokenizer import Tokenizer
from astraea_jax.scheduler.config import SchedulerConfig, SchedulerStats
from astraea_jax.scheduler.costs import StepFit, TransferFit
from astraea_jax.scheduler.histogram import Histogram
from astraea_jax.scheduler.placement import Report
from astraea_jax.scheduler.policies import make_policy
from astraea_jax.scheduler.prediction import Predictor
from astraea_jax.scheduler.scheduler import Scheduler
from astraea_jax.scheduler.wait_times import WaitCounts

log = logging.getLogger(__name__)

ENGINE_THREAD = "astraea-engine"
"""Name of the thread of the serving loop."""
STOP_S = 5.0
"""Seconds that the loop gets to stop, once it has been told to."""

_started: weakref.WeakSet[Engine] = weakref.WeakSet()
if hasattr(os, "register_at_fork"):  # Windows does not fork
    os.register_at_fork(after_in_child=_started.clear)


@atexit.register
def _stop_all() -> None:
    """Stop what still serves before the interpreter ends: a thread that is in JAX by then aborts the process.

    So a step may take longer than :data:`STOP_S` here, as long as its watchdog does not take the device for hung.
    """
    for engine in list(_started):
        engine.shutdown(grace_s=0)
        if engine._watchdog.is_alive():
            engine._watchdog.join()


class Engine(Sessions):
    """Serves one model. Make it, :meth:`start` it, then call :meth:`generate` from any event loop.

    Its life runs from NEW through COMPILING and SERVING to DRAINING and DEAD (:class:`~.lifecycle.State`). Once DEAD,
    whatever the reason, every request that it had accepted has been answered.

    Args:
        decoder: the model.
        tokenizer: from the same folder.
        config: sizes and policy.
        mesh: the devices that share the model; None: the first ``tensor_parallel`` ones; the rest are not touched.
        runner: makes what runs the steps, from decoder, config, layout and mesh.

    Raises:
        StartupError: the sizes do not fit the model or this machine.
    """

    def __init__(
        self,
        decoder: Decoder,
        tokenizer: Tokenizer,
        config: EngineConfig | None = None,
        mesh: Mesh | None = None,
        *,
        runner: Callable[[Decoder, EngineConfig, Layout, Mesh], StepRunner] = make_runner,
    ):
        self.config = c = config or EngineConfig()
        use_cache(c.compile_cache)
        if mesh is None:
            if c.data_parallel > 1:
                raise StartupError(
                    f"an Engine is one replica, data_parallel {c.data_parallel} asks for more; use load_engine()"
                )
            mesh = c.meshes(decoder.config)[0]
        self.model_config = decoder.config
        self.tokenizer = tokenizer
        self.layout = layout = Layout.plan(c, decoder.config, mesh)
        self._predictor, weights = Predictor(), parsed(c.tenant_weights)
        self._scheduler = Scheduler(
            SchedulerConfig(
                num_pages=layout.num_pages,
                page_size=c.page_size,
                max_seqs=c.max_seqs,
                max_step_tokens=c.max_step_tokens,
                max_context=layout.max_context,
                max_waiting=c.max_queued,
                max_programs=c.max_programs,
                session_ttl_s=c.session_ttl_s,
                host=layout.host,
                window=layout.window,
                kv_events=c.kv_events,
                tenant_weights=weights,
            ),
            make_policy(c.policy, self._predictor, c.residency),
        )
        self.kv_events = KVEvents(self._scheduler.kv_log)
        """What is cached, as it changes, for one thread to take; nothing unless ``config.kv_events``."""
        self._runner = runner(decoder, c, layout, mesh)
        self._store: HostStore | None = None
        if layout.host.pages:
            self._store = HostStore(self._runner, self._runner.block_sharding, layout.host.staging, self._runner.put)
        self._life = Lifecycle(c.max_queued, weights)
        self._observers: list[Observer] = []
        self._leaving = False
        vocab_size = decoder.config.vocab_size
        self._loop = ServingLoop(
            self._scheduler, self._runner, self._store, tokenizer, self._life, vocab_size, self.kv_events.collect
        )
        self._thread = threading.Thread(target=self._run, name=ENGINE_THREAD, daemon=True)
        self._watchdog = threading.Thread(target=self._watch_steps, name="astraea-watchdog", daemon=True)

    @classmethod
    def from_folder(
        cls, model: str | Path, config: EngineConfig | None = None, *, progress: Progress | None = None
    ) -> Engine:
        """Load a checkpoint folder, or the bundled ``"astraea-tiny"``, without starting it."""
        loaded = load_model(model, config or EngineConfig(), progress)
        return cls(loaded.decoder, loaded.tokenizer, config, loaded.meshes[0] if len(loaded.meshes) == 1 else None)

    @property
    def slots(self) -> int:
        """Requests that run at once, at most: ``max_seqs``, or fewer if windows of fewer fit into the memory."""
        return self._scheduler.config.max_running

    # -- life ------------------------------------------------------------------------------------------------

    def start(self, progress: Callable[[int, int], None] = lambda done, total: None) -> None:
        """Compile every step, then serve. ``progress(done, total)`` counts executables.

        An engine that serves already is left as it is.

        Raises:
            EngineDead: it has ended or is being started by another thread, or was shut down meanwhile.
            Exception: it cannot be compiled, or gets no thread; the engine is dead then.
        """
        if not self._life.compile():
            return
        try:
            self._runner.compile(progress)
            _started.add(self)
            self._life.serve()
            self._thread.start()
            self._watchdog.start()
        except BaseException as error:
            self._die(Fault("the engine did not start", error))
            raise

    def shutdown(self, grace_s: float = 30.0) -> int:
        """Refuse new requests, let running ones finish for ``grace_s`` seconds, then stop and answer the rest.

        Returns how many requests were cut off since it was first called, not those that the engine had cut by dying
        before. It may be called again, from another thread too, with less grace; it returns within the grace and
        :data:`STOP_S` seconds, even if a step hangs.

        Raises:
            ValueError: ``grace_s`` is not a number; nothing has been shut down then.
        """
        if math.isnan(grace_s):
            raise ValueError("grace_s is nan; it must be a number of seconds")
        self._life.drain()
        running = self._thread.is_alive()
        if running:
            self._life.wait_until_empty(min(grace_s, threading.TIMEOUT_MAX))
        self._post(Stop())  # a loop that is only just being started ends with it
        if running:
            limit = time.monotonic() + STOP_S
            self._thread.join(STOP_S)
            if self._thread.is_alive():
                log.error("the serving loop does not end; it is left behind")
            # It holds the engine too: the last holder lets go of the arrays, which a thread must not do while the
            # interpreter ends.
            if self._watchdog.is_alive() and self._watchdog is not threading.current_thread():
                self._watchdog.join(max(0.0, limit - time.monotonic()))
        self._die("the engine was shut down")
        return self._life.cut

    def drain(self) -> None:
        """Say from now on, in :meth:`report`, that others are to take programs; what comes all the same is served.

        What follows is :meth:`hand_over`, once the programs that come back soon have ended, and :meth:`shutdown`.
        """
        self._leaving = True

    @property
    def draining(self) -> bool:
        """Whether other replicas are to take new programs."""
        return self._leaving or not self.live

    @property
    def state(self) -> State:
        """The present state of its life cycle."""
        return self._life.state

    @property
    def live(self) -> bool:
        """Whether it accepts requests."""
        return self._life.state is State.SERVING

    @property
    def replicas(self) -> Sequence[Engine]:
        """The engines behind this face: itself."""
        return (self,)

    def watch(self, changed: Callable[[], object]) -> None:
        """Call ``changed`` after every change of :attr:`state`, in whatever thread makes it; it must not block."""
        self._life.watch(changed)

    def observe(self, ended: Observer) -> None:
        """Call ``ended`` with every request that ends, in the event loop of its caller; it must not block."""
        self._observers.append(ended)

    # -- requests, from any thread ---------------------------------------------------------------------------

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
        """Queue one request and return it as an async iterator; call it with an event loop running.

        Args:
            prompt: token ids.
            params: sampling; greedy by default.
            session: names the program. When the request ends, the program waits with its KV kept while memory allows
                (:meth:`waits` says for what); the next ``generate`` of the session resumes it. None: a program of one
                request.
            final: the program ends with this request.
            salt: programs share the KV of equal beginnings of their prompts with those of equal salt only; tenants
                that must not learn from each other's timing get one each.
            owner: whose request and session it is. Sessions of equal name and different owners have nothing in common,
                and one owner cannot fill the queue; "" is the process itself, which can.
            parent: session of the same owner in whose job this one takes part, as that of a sub-agent does.
            priority: above 0, the request starts after those of others, until it has waited for a minute. Lower values
                are 0, so that nobody gets before others.

        Raises:
            RequestError: the prompt is empty, too long, or holds ids outside the vocabulary, or another argument is
                not what it should be.
            Overloaded: ``max_queued`` requests are waiting already, or three quarters of that and this owner's share of
                all of it. (That the session has a request in progress is raised by the iterator.)
            EngineDead: not serving.
        """
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
        return self.submit(call)

    def submit(self, call: Call) -> Generation:
        """Queue a call that has been checked; see :meth:`generate`.

        Raises:
            Overloaded, EngineDead: as :meth:`generate`.
        """
        mailbox = Mailbox(asyncio.get_running_loop(), self._observers)
        self._life.accept(mailbox, call.owner)
        self._post(Submit(mailbox, call))
        return Generation(mailbox, self._cancel)

    # -- figures, from any thread: each is read at once, together they may be of different moments -------------

    @property
    def in_progress(self) -> int:
        """Requests accepted and not yet ended."""
        return self._life.in_progress

    @property
    def executables(self) -> int:
        """Number of executables that :meth:`start` has compiled."""
        return self._runner.executables

    @property
    def times(self) -> StepTimes:
        """Time that the loop has spent, by activity."""
        return self._loop.times

    @property
    def work(self) -> Work:
        """Counts of the loop's work, by step and token."""
        return self._loop.work

    @property
    def tool_waits(self) -> WaitCounts:
        """Times that programs have waited for tools, and errors of their predictions."""
        return self._predictor.waits.tools

    @property
    def human_waits(self) -> WaitCounts:
        """The same of waits for humans."""
        return self._predictor.waits.humans

    @property
    def job_times(self) -> Histogram:
        """Completion times of jobs."""
        return self._predictor.jobs

    @property
    def refused(self) -> int:
        """Requests refused because too many waited."""
        return self._life.refused

    @property
    def step_costs(self) -> StepFit:
        """Step costs on this machine, fitted to the steps taken so far."""
        return self._predictor.steps

    @property
    def transfer_costs(self) -> TransferFit:
        """Costs of moving KV to the host and back, fitted to the transfers so far."""
        return self._predictor.transfers

    def stats(self) -> SchedulerStats:
        """Counts of programs, requests and pages as of the last step."""
        return self._scheduler.stats()

    def counts(self) -> dict[str, int]:
        """Return :meth:`stats` as flat numbers.

        They are each of its fields, ``decisions`` by what and why, bytes moved, and how many ``replicas`` there are and
        serve (``live_replicas``).
        """
        return {**self.stats().flat(self.layout.bytes_of), "replicas": 1, "live_replicas": int(self.live)}

    def report(self) -> Report:
        """Say how loaded it is, for whoever places programs on replicas or changes their number.

        One that does not serve, or that :meth:`drain` was called on, says that it drains.
        """
        return replace(self._scheduler.report(time.monotonic()), draining=self.draining)

    def check(self, timeout_s: float = 60.0) -> None:
        """Raise AssertionError unless pages, programs and requests are all accounted for (for tests and debugging).

        Everything that this thread has posted before has been taken in when it returns.

        Raises:
            EngineDead: no loop runs that could answer.
            TimeoutError: it has not answered.
        """
        answer: Future[None] = Future()
        self._post(Check(answer))
        limit = time.monotonic() + timeout_s
        while not wait((answer,), min(0.05, timeout_s)).done and time.monotonic() < limit:
            if self.state not in (State.SERVING, State.DRAINING):
                raise EngineDead(f"an engine that is {self.state.value} has nothing to check")
        answer.result(0)

    # -- the loop's thread, and the one that watches it --------------------------------------------------------

    def _run(self) -> None:
        reason = "the serving loop has ended"
        try:
            reason = self._loop.run()
        except BaseException as error:  # SystemExit, too: a thread that ends in silence leaves its callers waiting
            log.critical("the serving loop failed", exc_info=True)
            reason = Fault("the serving loop failed", error)
        finally:
            self._die(reason)

    def _die(self, reason: str) -> None:
        """Enter DEAD and answer everybody who still waits, without using anything that may be broken."""
        outbox = Outbox()
        for mailbox in self._life.die(reason):
            outbox.put(mailbox, EngineDead(reason))
        outbox.deliver(lambda mailbox: True)
        self._refuse_questions(reason)

    def _watch_steps(self) -> None:
        limit = self.config.step_timeout_s
        reason = f"a step took longer than {limit:.0f} s (step_timeout_s), so the device is taken for hung"
        watch(self._thread, lambda: self._loop.turn_began, limit, lambda: self._die(reason))
