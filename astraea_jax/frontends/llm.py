"""The synchronous front door: one object that loads a model, generates, and runs tool-calling agents."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from astraea_jax.agents.loop import ProgramResult, run_program
from astraea_jax.agents.tools import Tool
from astraea_jax.engine.config import EngineConfig
from astraea_jax.engine.generation import Usage
from astraea_jax.engine.replicas import load_engine
from astraea_jax.engine.sampling import SamplingParams
from astraea_jax.frontends.progress import StartupDisplay

Message = dict[str, Any]
"""An OpenAI-shaped chat message."""

T = TypeVar("T")


@dataclass(frozen=True)
class Completion:
    """The whole output of one prompt."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: str
    usage: Usage


class LLM:
    """A model ready to use from ordinary Python; a context manager, since it owns the threads of its engines.

    Args:
        model: a checkpoint folder, or the bundled ``"astraea-tiny"``.
        config: sizes and policy of the engine.
        progress: show loading and compilation on the terminal.

    Raises:
        CheckpointError, StartupError: the model cannot be served here; the message says why.
    """

    def __init__(
        self,
        model: str | Path = "astraea-tiny",
        config: EngineConfig | None = None,
        *,
        progress: bool = False,
    ):
        with StartupDisplay(enabled=progress) as display:
            self.engine = load_engine(model, config, progress=display.loading)
            self.engine.start(display.compiling)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="astraea-llm", daemon=True)
        self._thread.start()

    def generate(self, prompts: str | Sequence[str], params: SamplingParams | None = None) -> list[Completion]:
        """Complete one prompt or many at once, in order. Text is used as it is; for chats see :meth:`chat`."""
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        return self._wait(_gather([self._complete(prompt, params) for prompt in prompts]))

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        tools: Sequence[Tool] = (),
        params: SamplingParams | None = None,
        *,
        max_steps: int = 16,
    ) -> list[ProgramResult]:
        """Run one conversation or many at once, calling ``tools`` until each has its answer; results in order."""
        runs = [
            run_program(self.engine, one, tools, params=params, max_steps=max_steps) for one in _conversations(messages)
        ]
        return self._wait(_gather(runs))

    def close(self) -> None:
        """Stop the engine; running requests are cancelled."""
        self.engine.shutdown(grace_s=0)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    async def _complete(self, prompt: str, params: SamplingParams | None) -> Completion:
        generation = self.engine.generate(self.engine.tokenizer.encode(prompt, add_bos=True), params)
        deltas = [delta async for delta in generation]
        ids = tuple(token for delta in deltas for token in delta.token_ids)
        assert generation.usage is not None
        return Completion("".join(d.text for d in deltas), ids, deltas[-1].finish_reason or "stop", generation.usage)

    def _wait(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()


def _conversations(messages: Sequence[Message] | Sequence[Sequence[Message]]) -> list[list[Message]]:
    if any(isinstance(message, dict) for message in messages):
        return [[message for message in messages if isinstance(message, dict)]]
    return [list(one) for one in messages if not isinstance(one, dict)]


async def _gather(work: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    return list(await asyncio.gather(*work))
