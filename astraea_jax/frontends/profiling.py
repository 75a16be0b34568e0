"""Profiles of a running server by JAX's profiler, begun and ended by an operator."""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path

import jax

from astraea_jax.errors import RequestError, StartupError

MOST_S = 60.0
"""Seconds after which a profile ends by itself: it grows in memory until then, and slows the server."""


class Profiler:
    """Writes profiles into a folder, one at a time; used in the event loop of the server.

    Args:
        folder: for TensorBoard, XProf or Perfetto; None: no profiles are taken.
        most_s: seconds of one profile.
    """

    def __init__(self, folder: str | None = None, most_s: float = MOST_S):
        self._folder, self._most_s = folder, most_s
        self._changing = asyncio.Lock()
        self._limit: asyncio.Task[None] | None = None

    async def start(self) -> str:
        """Begin a profile; returns the folder that it goes to.

        Raises:
            RequestError: one is being taken, or none can be.
        """
        if self._folder is None:
            raise RequestError("this server takes no profiles; start it with --profile_dir")
        async with self._changing:
            if self._limit is not None:
                raise RequestError("a profile is being taken; stop it first")
            try:
                await asyncio.to_thread(jax.profiler.start_trace, self._folder)
            except (RuntimeError, OSError) as error:  # somebody else in this process takes one
                raise RequestError(f"a profile cannot be taken: {error}") from error
            self._limit = asyncio.create_task(self._end_by_itself())
            return self._folder

    async def stop(self) -> str:
        """End the profile and write it; returns its folder.

        Raises:
            RequestError: none is being taken, or it cannot be written.
        """
        async with self._changing:
            if self._limit is None or self._folder is None:
                raise RequestError("no profile is being taken")
            limit, self._limit = self._limit, None
            if limit is not asyncio.current_task():
                limit.cancel()
            try:
                await asyncio.to_thread(jax.profiler.stop_trace)
            except (RuntimeError, OSError) as error:
                raise RequestError(f"the profile cannot be written: {error}") from error
            return self._folder

    async def _end_by_itself(self) -> None:
        await asyncio.sleep(self._most_s)
        with contextlib.suppress(RequestError):
            await self.stop()


def check_folder(folder: str) -> str:
    """Return the folder if it can be written to, making it if there is none.

    Raises:
        StartupError: it cannot be used.
    """
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StartupError(f"the folder for profiles {folder} cannot be made: {error}") from None
    return folder
