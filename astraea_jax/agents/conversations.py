"""Recognises conversations in requests, names their programs, and continues them from their own tokens.

Clients send the whole history with every request. :meth:`Conversations.begin` finds the longest beginning of it that is
known to mean the same, which says whose next request this is; :meth:`Opened.ended` takes in the turn that was made of
it. A request that goes on from a turn that another request already continues is a program of its own, a branch.
"""

from __future__ import annotations

import itertools
import json
import threading
import time
from array import array
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from astraea_jax.agents import meaning
from astraea_jax.agents.continuity import Chat, Continuity, Mode, Prompt, Why
from astraea_jax.agents.moves import History, add_history, history_of
from astraea_jax.agents.opened import Continuation, Opened, Running
from astraea_jax.agents.plain_texts import beginnings, text_hash, text_prompt
from astraea_jax.agents.recognition import Match, best, program_of, recognise, waiting
from astraea_jax.agents.turns import OVERHEAD, Owner, Owners, Piece, Program, Turn
from astraea_jax.agents.volatile import without_volatile
from astraea_jax.errors import RequestError
from astraea_jax.models.chat import normalise_messages, plain
from astraea_jax.models.tokenizer import Tokenizer

MAX_BYTES = 2**29
MAX_TURNS = 2**16
"""Turns of one owner."""
MAX_TEXT_ENDS = 2**12
"""Lengths of known texts, the newest ones, at which the beginning of a new text is compared."""


