"""The serving loop: take in events, plan, dispatch the step, commit the previous step's tokens.

One thread runs it and is the only one that touches the scheduler and the device. The host's work on step n, text
included, happens while the device runs step n + 1.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import time
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from typing import TypeVar, assert_never

import numpy as np

from astraea_jax.engine.answers import answer, refusal
from astraea_jax.engine.compilation import CompileGuard
from astraea_jax.engine.dispatch import InFlight, StepRunner
from astraea_jax.engine.events import Cancel, Check, EndSession, Event, Question, ReplaceTail, Stop, Submit, Waits
from astraea_jax.engine.extras import Collector, GrammarFault, Tracker, token_logprob
from astraea_jax.engine.generation import Delta, Mailbox, Outbox, TokenLogprob, Usage
from astraea_jax.engine.lifecycle import Lifecycle, State
from astraea_jax.engine.live import Live, LiveRequests
from astraea_jax.engine.output import Output
from astraea_jax.engine.sampling import SamplingParams
from astraea_jax.engine.times import StepTimes, Work
from astraea_jax.errors import EngineDead, Fault, RequestError, StepFailed
from astraea_jax.kv_cache.offload import HostStore
from astraea_jax.models.tokenizer import Tokenizer
from astraea_jax.scheduler.prefix import salted
from astraea_jax.scheduler.program import QueueFull, Rejected, Request
from astraea_jax.scheduler.scheduler import Scheduler

log = logging.getLogger(__name__)

IDLE_S = 1.0
"""Seconds after which an idle loop looks for expired sessions."""
POLL_S = 2e-4
"""Seconds after which an idle loop looks for transfers that have ended, if any are under way."""
MAX_FAILURES = 3
"""Steps that may fail in a row, before the device is taken for broken."""

GREEDY = SamplingParams()
"""Of rows that sample nothing, which it costs least."""

A = TypeVar("A")
T = TypeVar("T")


class _DeviceError(Exception):
    """A call into the device has raised; the cause says what."""


class ServingLoop:
    """Everything that the serving thread owns; :meth:`run` is that thread.

    Args:
        scheduler: decides what every step computes.
        runner: computes it.
        store: the host tier; None: there is none.
        tokenizer: turns tokens into text.
        lifecycle: says whether to go on, and who still waits for an answer.
        vocab_size: tokens that the model tells apart.
        turned: called at the end of every turn.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        runner: StepRunner,
        store: HostStore | None,
        tokenizer: Tokenizer,
        lifecycle: Lifecycle,
        vocab_size: int,
        turned: Callable[[], object],
    ):
        self.events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        """Events posted by any thread. A SimpleQueue, because a destructor may post while another post is under way."""
        self.times = StepTimes()
        self.work = Work()
        self.turn_began: float | None = None
        """Time at which the present turn began, by ``time.monotonic``; None while the loop waits for events."""
        self._scheduler, self._runner, self._store = scheduler, runner, store
        self._tokenizer, self._life, self._vocab_size, self._turned = tokenizer, lifecycle, vocab_size, turned
        self._guard = CompileGuard()
        self._live = LiveRequests()
        self._outbox = Outbox()
        self._step_ended = 0.0
        self._failures = 0
        self._stopping = False

    def run(self) -> str:
        """Serve until :class:`Stop` comes or the engine has died; returns why it ended.

        Raises:
            BaseException: the loop itself, or the device, is broken.
        """
        self._guard.arm()
        try:
            in_flight: InFlight | None = None
            idle = True
            while not (self._stopping or self._life.state is State.DEAD):
                self._take_events(idle)
                launched = self._turn(in_flight)
                idle = launched is None and in_flight is None
                in_flight = launched
                self.turn_began = None
            self.turn_began = time.monotonic()
            if in_flight is not None:  # or the device's threads would let go of our arrays while the process ends
                with contextlib.suppress(_DeviceError):
                    _on_device(self._runner.read, in_flight)
            self._runner.close()
            self.turn_began = None
        finally:
            self._outbox.deliver(self._life.end)  # what has ended in a turn that did not
            self._guard.disarm()
        return "the engine was shut down"

    def _turn(self, in_flight: InFlight | None) -> InFlight | None:
        """Launch a step and commit the one before it; returns the step launched.

        What some rows need beyond plain sampling depends on the tokens just committed, so it is seen to last, while the
        forward of the step runs.
        """
        launched = None
        try:
            began = time.thread_time()
            self._end_transfers()
            launched = self._launch(in_flight)
            if in_flight is not None:
                self._commit(in_flight)
            if launched is not None:
                launched = self._resample(launched)
            self._guard.check()
            self.times.cpu_s += time.thread_time() - began
        except _DeviceError as error:
            self._start_over(error)
            launched = None
        self._turned()
        self._end_prepared()
        for mailbox in self._outbox.deliver(self._life.end):
            self._cancel(mailbox)
        return launched

    # -- events ----------------------------------------------------------------------------------------------

    def _take_events(self, idle: bool) -> None:
        """Take in what has been posted by now, and begin a turn.

        What is posted meanwhile waits for the next turn, or else callers could keep the loop from its steps.
        """
        moving = self._store is not None and self._store.busy
        first = []
        if idle:
            with contextlib.suppress(queue.Empty):
                first.append(self.events.get(timeout=POLL_S if moving else IDLE_S))
        self.turn_began = time.monotonic()
        for event in first:
            self._handle(event)
        for _ in range(self.events.qsize()):
            self._handle(self.events.get_nowait())

    def _handle(self, event: Event) -> None:
        now = time.monotonic()
        match event:
            case Submit():
                self._submit(event, now)
            case Cancel(mailbox):
                self._cancel(mailbox)
            case EndSession(session):
                if (request := self._scheduler.end_program(session, now)) is not None:
                    self._end_cancelled(self._live[request])
            case Waits(session, wait):
                self._scheduler.waits(session, wait, now)
            case Check(asked):
                self._check(asked)
            case ReplaceTail():
                self._replace_tail(event, now)
            case Question():
                answer(event, self._scheduler, now)
            case Stop():
                self._stopping = True
            case _:
                assert_never(event)

    def _submit(self, event: Submit, now: float) -> None:
        call, mailbox, params = event.call, event.mailbox, event.call.params
        eos = frozenset() if params.ignore_eos else self._tokenizer.eos_ids
        stops = eos.union(params.stop_token_ids)
        try:
            tracker = None if params.plain else Tracker(params, call.prompt, stops, self._vocab_size)
            request = self._scheduler.submit(
                call.prompt,
                params.max_tokens,
                stops,
                program=call.session,
                owner=call.owner,
                final=call.final,
                salt=salted(call.salt),
                parent=call.parent,
                priority=call.priority,
                now=now,
            )
        except (Rejected, QueueFull) as error:
            self._outbox.put(mailbox, refusal(error))
        except GrammarFault as error:
            log.error("a request fails", exc_info=error)
            self._outbox.put(mailbox, StepFailed(str(error)))
        else:
            self._live.add(Live(request, mailbox, params, Output(self._tokenizer.stream(), params, stops), tracker))

    def _replace_tail(self, event: ReplaceTail, now: float) -> None:
        replace_tail, mailbox = self._scheduler.branches.replace_tail, event.mailbox
        try:
            request = replace_tail(event.session, event.prompt, salt=salted(event.salt), now=now)
        except (Rejected, QueueFull) as error:
            self._outbox.put(mailbox, refusal(error))
        else:
            output = Output(self._tokenizer.stream(), GREEDY, frozenset())
            self._live.add(Live(request, mailbox, GREEDY, output, None))

    def _cancel(self, mailbox: Mailbox) -> None:
        live = self._live.of(mailbox)
        if live is not None:
            self._scheduler.finish(live.request, "cancelled", time.monotonic())
            self._end_cancelled(live)

    def _check(self, answer: Future[None]) -> None:
        try:
            self._scheduler.check()
            self._live.check(self._life.in_progress)
        except AssertionError as error:
            answer.set_exception(error)
        else:
            answer.set_result(None)

    # -- steps -----------------------------------------------------------------------------------------------

    def _launch(self, running: InFlight | None) -> InFlight | None:
        began = time.perf_counter()
        plan = self._scheduler.plan(time.monotonic())
        planned = time.perf_counter()
        transfers, dropped = self._scheduler.take_transfers()
        if self._store is not None:  # before the step: it may write on the pages that an offload reads
            self._store.start(transfers, dropped)
        if plan is None:
            return None
        for request in plan.admitted:
            live = self._live.get(request)  # nobody waits for what computes a session that has been taken over
            self._runner.set_sampling(request.slot, GREEDY if live is None else live.params)
            if live is not None:
                self._life.started(live.mailbox)
            if request.preemptions == 0 and not request.prepares:
                self.work.prompt_tokens += len(request.prompt)
                self.work.cached_tokens += request.cached_tokens
        self.times.starved += running is None or running.done
        step = _on_device(self._runner.dispatch, plan)
        self.times.steps += 1
        self.times.tokens += plan.tokens
        self.times.plan_s += planned - began
        self.work.planned(plan.tokens, planned - began)
        self.times.dispatch_s += time.perf_counter() - planned
        return step

    def _end_transfers(self) -> None:
        if self._store is not None and self._store.busy:
            now = time.monotonic()
            for transfer, failed in self._store.poll():
                self._scheduler.transferred(transfer, now, failed=failed)

    def _commit(self, step: InFlight) -> None:
        began = time.perf_counter()
        tokens = _on_device(self._runner.read, step)
        self._failures = 0
        arrived, now = time.perf_counter(), time.monotonic()
        logprobs = {} if step.logprobs is None else self._logprobs(step, tokens)
        took = arrived - max(step.dispatched, self._step_ended)
        requests, new = self._scheduler.commit(step.plan, tokens, now)
        for request, token in zip(requests, new, strict=True):
            self._push(self._live[request], token, logprobs.get(request, ()), now)
        self._scheduler.observe(step.plan, took)
        self.work.committed(len(requests), took)
        self._step_ended = arrived
        self.times.wait_s += arrived - began
        self.times.commit_s += time.perf_counter() - arrived

    def _resample(self, step: InFlight) -> InFlight:
        """Have those rows drawn again that need more than plain sampling."""
        if not self._live.trackers:
            return step
        began, collector = time.perf_counter(), Collector(self._vocab_size)
        for row, request in enumerate(step.plan.requests[: step.plan.samples]):
            live = self._live.get(request)
            if live is not None and live.tracker is not None:
                try:
                    collector.add(row, live.tracker)
                except GrammarFault as error:
                    self._fail(live, error)
        extras = collector.collected()
        if extras is not None:
            step = _on_device(partial(self._runner.resample, step), extras)
        self.times.resample_s += time.perf_counter() - began
        return step

    def _logprobs(self, step: InFlight, tokens: list[int]) -> dict[Request, tuple[TokenLogprob]]:
        """The log-probabilities that requests of the step have asked for."""
        reported, found = _on_device(np.asarray, step.logprobs), {}
        for request, token, row in zip(step.plan.requests, tokens, reported, strict=False):  # some do not sample
            live = self._live.get(request)
            if live is not None and live.params.logprobs is not None:
                found[request] = (token_logprob(row, token, live.params.logprobs),)
        return found

    def _push(self, live: Live, token: int, logprobs: tuple[TokenLogprob, ...], now: float) -> None:
        """Hand the caller a token that has been committed."""
        request, output = live.request, live.output
        if token < 0:
            self._end(live, StepFailed("the model gave logits that are not finite; its weights may be damaged"))
            return
        try:
            text = output.push(token)
            complete = live.tracker is not None and token not in request.stops and live.tracker.push(token)
            if output.stopped or complete:
                self._scheduler.finish(request, "stop", now)
            if request.finish_reason is None:
                self._outbox.put(live.mailbox, Delta(text, (token,), None, logprobs))
                return
            text += output.flush()
        except GrammarFault as error:
            self._fail(live, error)
            return
        except Exception as error:  # the tokenizer's, so it is this request's alone
            log.exception("tokens cannot be turned into text")
            self._scheduler.finish(request, "error", now)
            self._end(live, StepFailed(Fault("the tokens cannot be turned into text", error)))
            return
        reason = "stop" if output.stopped or complete else request.finish_reason
        self._end(live, Delta(text, (token,), reason, logprobs, output.stop))

    def _start_over(self, error: _DeviceError) -> None:
        """After a step has raised: end what was running, and begin again with empty pages.

        What a failed computation was to write is unusable, the KV of all programs among it, so this holds on to
        nothing that is on the device. Waiting requests, programs and host copies stay.

        Raises:
            Exception: it has happened too often in a row, or the device is gone.
        """
        self._failures += 1
        if self._failures >= MAX_FAILURES or isinstance(error.__cause__, EngineDead):
            raise error.__cause__ or error
        log.error("a step failed; what was running ends with an error", exc_info=error.__cause__)
        for request in self._scheduler.lose_device(time.monotonic()):
            if (live := self._live.get(request)) is not None:
                self._end(live, StepFailed(Fault("the step failed, try again", error.__cause__)))
        transfers, dropped = self._scheduler.take_transfers()
        if self._store is not None:
            self._store.abandon(dropped)
        del transfers  # those begun by the plan that failed: the scheduler has cancelled them
        self._runner.reset()
        self._guard.compiled.clear()  # filling the arrays may have compiled something

    # -- ends ------------------------------------------------------------------------------------------------

    def _end_cancelled(self, live: Live) -> None:
        try:
            text = live.output.flush()
        except Exception:
            log.exception("tokens cannot be turned into text")
            text = ""
        self._end(live, Delta(text, (), "cancelled"))

    def _end_prepared(self) -> None:
        """Answer those whose next prompt was to be computed ahead and is, or never will be."""
        for request in self._scheduler.branches.take_prepared():
            if (live := self._live.get(request)) is not None:
                ended = RequestError("this session has ended or has expired, and with it what was prepared for it")
                reason = request.finish_reason
                self._end(live, ended if reason == "cancelled" else Delta("", (), reason))

    def _fail(self, live: Live, error: GrammarFault) -> None:
        log.error("a request fails", exc_info=error)
        self._scheduler.finish(live.request, "error", time.monotonic())
        self._end(live, StepFailed(str(error)))

    def _end(self, live: Live, last: Delta | Exception) -> None:
        self._live.remove(live)
        request = live.request
        live.mailbox.usage = Usage.of(request, time.monotonic())
        live.mailbox.program = request.program.number, request.restore_s
        self._outbox.put(live.mailbox, last)


def _on_device(act: Callable[[A], T], argument: A) -> T:
    try:
        return act(argument)
    except Exception as error:
        raise _DeviceError from error
