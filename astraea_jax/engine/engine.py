"""The serving loop: take in events, plan, dispatch the step, commit the previous step's tokens.

One thread runs the loop and is the only one that touches the scheduler and the device. Everybody else posts events
to it and gets results in their own event loop. The host's work on step n, text included, happens while the device
runs step n + 1.
"""

from __future__ import annotations

import gc
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from jax.sharding import Mesh

from astraea_jax.engine.compilation import use_cache
from astraea_jax.engine.config import EngineConfig, Layout
from astraea_jax.engine.generation import Delta, Generation, Outbox, Output, Usage
from astraea_jax.engine.loading import ModelOnDevices, load_model, random_model
from astraea_jax.engine.multiprocess import make_runner
from astraea_jax.engine.runner import CompileGuard, InFlight, StepTimes
from astraea_jax.engine.sampling import SamplingParams
from astraea_jax.errors import EngineDead, Overloaded, RequestError, StartupError
from astraea_jax.kv_cache.offload import HostStore
from astraea_jax.models.checkpoint import Progress
from astraea_jax.models.decoder import Decoder
from astraea_jax.models.tokenizer import Tokenizer
from astraea_jax.scheduler.config import SchedulerConfig, SchedulerStats
from astraea_jax.scheduler.policies import make_policy
from astraea_jax.scheduler.prediction import Predictor, StepCosts
from astraea_jax.scheduler.prefix import salted
from astraea_jax.scheduler.program import QueueFull, Rejected, Request
from astraea_jax.scheduler.scheduler import Scheduler

log = logging.getLogger(__name__)

IDLE_S = 1.0
"""How often an idle loop looks for expired sessions, in seconds."""
POLL_S = 2e-4
"""How often it looks for transfers that have ended, if any are under way."""
MAX_SALT = 256
"""Characters of a cache salt."""


def owned(owner: str, session: str | None) -> str | None:
    """A session's name within those of its owner."""
    return f"{owner}\0{session}" if owner and session is not None else session


@dataclass
class _Live:
    """What the loop keeps of a live request."""

    request: Request
    generation: Generation
    params: SamplingParams
    output: Output


