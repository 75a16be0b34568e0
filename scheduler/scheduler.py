"""The scheduler: events in, plans out.

There is no prefill phase and no decode phase (after vLLM v1): a request has *computed* tokens chasing *known* tokens.
Prefill in chunks, decode, the return from a tool and recomputation after preemption are this one case.

Steps overlap. A plan is made and dispatched before the tokens of the plan before it are known: the requests in it have
a *pending* token that only the device knows, and the plan schedules it all the same. If that token turns out to end
the request, the row was computed for nothing and its token is dropped at commit. Pages freed meanwhile may be given
away at once, because the device runs steps in the order of dispatch: a late write lands before the new owner's.
"""

from __future__ import annotations

import itertools
from collections import Counter, deque
from collections.abc import Hashable, Sequence

from .branches import Branches
from .config import SchedulerConfig, SchedulerStats
from .kv_log import KVLog
from .load import Load
from .page_shares import PageShares
from .pages import PagePool
from .placement import Report
from .plan import Plan
from .planner import Planner
from .policy import Policy
from .preparation import SUPERSEDED
from .program import Program, QueueFull, Request
from .registry import Registry
from .residency import Residency
from .transfer import HostPages, Transfer
from .view import ProgramView
from .wait import Wait
from .waits import Waits
from .windows import WindowPages

NO_TOKEN = -1
"""What a row samples if the device could not choose a token, because its logits are not finite."""


