"""Branches of a program's history: forks, tails replaced in a wait, what another request would find, and moves."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Sequence
from itertools import islice

from .config import SchedulerConfig
from .handover import HandOver
from .load import Load
from .planner import Planner
from .preparation import SUPERSEDED
from .program import Program, Request
from .registry import Registry
from .residency import Residency
from .view import Held
from .waits import Waits


class Branches:
    """Lets histories part without computing again what they have in common.

    Args:
        config: sizes.
        programs: the table of programs.
        waits: begins the wait of a fork.
        load: counts contexts.
        residency: where the KV of programs lies.
        planner: runs the requests that compute a tail.
        numbers: numbers of requests, in the order in which they come.
    """

    def __init__(
        self,
        config: SchedulerConfig,
        programs: Registry,
        waits: Waits,
        load: Load,
        residency: Residency,
        planner: Planner,
        numbers: Iterator[int],
    ):
        self._config, self._programs, self._waits, self._load = config, programs, waits, load
        self._residency, self._preparations, self._numbers = residency, planner.preparations, numbers

    def fork(self, program: Hashable, child: Hashable, now: float) -> None:
        """Open a program that has computed what the program of a key has, shares its KV, and waits, too.

        The child has its parent's owner and salt, and takes part in its job. From then on each goes on, and ends, by
        itself. Of a parent that runs, the child has the full pages that are computed by now.

        Raises:
            Rejected: there is no such program, or the child's key is taken.
            QueueFull: there are too many programs, and no other one that could make room.
        """
        parent, fork = self._programs.fork(program, child, now)
        request = parent.running or parent.last
        if request is None:  # it has not started yet
            request = fork.last = self._programs.live[parent]
        else:
            self._residency.kv.share(parent, request, fork)
        self._load.waiting(fork, request, now)
        self._waits.forked(fork, parent, now)

    def inherit(self, program: Program, prompt: Sequence[int]) -> None:
        """Let a program that has just been opened begin with what its parent has of its first prompt.

        A parent of another owner or salt has nothing for it.
        """
        parent = self._programs.find(program.parent) if program.parent is not None else None
        if parent is None or (parent.owner, parent.salt) != (program.owner, program.salt):
            return
        request = parent.running or parent.last
        if request is not None and (shared := request.shared_with(prompt)):
            self._residency.kv.share(parent, request, program)
            program.computed = min(program.kept, shared)

    def replace_tail(
        self, program: Hashable, prompt: Sequence[int], *, salt: bytes | None = None, now: float
    ) -> Request:
        """Let a program that waits compute its next prompt ahead, while nobody else needs the device.

        Its wait goes on. The request samples nothing; when it has a ``finish_reason``, it is one of those that
        :meth:`take_prepared` returns. Until it starts, the program keeps what it has; from then on, what the two
        prompts have in common, and what has been computed after that.

        Raises:
            Rejected: the prompt is too long, there is no such program, or it has another salt.
            QueueFull: the program has a request.
        """
        self._config.check_size(len(prompt), 1)
        found = self._programs.waiting(program, salt)
        self._preparations.end(found, SUPERSEDED)
        return self._prepare(found, prompt, now)

    def _prepare(self, program: Program, prompt: Sequence[int], now: float) -> Request:
        request = Request(
            number=next(self._numbers),
            program=program,
            prompt=prompt,
            max_tokens=0,
            stops=frozenset(),
            final=False,
            submitted=now,
            page_size=self._config.page_size,
        )
        self._match(request)
        program.last = program.last or request
        self._preparations.add(request)
        return request

    def hand_over(self, limit: int, programs: Iterable[Hashable] | None = None) -> list[HandOver]:
        """Let up to ``limit`` waiting programs go, so that another replica goes on with them.

        Programs without a key stay: nobody can go on with them. Nothing is learned from the jobs of those that go.

        Args:
            limit: how many go at most.
            programs: keys of those that go; None: whoever waits, and first whose wait began last.
        """
        idle = self._programs.idle
        if programs is None:
            leaving = [program for program in islice(idle.latest(None), limit) if program.key is not None]
        else:
            found = map(self._programs.find, islice(dict.fromkeys(programs), limit))
            leaving = [program for program in found if program is not None and program in idle]
        handed = []
        for program in leaving:
            last = program.preparing or program.last
            tokens = () if last is None else (*last.prompt, *last.output)
            handed.append(HandOver(program.key, program.owner, program.salt, tokens, program.parent))
            program.job.ended |= program.leads
            self._programs.leave(program)
        return handed

    def take_over(self, handed: HandOver, now: float) -> Request:
        """Open a program that another replica has handed over: it waits, and its tokens are computed in idle time.

        Returns:
            The request that computes them, as :meth:`replace_tail` does.

        Raises:
            Rejected: its tokens are too many or none, or its key is taken: it has come back already.
            QueueFull: there are too many programs, and none that could make room.
        """
        self._config.check_size(len(handed.tokens), 1)
        program = self._programs.add(handed.key, handed.owner, handed.salt, now, handed.parent)
        request = self._prepare(program, handed.tokens, now)
        self._load.waiting(program, request, now)
        self._waits.taken_over(program, now)
        return request

    def take_prepared(self) -> list[Request]:
        """Requests of :meth:`replace_tail` that have ended since the last call."""
        return self._preparations.take_ended()

    def held(
        self,
        prompt: Sequence[int],
        block_hashes: Sequence[bytes] = (),
        *,
        program: Hashable | None = None,
        salt: bytes | None = None,
    ) -> Held:
        """Count what a request would find computed if it came now.

        Args:
            prompt: token ids.
            block_hashes: of its first full pages, as far as they are known.
            program: key of the program that would ask. One that is not known, has another salt or runs has nothing of
                its own.
            salt: as for :meth:`.scheduler.Scheduler.submit`.
        """
        found = self._programs.find(program) if program is not None else None
        if found is None or found.salt != salt or found.running is not None:
            found = Program(0, 0.0, salt=salt)
        request = Request(0, found, prompt, 1, frozenset(), False, 0.0, self._config.page_size)
        request.block_hashes = list(block_hashes)
        self._match(request)
        return Held(len(prompt), request.matched, *self._residency.held(request))

    def _match(self, request: Request) -> None:
        if request.program.last is not None:
            request.matches(request.program.last)
        request.extend_block_hashes()