class Engine:
    """Serves one model. Make it, :meth:`start` it, then call :meth:`generate` from any event loop.

    Args:
        decoder: the model.
        tokenizer: from the same folder.
        config: sizes and policy.
        mesh: the devices that share the model; None: the first ``tensor_parallel`` ones, and no others are asked for.

    Raises:
        StartupError: the sizes do not fit the model or this machine.
    """

    def __init__(
        self, decoder: Decoder, tokenizer: Tokenizer, config: EngineConfig | None = None, mesh: Mesh | None = None
    ):
        self.config = config or EngineConfig()
        use_cache(self.config.compile_cache)
        if mesh is None:
            if self.config.data_parallel > 1:
                raise StartupError(
                    f"an Engine is one copy of a model, data_parallel {self.config.data_parallel} asks for more; "
                    "use astraea_jax.engine.replicas"
                )
            mesh = self.config.meshes(decoder.config)[0]
        self.model_config = decoder.config
        self.tokenizer = tokenizer
        self.layout = Layout.plan(self.config, decoder.config, mesh)
        self.times = StepTimes()
        self.live = False
        self._watchers: list[Callable[[], None]] = []
        c, layout = self.config, self.layout
        scheduler_config = SchedulerConfig(
            num_pages=layout.num_pages,
            page_size=c.page_size,
            max_seqs=c.max_seqs,
            max_step_tokens=c.max_step_tokens,
            max_context=layout.max_context,
            max_waiting=c.max_queued + c.max_seqs,
            max_programs=c.max_programs,
            session_ttl_s=c.session_ttl_s,
            host=layout.host,
        )
        self._predictor = Predictor()
        self._scheduler = Scheduler(scheduler_config, make_policy(c.policy, self._predictor, c.residency))
        self._runner = make_runner(decoder, c, layout, mesh)
        self._store: HostStore | None = None
        if layout.host.pages:
            self._store = HostStore(self._runner, self._runner.block_sharding, layout.host.staging, self._runner.put)
        self._guard = CompileGuard()
        self._events: deque[Callable[[], None]] = deque()
        self._wake = threading.Event()
        self._lock = threading.Lock()
        self._admitted = 0  # requests accepted and not yet ended; guarded by _lock
        self._requests: dict[Request, _Live] = {}
        self._by_generation: dict[Generation, _Live] = {}
        self._outbox = Outbox()
        self._step_ended = 0.0
        self._refusing: str | None = "the engine has not been started"
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="astraea-engine", daemon=True)

    @classmethod
    def from_folder(
        cls, model: str | Path, config: EngineConfig | None = None, *, progress: Progress | None = None
    ) -> Engine:
        """Load a checkpoint folder, or the bundled ``"astraea-tiny"``, without starting it."""
        return cls._of(load_model(model, config or EngineConfig(), progress), config)

    @classmethod
    def with_random_weights(cls, shape: str, config: EngineConfig | None = None) -> Engine:
        """A model of a published shape whose weights are random, for measurements; it speaks astraea-tiny's tokens.

        Raises:
            StartupError: no such shape.
        """
        return cls._of(random_model(shape, config or EngineConfig()), config)

    @classmethod
    def _of(cls, model: ModelOnDevices, config: EngineConfig | None) -> Engine:
        return cls(model.decoder, model.tokenizer, config, model.meshes[0] if len(model.meshes) == 1 else None)

    def start(self, progress: Callable[[int, int], None] = lambda done, total: None) -> None:
        """Compile every step, then start the loop. ``progress(done, total)`` counts executables."""
        self._runner.compile(progress)
        gc.collect()
        gc.freeze()  # what is loaded by now stays: collections while serving need not look through it
        self._refusing = None
        self.live = True
        self._thread.start()
        self._tell_watchers()

    @property
    def executables(self) -> int:
        """How many programs of the device :meth:`start` has compiled."""
        return self._runner.executables

    # -- called from any thread ------------------------------------------------------------------------------

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
        """Queue one request and return it as an async iterator; call it with an event loop running.

        Args:
            prompt: token ids.
            params: sampling; greedy by default.
            session: names the program. When the request ends, the program waits for its tool with its KV kept while
                memory allows; the next ``generate`` of the session resumes it. None: a program of one request.
            final: the program ends with this request.
            salt: programs share the KV of equal beginnings of their prompts with those of equal salt only; tenants
                that must not learn from each other's timing get one each.
            owner: scopes the name of the session; sessions of one name and different owners are different programs.

        Raises:
            RequestError: the prompt is empty, too long, or holds ids outside the vocabulary.
            Overloaded: ``max_queued`` requests are waiting already, or the session has one in progress.
            EngineDead: not serving.
        """
        params = params or SamplingParams()
        self._check(prompt, params)
        if len(salt) > MAX_SALT:
            raise RequestError(f"the cache salt has {len(salt)} characters; at most {MAX_SALT} are allowed")
        with self._lock:
            if self._refusing is not None:
                raise EngineDead(self._refusing)
            if self._admitted >= self.config.max_queued + self.config.max_seqs:
                raise Overloaded(f"{self._admitted} requests are in progress; try again later")
            self._admitted += 1
            generation = Generation(lambda g: self._post(partial(self._cancel, g)))
            name = owned(owner, session)
            self._post(partial(self._submit, generation, tuple(prompt), params, name, final, salted(salt)))
        return generation

    def end_session(self, session: str, *, owner: str = "") -> None:
        """End a program that waits for a tool: its KV is dropped. Unknown sessions are ignored."""
        self._post(partial(self._end_session, owned(owner, session) or session))

    def tool_called(self, session: str, tool: str, *, owner: str = "") -> None:
        """Say which tool a waiting program waits for, so that the scheduler learns its times."""
        name = owned(owner, session) or session
        self._post(lambda: self._scheduler.tool_called(name, tool, time.monotonic()))

    def watch(self, callback: Callable[[], None]) -> None:
        """Call ``callback``, in any thread, after every change of :attr:`live`."""
        self._watchers.append(callback)

    @property
    def replicas(self) -> tuple[Engine, ...]:
        """The engines behind this face: itself."""
        return (self,)

    def stats(self) -> SchedulerStats:
        """Counts of programs, requests and pages as of the last step."""
        return self._scheduler.stats()

    def counts(self) -> dict[str, int]:
        """:meth:`stats` as flat numbers: each of its fields, ``decisions`` by what and why, and bytes moved."""
        return self.stats().flat(self.layout.page_bytes)

    @property
    def in_progress(self) -> int:
        """Requests accepted and not yet ended."""
        return self._admitted

    @property
    def step_costs(self) -> StepCosts:
        """What steps cost here, fitted to those taken so far."""
        return self._predictor.costs

    def shutdown(self, grace_s: float = 30.0) -> None:
        """Refuse new requests, let running ones finish for ``grace_s`` seconds, cancel the rest, stop the loop."""
        with self._lock:
            self._refusing = "the engine is shutting down"
        if not self._thread.is_alive():
            return
        deadline = time.monotonic() + grace_s
        while self._admitted and time.monotonic() < deadline and self._thread.is_alive():
            time.sleep(0.01)
        self._post(self._stop)
        self._thread.join()

    def _check(self, prompt: Sequence[int], params: SamplingParams) -> None:
        limit, vocab = self.layout.max_context, self.model_config.vocab_size
        if not prompt:
            raise RequestError("the prompt is empty; give at least one token")
        if len(prompt) + params.max_tokens > limit:
            raise RequestError(
                f"a prompt of {len(prompt)} tokens and max_tokens {params.max_tokens} "
                f"exceed the context of {limit} tokens"
            )
        if not 0 <= min(prompt) <= max(prompt) < vocab:
            raise RequestError(f"prompt holds a token id outside the vocabulary [0, {vocab})")

    def _tell_watchers(self) -> None:
        for callback in self._watchers:
            callback()

    def _post(self, event: Callable[[], None]) -> None:
        self._events.append(event)
        self._wake.set()

    # -- the loop's thread -----------------------------------------------------------------------------------

    def _run(self) -> None:
        self._guard.arm()
        try:
            self._loop()
            self._fail_all("the engine was shut down")
            self._runner.close()
        except Exception as error:
            log.exception("the serving loop failed")
            self._fail_all(f"the serving loop failed: {error!r}")
        finally:
            self._guard.disarm()

    def _loop(self) -> None:
        in_flight: InFlight | None = None
        idle = True
        while not self._stopping:
            self._take_events(idle)
            began = time.thread_time()
            self._end_transfers()
            launched = self._launch(in_flight)
            if in_flight is not None:
                self._commit(in_flight)
            self.times.cpu_s += time.thread_time() - began
            idle = launched is None and in_flight is None
            in_flight = launched
            self._deliver()
            self._guard.check()

    def _take_events(self, idle: bool) -> None:
        if idle:
            self._wake.wait(POLL_S if self._store is not None and self._store.busy else IDLE_S)
        self._wake.clear()
        while self._events:
            self._events.popleft()()

    def _launch(self, running: InFlight | None) -> InFlight | None:
        began = time.perf_counter()
        plan = self._scheduler.plan(time.monotonic())
        planned = time.perf_counter()
        if self._store is not None:  # before the step: it may write on the pages that an offload reads
            self._store.start(*self._scheduler.take_transfers())
        if plan is None:
            return None
        for request in plan.admitted:
            self._runner.set_sampling(request.slot, self._requests[request].params)
        self.times.starved += running is None or running.done
        step = self._runner.dispatch(plan)
        self.times.steps += 1
        self.times.tokens += plan.tokens
        self.times.plan_s += planned - began
        self.times.dispatch_s += time.perf_counter() - planned
        return step

    def _end_transfers(self) -> None:
        if self._store is not None and self._store.busy:
            now = time.monotonic()
            for transfer, failed in self._store.poll():
                self._scheduler.transferred(transfer, now, failed=failed)

    def _commit(self, step: InFlight) -> None:
        began = time.perf_counter()
        tokens = self._runner.read(step)
        arrived, now = time.perf_counter(), time.monotonic()
        for request, token in self._scheduler.commit(step.plan, tokens, now):
            live = self._requests[request]
            if token < 0:
                self._end(live, RuntimeError("the model gave scores that are not finite; its weights may be damaged"))
                continue
            text = live.output.push(token)
            if live.output.stopped:
                self._scheduler.finish(request, "stop", now)
            if request.finish_reason is None:
                self._outbox.put(live.generation, Delta(text, (token,)))
            else:
                text += live.output.flush()
                reason = "stop" if live.output.stopped else request.finish_reason
                self._end(live, Delta(text, (token,), reason))
        self._scheduler.observe(step.plan, arrived - max(step.dispatched, self._step_ended))
        self._step_ended = arrived
        self.times.wait_s += arrived - began
        self.times.commit_s += time.perf_counter() - arrived

    def _submit(
        self,
        generation: Generation,
        prompt: tuple[int, ...],
        params: SamplingParams,
        session: str | None,
        final: bool,
        salt: bytes,
    ) -> None:
        eos = frozenset() if params.ignore_eos else self.tokenizer.eos_ids
        stops = eos.union(params.stop_token_ids)
        try:
            request = self._scheduler.submit(
                prompt, params.max_tokens, stops, program=session, final=final, salt=salt, now=time.monotonic()
            )
        except Rejected as error:
            self._release(generation, RequestError(str(error)))
        except QueueFull as error:
            self._release(generation, Overloaded(str(error)))
        else:
            live = _Live(request, generation, params, Output(self.tokenizer.stream(), params, stops))
            self._requests[request] = self._by_generation[generation] = live

    def _cancel(self, generation: Generation) -> None:
        live = self._by_generation.get(generation)
        if live is not None:
            self._scheduler.finish(live.request, "cancelled", time.monotonic())
            self._end(live, Delta(live.output.flush(), (), "cancelled"))

    def _end_session(self, session: str) -> None:
        request = self._scheduler.end_program(session, time.monotonic())
        if request is not None:
            live = self._requests[request]
            self._end(live, Delta(live.output.flush(), (), "cancelled"))

    def _end(self, live: _Live, last: Delta | Exception) -> None:
        del self._requests[live.request], self._by_generation[live.generation]
        live.generation.usage = Usage.of(live.request, time.monotonic())
        self._release(live.generation, last)

    def _release(self, generation: Generation, last: Delta | Exception) -> None:
        self._outbox.put(generation, last)
        with self._lock:
            self._admitted -= 1

    def _deliver(self) -> None:
        for generation in self._outbox.deliver():
            self._cancel(generation)

    def _stop(self) -> None:
        self._stopping = True

    def _fail_all(self, reason: str) -> None:
        """Sticky end: refuse from now on, and tell everybody who still waits."""
        self.live = False
        self._tell_watchers()
        with self._lock:
            self._refusing = reason
        while self._events:  # submissions that raced with the end get their error below
            self._events.popleft()()
        self._events = deque(maxlen=0)  # nobody will take any more
        for live in list(self._requests.values()):
            self._scheduler.finish(live.request, "error", time.monotonic())
            self._end(live, EngineDead(reason))
        self._deliver()