class Conversations:
    """The conversations of all owners. All methods may be called from any thread; those that tokenise take a while.

    Args:
        tokenizer: of the model.
        mode: ``"job"`` or ``"session"``, see :class:`.continuity.Continuity`; ``"off"``: prompts are what the template
            makes of the messages, and conversations are only recognised.
        normalise: leave out what known clients change at every request (:mod:`.volatile`), unless the mode is off.
        max_bytes: bound on what all turns take.
        max_turns: bound on the turns of one owner.
        ttl_s: seconds after which an unused turn is forgotten.
        max_context: see :class:`.continuity.Continuity`.
        clock: tells seconds.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        mode: Mode = "job",
        *,
        normalise: bool = True,
        max_bytes: int = MAX_BYTES,
        max_turns: int = MAX_TURNS,
        ttl_s: float = 600.0,
        max_context: int | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.mode = mode
        self._tokenizer = tokenizer
        self.normalise = normalise and mode != "off"
        """Whether what clients change at every request is left out, unless the mode is off."""
        self._hidden = tokenizer.eos_ids | tokenizer.delimiters.keys()
        """Tokens that clients never see: a turn that goes on after one (``ignore_eos``) is not what they have."""
        self._continuity = Continuity(tokenizer, mode, max_context)
        self.owners = Owners(max_bytes, max_turns, ttl_s)
        self._clock = clock
        self._jobs = itertools.count(1)
        self._lock = threading.Lock()
        self._dropped: deque[Running] = deque()
        """Requests that nobody holds any more; a queue, since they may be dropped in any thread at any time."""

    def begin(
        self,
        owner: str,
        session: str | None,
        messages: Sequence[Any],
        tools: Sequence[Any] | None = None,
        template_arguments: Mapping[str, Any] | None = None,
    ) -> Opened:
        """Open a request for the next turn of a conversation.

        Args:
            owner: whose conversations these are; those of others are never seen.
            session: the client's name for it; None: it is recognised by its content alone.
            messages: as in :meth:`astraea_jax.models.tokenizer.Tokenizer.render`.
            tools: in the same way.
            template_arguments: in the same way.

        Raises:
            CheckpointError, TypeError, ValueError: as :meth:`~astraea_jax.models.tokenizer.Tokenizer.render`.
        """
        given = normalise_messages(messages)
        given, places = self._stable(given)
        digests = meaning.digests(given)
        tools, arguments = plain(tools), plain(template_arguments or {})
        with self._lock:
            state = self._owner(owner)
            match = recognise(state, session, given, digests)
            running = self._run(state, program_of(state, session, match.turn), match.turn)
        turn, program = running.turn, running.program
        end = 0 if turn is None else turn.end
        goes_on = turn is not None and meaning.answers_calls(given[end:])
        job = turn.job if turn is not None and goes_on else next(self._jobs)
        try:
            prompt = self._prompt(Chat(self._as_known(given, match), tools, arguments), match, job)
            ids, size = array("i", prompt.ids[prompt.new :]), OVERHEAD + len(repr(given[end:]))
            size += sum(piece.size for piece in prompt.fresh)
            setting = json.dumps([tools, arguments])
            if turn is not None and turn.program.setting == setting:
                setting = turn.program.setting  # one text for all of them
            else:
                size += len(setting)
        except BaseException:
            self._end(running)
            raise
        program.setting = setting

        def ended(output_ids: Sequence[int], message: Any, whole: bool) -> None:
            new = None
            if message is not None:
                answers = normalise_messages([message])
                chain = (*digests[end:], meaning.extended(digests[-1], answers[0]))
                piece = self._piece(prompt, ids, output_ids, len(given) + 1, job, whole)
                said = (*given[end:], *answers)
                new = Turn(chain[-1], turn, said, chain, len(given) + 1, program, job, piece, size=size)
            self._end(running, new)

        return Opened(
            running, _report(prompt, match, places), not goes_on, ended, partial(self._dropped.append, running)
        )

    def look(
        self,
        owner: str,
        session: str | None,
        messages: Sequence[Any],
        tools: Sequence[Any] | None = None,
        template_arguments: Mapping[str, Any] | None = None,
    ) -> tuple[Continuation, str | None]:
        """Say how a request would continue if it came now, and in which program; None: in a new one.

        Args and Raises: as :meth:`begin`.
        """
        given = normalise_messages(messages)
        given, places = self._stable(given)
        with self._lock:
            match = recognise(self._owner(owner), session, given, meaning.digests(given))
            program = waiting(session, match.turn)
        turn = match.turn
        job = turn.job if turn is not None and meaning.answers_calls(given[turn.end :]) else 0  # that of no turn
        chat = Chat(match.restored(given), plain(tools), plain(template_arguments or {}))
        return _report(self._prompt(chat, match, job), match, places), None if program is None else program.name

    def _stable(self, messages: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[int]]:
        """Return the messages that are compared and rendered, and the place of each among those that were given."""
        if self.normalise:
            return without_volatile(messages)
        return messages, [*range(len(messages))]

    def begin_text(self, owner: str, session: str | None, text: str, add_bos: bool = True) -> Opened:
        """Open a request for what follows a text, which may begin with the text of earlier requests and their answers.

        Args:
            owner: as in :meth:`begin`.
            session: in the same way.
            text: the prompt.
            add_bos: as in :meth:`astraea_jax.models.tokenizer.Tokenizer.encode`.

        Raises:
            ValueError: as :meth:`~astraea_jax.models.tokenizer.Tokenizer.encode`.
        """
        with self._lock:
            state = self._owner(owner)
            newest = itertools.islice(reversed(state.text_ends), MAX_TEXT_ENDS)
            ends = sorted(end for end in newest if end <= len(text))
        digests = beginnings(text, ends, add_bos)
        with self._lock:
            state = self._owner(owner)
            turn = next((found for digest in reversed(digests) if (found := best(state.at(digest), session))), None)
            running = self._run(state, program_of(state, session, turn), turn)
        job = next(self._jobs) if turn is None else turn.job
        try:
            prompt = text_prompt(self._tokenizer, text, add_bos, None if self.mode == "off" else turn)
            ids = array("i", prompt.ids[prompt.new :])
        except BaseException:
            self._end(running)
            raise

        def ended(output_ids: Sequence[int], message: Any, whole: bool) -> None:
            new = None
            if message is not None:
                digest = text_hash(text + message, add_bos).digest()
                end = len(text) + len(message)
                piece = self._piece(prompt, ids, output_ids, end, job, whole)
                new = Turn(digest, turn, (), (), end, running.program, job, piece, plain=True)
            self._end(running, new)

        why: Why = "off" if self.mode == "off" else prompt.why
        report = Continuation(prompt.ids, prompt.kept, None, why)
        return Opened(running, report, turn is None, ended, partial(self._dropped.append, running))

    def fork(self, owner: str, session: str, child: str) -> None:
        """Let a new session begin where another one is: its first request branches from there.

        Raises:
            RequestError: the session is not known or has expired, or the child is known already.
        """
        with self._lock:
            state = self._owner(owner)
            tip = _tip(state, session)
            if child in state.programs:
                raise RequestError(f"the session {child!r} exists already; fork into one with another name")
            program = program_of(state, child, tip)
            state.add(Turn(tip.digest, tip, (), (), tip.end, program, tip.job, None, used=self._clock()))
            self.owners.bound(state)

    def programs(self, owner: str, session: str) -> list[str]:
        """Return the names of the programs of a session."""
        with self._lock:
            return [program.name for program in self._owner(owner).of_session(session)]

    def forget(self, owner: str, session: str) -> list[str]:
        """Forget the conversations of a session; what branches of other sessions share stays with them.

        Returns:
            The names of its programs.
        """
        with self._lock:
            state = self._owner(owner)
            programs = state.of_session(session)
            state.forget(programs)
            self.owners.settle(state)
        return [program.name for program in programs]

    def let_go(self, scope: str, name: str) -> History | None:
        """Forget a program that moves to another process; returns what that goes on with, None if it is not known.

        Args:
            scope: the beginning of its owner's name.
            name: of the program.
        """
        with self._lock:
            for state in self.owners.all(scope):
                program = state.programs.get(name)
                if program is not None and not program.busy and (history := history_of(state, program)) is not None:
                    state.forget([program])
                    self.owners.settle(state)
                    return history
        return None

    def take_over(self, history: History) -> None:
        """Go on with a program of another process, unless it has come back already and is known here."""
        with self._lock:
            state = self._owner(history.owner)
            if history.program not in state.programs and history.turns:
                self.owners.keep(state)
                add_history(state, history, self._jobs, self._clock())
                self.owners.bound(state)

    def replace(self, owner: str, session: str, keep_messages: int, messages: Sequence[Any]) -> list[int]:
        """Replace the end of a session's history, for example by a summary.

        Args:
            owner: as in :meth:`begin`.
            session: in the same way.
            keep_messages: how many messages at its beginning stay as they are.
            messages: come after these, instead of all others.

        Returns:
            The tokens with which the prompt of a request begins that continues the new history.

        Raises:
            RequestError: the session is not known, has expired, runs a request, or has fewer messages.
            CheckpointError, TypeError, ValueError: as :meth:`begin`.
        """
        new = normalise_messages(messages) if messages or not keep_messages else []
        with self._lock:
            state = self._owner(owner)
            tip = _tip(state, session)
            program = tip.program
            old = [message for turn in tip.history() for message in turn.messages]
            if program.busy:
                raise RequestError(f"the session {session!r} runs a request; replace its history between two requests")
            if tip.plain:
                raise RequestError("the history has 0 messages: its requests were plain text; give tokens instead")
            if not 0 <= keep_messages <= len(old):
                raise RequestError(f"keep is {keep_messages}; the history has {len(old)} messages")
            given = [*old[:keep_messages], *new]
            digests = meaning.digests(given)
            match = recognise(state, session, given, digests)
            running = self._run(state, program, match.turn)
        turn, marker = match.turn, None
        end = 0 if turn is None else turn.end
        try:
            chat = Chat(self._as_known(given, match), program.tools, program.template_arguments)
            prompt = self._prompt(chat, match, tip.job, generation_prompt=False)
            said, size = tuple(given[end:]), OVERHEAD + len(repr(given[end:]))
            marker = Turn(digests[-1], turn, said, tuple(digests[end:]), len(given), program, tip.job, None, size=size)
        finally:
            self._end(running, marker)
        return prompt.ids

    def _owner(self, name: str) -> Owner:
        while self._dropped:
            self._finish(self._dropped.popleft(), None)
        return self.owners.get(name, self._clock())

    def _run(self, owner: Owner, program: Program, turn: Turn | None) -> Running:
        self.owners.keep(owner)
        program.busy = True
        if turn is not None:
            owner.hold(turn)
        return Running(owner, program, turn)

    def _end(self, running: Running, turn: Turn | None = None) -> None:
        with self._lock:
            self._finish(running, turn)

    def _finish(self, running: Running, turn: Turn | None) -> None:
        owner, program, now = running.owner, running.program, self._clock()
        program.busy = False
        if turn is not None and owner.programs.get(program.name) is program:
            turn.used = now
            owner.add(turn)
        if running.turn is not None:
            owner.release(running.turn, now)
        owner.settle(program)
        self.owners.bound(owner)

    def _as_known(self, messages: list[dict[str, Any]], match: Match) -> Sequence[meaning.Message]:
        return messages if self.mode == "off" else match.restored(messages)

    def _prompt(self, chat: Chat, match: Match, job: int, *, generation_prompt: bool = True) -> Prompt:
        if self.mode != "off":
            return self._continuity.prompt(chat, match.turns, job, generation_prompt=generation_prompt)
        return Prompt(self._tokenizer.encode_rendered(self._continuity.rendered(chat, generation_prompt)), "off")

    def _piece(
        self, prompt: Prompt, ids: array[int], output_ids: Sequence[int], end: int, job: int, whole: bool
    ) -> Piece | None:
        if self.mode == "off":
            return None
        whole = whole and self._hidden.isdisjoint(output_ids[:-1])
        stop = self._continuity.stop_of(output_ids) if whole else None
        every = ids + array("i", output_ids)
        return Piece(prompt.base, prompt.text, every, stop, end, job, whole, undo=prompt.undo)


def _tip(owner: Owner, session: str) -> Turn:
    program = owner.programs.get(session)
    if program is None or program.tip is None:
        raise RequestError(f"the session {session!r} is not known, or has expired")
    return program.tip


def _report(prompt: Prompt, match: Match, places: Sequence[int]) -> Continuation:
    why, message = prompt.why, prompt.message
    if why in ("new", "same") and match.differs is not None:
        why, message = "messages", match.differs
    return Continuation(prompt.ids, prompt.kept, None if message is None else places[message], why)
