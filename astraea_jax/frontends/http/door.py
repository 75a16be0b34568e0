"""Begins turns on an engine: checks a request, makes its prompt, and queues it.

A conversation that ends with the assistant's own message is refused: continuing it (prefill) is not served.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any

from astraea_jax.agents.formats import CallFormat
from astraea_jax.agents.reply import ReplyReader
from astraea_jax.agents.tools import Tool
from astraea_jax.engine.encoding import check_length, checked_ids
from astraea_jax.engine.grammar import GrammarCompiler
from astraea_jax.engine.interface import Serving
from astraea_jax.engine.pacing import Pace
from astraea_jax.engine.sampling import Grammar, SamplingParams
from astraea_jax.engine.tenant_weights import parsed
from astraea_jax.errors import EngineDead, Overloaded, RequestError
from astraea_jax.frontends import logs
from astraea_jax.frontends.http.constraints import Constraints
from astraea_jax.frontends.http.errors import NotFound
from astraea_jax.frontends.http.tool_turns import ToolTurn
from astraea_jax.frontends.http.turns import (
    MAX_CHOICES,
    About,
    ChatRequest,
    ModelTurn,
    PlainReader,
    Reader,
    Request,
    TextRequest,
    Turn,
    reply_message,
    short_call_id,
)
from astraea_jax.frontends.http.usage import account_of
from astraea_jax.frontends.http.waiting import Limits, Waiting
from astraea_jax.frontends.programs import End, Opening, Programs
from astraea_jax.frontends.sessions import Sessions

TAIL = 64
"""Tokens at the end of a prompt that are decoded to see whether it has opened a thought."""


class Door:
    """Begins turns; every API goes through the same one. All of it runs in the server's event loop.

    Args:
        engine: serves the turns.
        call_format: how the model writes calls and thoughts.
        names: names of the model; the first one is its own.
        limits: bounds on what waits.
        defaults: sampling parameters that count where a client gives none.
        tools: the server's own; see :mod:`.tool_turns`.
        grammars: compiles what requests constrain their text by; one of its own by default.
        programs: names the programs of turns and continues them; shared with other doors of the engine.
    """

    def __init__(
        self,
        engine: Serving,
        call_format: CallFormat,
        names: Sequence[str],
        limits: Limits | None = None,
        defaults: Mapping[str, Any] | None = None,
        tools: Sequence[Tool] = (),
        grammars: GrammarCompiler | None = None,
        programs: Programs | None = None,
    ):
        limits = limits or Limits()
        config = engine.config
        self.engine = engine
        self.names = tuple(names)
        self.defaults = dict(defaults or {})
        self.draining = False
        """Set when the server is shutting down: nothing begins any more."""
        self.waiting = Waiting(
            limits.choices or config.data_parallel * (config.max_queued + config.max_seqs),
            limits.tokens or 64 * engine.layout.max_context,
            parsed(config.tenant_weights),
        )
        self._wait_s = limits.wait_s
        self._tools = {tool.name: tool for tool in tools}
        self._format = call_format
        compiler = grammars or GrammarCompiler(engine.tokenizer)
        self._constraints = Constraints(compiler, engine.tokenizer, call_format, engine.model_config.vocab_size)
        self._pace = Pace()
        self.programs = programs or Programs(engine)
        self.sessions = Sessions(self.programs)

    @property
    def bounds_thoughts(self) -> bool:
        """Whether ``thought_tokens`` of a request have an effect: the model has tokens that begin and end thoughts."""
        return self._constraints.bounds_thoughts

    def check_model(self, name: str | None) -> str:
        """Return the name that an answer carries; None is the model's own.

        Raises:
            NotFound: no model of that name is served.
        """
        if name is None or name in self.names:
            return name or self.names[0]
        raise NotFound(f"the model {name[:100]!r} is not served; there is: {', '.join(self.names)}")

    async def begin(self, request: ChatRequest | TextRequest) -> list[Turn]:
        """Check, render, tokenise and queue a request; returns a turn for each choice.

        Raises:
            RequestError: the request cannot be served as it is.
            Overloaded: too much is waiting.
            EngineDead: the server does not serve.
        """
        if not (self._tools and isinstance(request, ChatRequest) and request.tool_choice != "none"):
            return await self._begin(request)
        own = set(_tool_names(request))
        served = {name: tool for name, tool in self._tools.items() if name not in own}
        first = replace(
            request,
            tools=[*request.tools, *(tool.schema() for tool in served.values())],
            session=request.session or _loop_name(),
            final=False,
        )
        turns = await self._begin(first)
        later = [first, *(replace(first, session=_loop_name()) for _ in turns[1:])]
        keep = request.session is not None and not request.final
        return [
            self._looped(turn, asked, served, keep=keep and asked is first)
            for turn, asked in zip(turns, later, strict=True)
        ]

    def _looped(self, turn: Turn, request: ChatRequest, tools: Mapping[str, Tool], *, keep: bool) -> Turn:
        """A turn that goes on after calls of the server's tools; then its program is kept, or ends."""

        async def begin(request: ChatRequest) -> Turn:
            [turn] = await self._begin(request)
            return turn

        def end() -> None:
            if not keep:
                with suppress(Overloaded, EngineDead):  # it will expire
                    self.programs.end_session(request.tenant, str(request.session))

        return ToolTurn(turn, replace(request, n=1), begin, end, tools)

    async def _begin(self, request: ChatRequest | TextRequest) -> list[Turn]:
        self.check(request)
        waiting, owner = request.n, request.tenant.owner
        self.waiting.enter(owner, waiting)
        turns: list[Turn] = []
        opening = None
        try:
            opening = await self.open(request)
            prompt = opening.prompt
            tail = self.engine.tokenizer.decode(prompt[-TAIL:])
            params = self._params(request, prompt, await self._constraints.of(request, tail))
            self.waiting.weigh(owner, len(prompt) * waiting)
            try:
                while waiting:
                    reader = self._reader(request, tail)
                    turns.append(self._turn(request, opening, params, len(turns), reader))
                    waiting -= 1
            finally:
                self.waiting.leave(owner, 0, len(prompt) * waiting)
        except BaseException:
            for turn in turns:
                turn.cancel()
            if opening is not None and not turns:
                self.programs.end(opening, None, End("error"))
            raise
        finally:
            self.waiting.leave(owner, waiting, 0)
        return turns

    async def open(self, request: ChatRequest | TextRequest) -> Opening:
        """Make the prompt of a request, and find the program that it goes on with.

        Raises:
            RequestError, Overloaded: as :meth:`begin`.
        """
        tenant, session, parent = request.tenant, request.session, request.parent
        if isinstance(request, ChatRequest):
            tools, arguments = rendered_tools(request), request.template_arguments
            return await self.programs.open_chat(
                tenant, session, request.messages, tools, arguments, characters=request.characters, parent=parent
            )
        if isinstance(request.prompt, str):
            text, add_bos = request.prompt, request.add_bos
            return await self.programs.open_text(tenant, session, text, add_bos=add_bos, parent=parent)
        return self.programs.open_tokens(tenant, session, [*request.prompt], parent=parent)

    async def prompt(self, request: ChatRequest | TextRequest) -> list[int]:
        """Render and tokenise a request without queueing it.

        Raises:
            RequestError, Overloaded: as :meth:`begin`.
        """
        owner = request.tenant.owner
        self.waiting.enter(owner, 1)
        try:
            return await self._make_prompt(request)
        finally:
            self.waiting.leave(owner, 1, 0)

    def check(self, request: Request) -> None:
        """Check what needs no prompt.

        Raises:
            RequestError, EngineDead: as :meth:`begin`.
        """
        if self.draining:
            raise EngineDead("the server is shutting down; use another one")
        if not self.engine.live:
            raise EngineDead("the engine does not serve yet, or no longer")
        if not 1 <= request.n <= MAX_CHOICES:
            raise RequestError(f"n is {request.n}; it must be an integer in [1, {MAX_CHOICES}]")
        if not isinstance(request, ChatRequest):
            return
        if not request.messages:
            raise RequestError("there are no messages; a chat needs at least one")
        if request.messages[-1].get("role") == "assistant":
            raise RequestError(
                "the last message is the assistant's own; continuing it (prefill) is not served: end with a message "
                "of the user or a tool"
            )
        names = _tool_names(request)
        if request.tool_choice not in ("auto", "none") and not names:
            raise RequestError("tool_choice asks for a call, but there are no tools")
        if request.tool_choice not in ("auto", "none", "required", *names):
            raise RequestError(f"tool_choice names {request.tool_choice[:60]!r}, which is none of the tools")

    async def _make_prompt(self, request: ChatRequest | TextRequest) -> list[int]:
        tokenizer, room = self.engine.tokenizer, self.engine.layout.max_context
        if isinstance(request, ChatRequest):
            characters, encode = request.characters, partial(self._encode_chat, request)
        elif isinstance(request.prompt, str):
            characters = len(request.prompt)
            check_length(tokenizer, characters, room)
            encode = partial(tokenizer.encode, request.prompt, add_bos=request.add_bos)
        else:
            return [*request.prompt]
        return await self.programs.made(request.tenant, characters, lambda: checked_ids(encode(), room))

    def _encode_chat(self, request: ChatRequest) -> list[int]:
        tokenizer = self.engine.tokenizer
        rendered = tokenizer.render_chat(request.messages, rendered_tools(request), **request.template_arguments)
        check_length(tokenizer, len(rendered), self.engine.layout.max_context)
        return tokenizer.encode_rendered(rendered)

    def _params(self, request: Request, prompt: Sequence[int], grammar: Grammar | None) -> SamplingParams:
        room = max(1, self.engine.layout.max_context - len(prompt))
        return replace(request.params, max_tokens=min(request.params.max_tokens, room), grammar=grammar)

    def _turn(
        self,
        request: ChatRequest | TextRequest,
        opening: Opening,
        params: SamplingParams,
        index: int,
        reader: Reader,
    ) -> ModelTurn:
        generation, program = self.programs.generate(
            opening,
            params if params.seed is None else replace(params, seed=(params.seed + index) % 2**32),
            final=request.final,
            priority=request.hints.priority,
            first=index == 0,
        )
        ended = partial(self._ended, request=request, opening=opening, program=program)
        return ModelTurn(
            generation.paced(self._pace),
            reader,
            prompt_tokens=len(opening.prompt),
            parallel_calls=not isinstance(request, ChatRequest) or request.parallel_calls,
            wait_s=self._wait_s,
            on_begin=partial(self.waiting.leave, request.tenant.owner, 1, len(opening.prompt)),
            on_end=_nothing if index else ended,
            about=About(program, opening.report, request.hints.outcomes, request.report),
        )

    def _reader(self, request: ChatRequest | TextRequest, tail: str) -> Reader:
        if not isinstance(request, ChatRequest):
            return PlainReader()
        length = self._format.call_id_length
        ids = request.call_ids if length is None else partial(short_call_id, length)
        return ReplyReader(self._format, tail, rendered_tools(request), ids, early=request.early_calls)

    def _ended(
        self, turn: ModelTurn, request: ChatRequest | TextRequest, opening: Opening, program: str | None
    ) -> None:
        if (reason := turn.finish_reason) is None:
            end = End("cancelled", final=request.final)
        else:
            own_stop = reason != "length" and set(turn.output_ids[-1:]) & {*request.params.stop_token_ids}
            reply = turn.reply
            end = End(
                reason,
                turn.output_ids,
                reply_message(reply) if isinstance(request, ChatRequest) else reply.text,
                whole=turn.stop_sequence is None and not own_stop and not turn.left_out,
                calls=None if isinstance(request, TextRequest) else reply.calls if reason == "tool_calls" else (),
                final=request.final,
            )
        self.programs.end(opening, program, end, request.hints)
        if turn.usage is not None and logs.ACCESS.isEnabledFor(logging.DEBUG):
            logs.resumed(account_of(turn.about, turn.usage))


def _nothing(turn: ModelTurn) -> None:
    """Choices after the first belong to no conversation."""


def _loop_name() -> str:
    """Name a program whose client has not."""
    return f"loop-{secrets.token_hex(12)}"


def _tool_names(request: ChatRequest) -> list[str]:
    return [str(tool["function"]["name"]) for tool in request.tools]


def rendered_tools(request: ChatRequest) -> list[Mapping[str, Any]] | None:
    """Tools that the prompt shows and that the turn may call; None: no calls are looked for."""
    return [*request.tools] if request.tools and request.tool_choice != "none" else None
