"""The synchronous front door: one object that loads a model, generates, and runs tool-calling agents."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from astraea_jax.agents.continuity import Mode
from astraea_jax.agents.conversations import Conversations
from astraea_jax.agents.formats import choose
from astraea_jax.agents.loop import ProgramResult, check_tools, run_program
from astraea_jax.agents.mcp import McpServer, connected
from astraea_jax.agents.tools import Tool, thread_lent
from astraea_jax.engine.config import EngineConfig
from astraea_jax.engine.encoding import encode_prompt
from astraea_jax.engine.generation import Usage
from astraea_jax.engine.replicas import load_engine
from astraea_jax.engine.sampling import SamplingParams
from astraea_jax.frontends.feeding import PatientModel, map_in_order
from astraea_jax.frontends.hub import find_model
from astraea_jax.frontends.loop_thread import LoopThread
from astraea_jax.frontends.progress import StartupDisplay

R = TypeVar("R", "Completion", ProgramResult)


@dataclass(frozen=True)
class Completion:
    """The whole output of one prompt."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: str
    """``"error"`` if there is no output; else as in :class:`astraea_jax.engine.generation.Delta`."""
    usage: Usage | None
    error: Exception | None = None


class LLM:
    """A model ready to use from ordinary Python; a context manager, since it owns the threads of its engines.

    Its methods may be called from any thread, plain tools among them, and wait for their result. Ctrl-C cancels what
    the interrupted call has begun: no tool is started any more. A coroutine of yours that calls them holds up its event
    loop; ``await llm.engine.generate(…)`` does not. An async tool must do that, too: here it gets a ``RuntimeError``,
    because it would hold up all agents.

    Args:
        model: a checkpoint folder, the bundled ``"astraea-tiny"``, or an id of the Hugging Face hub.
        config: sizes and policy of the engine.
        revision: a branch, tag or commit of a hub id.
        progress: show loading and compilation on the terminal.
        turn_continuity: how a conversation continues from the tokens of its earlier turns, also of earlier calls:
            ``"job"``: unless the template intends another text for turns of earlier jobs; ``"session"``: always;
            ``"off"``: never.

    Raises:
        CheckpointError, StartupError: the model cannot be served here; the message says why.
    """

    def __init__(
        self,
        model: str | Path = "astraea-tiny",
        config: EngineConfig | None = None,
        *,
        revision: str | None = None,
        progress: bool = False,
        turn_continuity: Mode = "job",
    ):
        with StartupDisplay(enabled=progress) as display:
            self.engine = load_engine(find_model(model, revision), config, progress=display.loading)
            try:
                self.engine.start(display.compiling)
                self._thread = LoopThread("astraea-llm")
            except BaseException:
                self.engine.shutdown(grace_s=0)
                raise
        self._model = PatientModel(self.engine)
        c = self.engine.config
        self._conversations = Conversations(self.engine.tokenizer, turn_continuity, ttl_s=c.session_ttl_s)
        self._at_once = c.data_parallel * min(c.max_queued + c.max_seqs, c.max_programs)

    def generate(self, prompts: str | Sequence[str], params: SamplingParams | None = None) -> list[Completion]:
        """Complete one prompt or many, in order. Text is used as it is; for chats see :meth:`chat`.

        Of several prompts each has its completion or its ``error``; of a single one the error is raised. There may be
        more than the engine's queue holds.

        Raises:
            TypeError: something is no prompt, or ``params`` are no ``SamplingParams``.
            EngineDead: the LLM has been closed.
        """
        single = isinstance(prompts, str)
        texts = [prompts] if isinstance(prompts, str) else list(prompts)
        for text in texts:
            if not isinstance(text, str):
                raise TypeError(f"prompts must be text, not {type(text).__name__}; engine.generate takes token ids")
        _check(params)
        complete = partial(self._complete, params=params)
        return self._run(partial(map_in_order, complete, texts, self._at_once), single)

    def chat(
        self,
        messages: Sequence[Any] | Sequence[Sequence[Any]],
        tools: Sequence[Tool | McpServer] = (),
        params: SamplingParams | None = None,
        *,
        max_steps: int = 16,
        template_arguments: Mapping[str, Any] | None = None,
        call_format: str | None = None,
    ) -> list[ProgramResult]:
        """Run one conversation or many as agents, calling ``tools`` until each has its answer; results in order.

        Of several conversations each has its answer or its ``error``; of a single one the error is raised. There may
        be more than the engine's queue holds.

        Args:
            messages: a conversation, which is a list of messages (dicts, or an SDK's message objects), or a list of
                conversations.
            tools: what the agents may call; of an MCP server, which is connected for the time of this call, all the
                tools that it allows.
            params: sampling of every request.
            max_steps: bound on the requests of each agent.
            template_arguments: variables for the chat template, such as ``{"enable_thinking": False}``.
            call_format: how the model writes tool calls, of :data:`astraea_jax.agents.formats.NAMES`; by default as
                its template shows.

        Raises:
            TypeError: messages and conversations are mixed, or an argument is of another type than it must be.
            ValueError: two tools of one name, ``max_steps`` below 1, or an unknown call format.
            ToolError: an MCP server cannot be used; the message says why.
            EngineDead: the LLM has been closed.
        """
        conversations = _conversations(messages)
        check_tools([tool for tool in tools if not isinstance(tool, McpServer)], max_steps)
        _check(params)
        choose(self._model.tokenizer, call_format)

        async def converse() -> list[ProgramResult]:
            async with connected(tools) as all_tools:
                check_tools(all_tools, max_steps)
                run = partial(
                    run_program,
                    self._model,
                    tools=all_tools,
                    params=params,
                    max_steps=max_steps,
                    template_arguments=template_arguments,
                    conversations=self._conversations,
                    call_format=call_format,
                    return_error=True,
                )
                return await map_in_order(run, conversations, self._at_once)

        return self._run(converse, single=bool(messages) and not _is_conversation(messages[0]))

    def close(self) -> None:
        """Stop the engine. Calls that wait in other threads end with ``EngineDead``. Closing twice does nothing.

        Raises:
            RuntimeError: an async tool calls it, which would wait for its own end.
        """
        self._thread.check_caller()
        self._thread.stop()
        self.engine.shutdown(grace_s=0)

    def __enter__(self) -> LLM:
        self._thread.check_open()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _run(self, work: Callable[[], Coroutine[Any, Any, list[R]]], single: bool) -> list[R]:
        with thread_lent():
            results = self._thread.wait_for(work)
        if single and results[0].error is not None:
            raise results[0].error
        return results

    async def _complete(self, prompt: str, params: SamplingParams | None) -> Completion:
        try:
            encode = partial(self._model.tokenizer.encode, prompt, add_bos=True)
            stream = self._model.generate(await encode_prompt(len(prompt), encode), params)
            deltas = [delta async for delta in stream]
        except Exception as error:
            return Completion("", (), "error", None, error)
        ids = tuple(token for delta in deltas for token in delta.token_ids)
        return Completion("".join(d.text for d in deltas), ids, deltas[-1].finish_reason or "stop", stream.usage)


def _conversations(messages: Sequence[Any]) -> list[list[Any]]:
    """The conversations in what :meth:`LLM.chat` was given: one, or several."""
    if isinstance(messages, str | bytes) or not isinstance(messages, Sequence):
        raise TypeError(f"messages must be a list of messages, or of conversations, not {type(messages).__name__}")
    several = {_is_conversation(entry) for entry in messages}
    if len(several) > 1:
        raise TypeError(
            "messages and conversations are mixed: give one conversation, which is a list of messages, or a list of "
            "conversations, each of them a list"
        )
    return [list(entry) for entry in messages] if several == {True} else [list(messages)] if messages else []


def _is_conversation(entry: object) -> bool:
    return isinstance(entry, Sequence) and not isinstance(entry, str | bytes)


def _check(params: object) -> None:
    if params is not None and not isinstance(params, SamplingParams):
        raise TypeError(f"params must be SamplingParams, not {type(params).__name__}")