class Scheduler:
    """Decides what every step computes and where its KV lives. Single-threaded; time is passed in, in seconds."""

    def __init__(self, config: SchedulerConfig, policy: Policy):
        self.config = config
        self._policy = policy
        self.kv_log = KVLog(config.page_size) if config.kv_events else None
        """Which blocks are cached, as it changes; None: nobody listens."""
        windows = WindowPages(config.window, config.num_pages, config.page_size)
        sizes = config.num_pages - 1, config.host.size
        self._shares = PageShares(sizes, config.tenant_weights, apart=policy.tenants_share_pages)
        self._pool = PagePool(config.num_pages, windows, self.kv_log, self._shares)
        self._residency = Residency(self._pool, config.page_size, config.host, policy.strategy, self._on_loss)
        self._planner = Planner(config, policy, self._pool, self._residency)
        self._running, self._admission = self._planner.running, self._planner.admission
        self._programs = Registry(config.max_programs, self._forget, self._shares)
        self._waits = Waits(self._programs, self._residency, policy.predict)
        self._load = Load(config, policy.predict)
        self._numbers = itertools.count(1)
        self._in_flight: deque[Plan] = deque()  # plans that are not committed
        self._stops = Counter([NO_TOKEN])  # tokens that end a row: the stops of all live requests, too
        parts = (self._programs, self._waits, self._load, self._residency, self._planner)
        self.branches = Branches(config, *parts, self._numbers)
        """Forks, tails that are replaced, and programs that move."""

    # -- events ----------------------------------------------------------------------------------------------

    def submit(
        self,
        prompt: Sequence[int],
        max_tokens: int,
        stops: frozenset[int] = frozenset(),
        *,
        program: Hashable | None = None,
        owner: Hashable = "",
        final: bool = False,
        salt: bytes | None = None,
        parent: Hashable | None = None,
        priority: int = 0,
        now: float,
    ) -> Request:
        """Queue a request; of a program that waits the next one, which ends the wait.

        Args:
            prompt: token ids.
            max_tokens: tokens to sample at most.
            stops: tokens that end the request.
            program: key of its program, which is opened if there is none; of several tenants it has the tenant in
                it, so that equal session names do not meet. None: a program of this request alone.
            owner: of a program that is opened. When the table of programs is full, whoever holds the most idle
                programs loses one.
            final: the program ends with this request.
            salt: the program shares the KV of full pages with every program of equal salt (:func:`~.prefix.salted`)
                whose tokens begin alike; None: with nobody.
            parent: key of a program of the same owner, in whose job this one takes part as long as that has one. A
                program that is opened shares the KV of what it begins with in common with its parent.
            priority: above 0, the request starts after those of 0 or less, until it has waited long enough.
            now: seconds.

        Raises:
            Rejected: it can never run, or its program has another salt.
            QueueFull: too many requests wait, too many programs are live, or its program has a request already.
        """
        self.config.check_size(len(prompt), max_tokens)
        if self._admission.unstarted >= self.config.max_waiting:
            raise QueueFull(f"{self._admission.unstarted} requests are waiting; try again later")
        opened = self._programs.open(program, owner, salt, now, parent)
        request = Request(
            number=next(self._numbers),
            program=opened,
            prompt=prompt,
            max_tokens=max_tokens,
            stops=stops,
            final=final or program is None,
            submitted=now,
            page_size=self.config.page_size,
            priority=priority,
        )
        self._go_on(request, now)
        self._waits.join_job(opened, now)
        request.extend_block_hashes()
        self._programs.live[opened] = request
        self._shares.asks(opened.tenant)
        self._stops.update(stops)
        self._load.submitted(request, len(self._admission), now)
        self._planner.enqueue(request, now)
        return request

    def _go_on(self, request: Request, now: float) -> None:
        """Let a request go on from its program's last one, which ends the wait, or if it is the first, from a parent's.

        The KV that both have in common stays.
        """
        program = request.program
        if program.last is not None:
            request.wait = self._waits.end(program, now)
            self._planner.preparations.end(program, SUPERSEDED)
        else:
            self.branches.inherit(program, request.prompt)
        if program.last is not None:
            request.matches(program.last)
            self._residency.kv.trim(program, request.reusable)

    def finish(self, request: Request, reason: str, now: float) -> None:
        """End a request, wherever it is, and free or retain its pages; a second call does nothing."""
        if request.finish_reason is not None:
            return
        if request.prepares:
            self._planner.preparations.end(request.program, reason)
            return
        request.finish_reason = reason
        if request.num_pending:
            for plan in self._in_flight:
                plan.ended.append(request)
        program, job = request.program, request.program.job
        del self._programs.live[program]
        self._shares.asks_no_more(program.tenant, now)
        for token in request.stops:
            self._stops[token] -= 1
            if not self._stops[token]:
                del self._stops[token]
        if request.slot >= 0:
            self._planner.vacate(request, now)
        else:
            self._admission.remove(request)
        self._load.ended(request, now)
        program.turns += 1
        job.turns += 1
        job.output_tokens += len(request.output)
        self._policy.predict.ended(request, now)
        self._policy.ended(request, now)
        cost = job.service / job.turns
        self._programs.classify(program, self._policy.predict.service.mean(cost))
        if reason == "error":
            self._residency.invalidate(program)
        if request.final:
            self._programs.finish(program, now, failed=reason == "error")
        else:
            self._waits.begin(program, request, now)

    def waits(self, program: Hashable, wait: Wait, now: float) -> None:
        """Say what the program of a key waits for. Unknown keys, and programs with a request, are ignored."""
        found = self._programs.find(program)
        if found is not None and found in self._programs.idle:
            self._waits.tell(found, wait, now)

    def end_program(self, program: Hashable, now: float) -> Request | None:
        """End the program of a key; returns the live request that was cancelled with it. Unknown keys are ignored."""
        found = self._programs.find(program)
        if found is None:
            return None
        request = self._programs.live.get(found)
        if request is None:
            if found.wait is None or found.awaits_human:  # rather than given up, while its tools ran
                self._waits.job_over(found)
            self._programs.finish(found, now)
        else:
            request.final = True
            self.finish(request, "cancelled", now)
        return request

    def expire(self, now: float) -> None:
        """Forget programs whose wait has outlasted the session's time to live."""
        self._programs.expire(now - self.config.session_ttl_s)

    def transferred(self, transfer: Transfer, now: float, *, failed: bool = False) -> None:
        """A transfer that a plan has begun has ended; what one that failed was to bring is computed again."""
        if not failed:
            self._residency.transfer_ended(transfer, now)
            return
        request = transfer.request
        expected = request.reused if request is not None else 0
        self._residency.transfer_failed(transfer)
        if request is not None and (missing := expected - request.reused):
            self._planner.counts.reused_tokens -= missing
            self._planner.counts.recomputed_tokens += missing
            if request.preemptions == 0:
                request.cached_tokens = request.reused

    def lose_device(self, now: float) -> list[Request]:
        """The device has lost every page, because a step failed and its arrays were made anew.

        Running requests end with reason "error" and are returned. Waiting ones stay queued and compute again whatever
        no host copy has kept from their first token on. Every page is free afterwards, and every transfer under way is
        cancelled. Plans that have not been committed must not be: what they sampled is lost.
        """
        self._in_flight.clear()
        failed = list(self._running.requests)
        for request in failed:
            self.finish(request, "error", now)
        for request in self._programs.live.values():  # preempted ones may miss a token that nobody will read
            request.num_at_start = request.num_tokens
            request.matched = min(request.matched, request.num_tokens)
        self._residency.lose_device(self._programs.programs())
        self._pool.uncache_all()
        if self.kv_log is not None:
            self.kv_log.retell()
        return failed

    def stats(self) -> SchedulerStats:
        counts, residency, programs = self._planner.counts, self._residency, self._programs
        return SchedulerStats(
            running=len(self._running),
            waiting=len(self._admission),
            programs=len(programs),
            in_tool_wait=len(programs.idle) - programs.humans,
            in_human_wait=programs.humans,
            io_intensive=programs.io_intensive,
            created=programs.created,
            finished=programs.finished,
            failed=programs.failed,
            expired=programs.expired,
            moved=programs.moved,
            preemptions=counts.preemptions,
            free_pages=self._pool.free,
            retained_pages=self._pool.obtainable - self._pool.free,
            cached_pages=self._pool.cached,
            computed_tokens=counts.computed_tokens,
            reused_tokens=counts.reused_tokens,
            recomputed_tokens=counts.recomputed_tokens,
            dropped_pages=residency.kv.dropped,
            offloaded_pages=residency.moved[0],
            restored_pages=residency.moved[1],
            failed_transfers=residency.failed,
            decisions=dict(residency.kv.decisions),
            sessions=programs.named,
            programs_on_host=residency.programs_on_host,
            host_pages=residency.host_pages,
            free_windows=self._pool.windows.available,
            valid_windows=self._pool.windows.valid,
            offloaded_windows=residency.moved_windows[0],
            restored_windows=residency.moved_windows[1],
        )

    def report(self, now: float) -> Report:
        """Say how loaded it is. Any thread may ask; see :meth:`.load.Load.report`."""
        return self._load.report(self.stats(), now)

    def knows(self, program: Hashable) -> bool:
        """Whether there is a program of that key. Any thread may ask."""
        return self._programs.find(program) is not None

    def ended(self, since: float) -> list[Hashable]:
        """Keys of programs that have ended; see :meth:`.registry.Registry.ended`. Any thread may ask."""
        return self._programs.ended(since)

    def look(self, limit: int, owner: Hashable | None, now: float) -> list[ProgramView]:
        """Look at up to ``limit`` programs; see :meth:`.registry.Registry.look`."""
        return self._programs.look(limit, owner, now)

    def check(self) -> None:
        """Raise AssertionError unless pages and programs conserve (for tests and debugging; O(everything))."""
        used, programs = [r.pages for r in self._running.requests], self._programs.programs()
        self._pool.check(used + [p.pages for p in programs], used)
        self._pool.windows.check((p, p.running.pages if p.running else p.pages) for p in programs)
        self._residency.check(programs)
        self._programs.check()
        held = self._pool.held(), self._residency.held_on_host(programs)
        self._shares.check((p.tenant for p in programs), (p.tenant for p in self._programs.live), held)
        self._load.check(self._programs.live)
        self._admission.check()
        self._planner.preparations.check(self._programs.programs())
        stops = (stop for request in self._programs.live.values() for stop in request.stops)
        assert self._stops == Counter([NO_TOKEN, *stops])
        requests = [*self._programs.live.values(), *(p.preparing for p in self._programs.idle)]
        started = {r for r in requests if r is not None and r.slot >= 0}
        assert started == set(self._running.requests), "a running request is not live"
        self._running.check()

    # -- a step ----------------------------------------------------------------------------------------------

    def plan(self, now: float) -> Plan | None:
        """Plan the next step; None: nothing can run. It must be dispatched: its pages and tokens count as computed.

        Transfers that it begins are to be started even if it is None: see :meth:`take_transfers`.
        """
        self.expire(now)
        self._residency.end_leases(now)
        plan = self._planner.plan(now)
        if plan is not None:
            self._in_flight.append(plan)
            for request in plan.admitted:
                self._load.admitted(request)
        return plan

    def observe(self, plan: Plan, seconds: float) -> None:
        """Learn how long a step took, for predictions."""
        self._policy.predict.steps.observe(plan, seconds)

    def extend(self, plan: Plan, times: int) -> int:
        """Repeat a plan for up to ``times`` equal steps, as far as it can; see :meth:`.running.Running.extend`.

        Returns how many steps it stands for now.
        """
        return self._planner.extend(plan, times)

    def take_transfers(self) -> tuple[list[Transfer], list[HostPages]]:
        """Return transfers begun since the last call, in order, and host memory that may be freed after them.

        Offloads read their pages before the next step.
        """
        return self._residency.take_transfers()

    def commit(self, plan: Plan, tokens: Sequence[int], now: float) -> tuple[list[Request], Sequence[int]]:
        """Take in what the oldest plan under way sampled, ``tokens`` one per row that samples.

        Returns live requests, and the new token of each. Requests that have ended since the plan are left out. A
        request ends here if its token is a stop or its last, or ``NO_TOKEN``.

        What happens to all rows runs at the speed of C; Python looks only at rows that may begin or end.
        """
        requests, outputs, first = plan.requests[: plan.samples], plan.outputs, plan.num_decodes
        last: Sequence[int] = plan.last
        if len(tokens) != len(requests):
            raise ValueError(f"{len(tokens)} tokens for {len(requests)} rows that sample")
        if self._in_flight and self._in_flight[0] is plan:
            self._in_flight.popleft()
        if plan.ended:
            rows = zip(requests, outputs, tokens, strict=True)
            live = [row for row in rows if row[0].finish_reason is None]
            requests, outputs, tokens = [r for r, _, _ in live], [o for _, o, _ in live], [t for _, _, t in live]
            first, last = 0, range(len(live))
        elif not self._stops.keys().isdisjoint(tokens):
            last = range(len(requests))
        for request, token in zip(requests[first:], tokens[first:], strict=True):
            if not request.output and token != NO_TOKEN:
                request.first_token = now
        deque(map(list.append, outputs, tokens), maxlen=0)
        self._load.sampled(len(requests))
        for row in last:
            self._end_row(requests[row], tokens[row], now)
        return requests, tokens

    def _end_row(self, request: Request, token: int, now: float) -> None:
        """End a request if the token just added to its output is its last."""
        if token == NO_TOKEN:
            request.output.pop()
            self._load.sampled(-1)
            self.finish(request, "error", now)
        elif token in request.stops:
            self.finish(request, "stop", now)
        elif len(request.output) == request.max_tokens:
            self.finish(request, "length", now)

    def _on_loss(self, program: Program) -> None:
        request = self._programs.live.get(program)
        if request is not None:
            self._admission.outdate(request)

    def _forget(self, program: Program) -> None:
        self._planner.preparations.end(program, "cancelled")
        self._waits.forget(program)
        self._residency.forgotten(program)
        self._policy.forgotten(program)
        self._load.contexts.forget(program)
