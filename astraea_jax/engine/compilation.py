"""Compilation at start-up: many executables at a time, and kept in a folder for the next start."""

from __future__ import annotations

import os
import stat
import tempfile
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import TypeVar

import jax
from jax.experimental.compilation_cache import compilation_cache
from jax.stages import Compiled, Lowered

from astraea_jax.errors import StartupError

STACK_BYTES = 64 * 2**20
"""Of a compiling thread. XLA for TPUs overflows the usual 8 MiB on large models, which is why tpu-inference takes as
much (its ``compilation_manager.py``); on a CPU we have not seen it. Memory that is not used is not taken."""

K = TypeVar("K")


def compile_all(
    lowerings: Mapping[K, Callable[[], Lowered]], progress: Callable[[int, int], None] = lambda done, total: None
) -> dict[K, Compiled]:
    """Compile everything, as many at a time as there are processors.

    Lowering is Python and holds its lock, so it is done here, one after the other; what has been lowered compiles
    meanwhile in threads of a pool.

    Args:
        lowerings: of each executable, what lowers it.
        progress: called on this thread with (compiled, all).
    """
    with _pool() as pool:
        futures: dict[Future[Compiled], K] = {}
        reported = 0
        for key, lower in lowerings.items():
            futures[pool.submit(lower().compile)] = key
            done = sum(future.done() for future in futures)
            if done > reported:
                progress(reported := done, len(lowerings))
        for done, future in enumerate(as_completed(futures), 1):
            future.result()
            if done > reported:
                progress(done, len(lowerings))
    return {key: future.result() for future, key in futures.items()}


def _pool() -> ThreadPoolExecutor:
    """Threads with large stacks. They start here, since the size of a stack is a setting of the whole process."""
    workers = os.cpu_count() or 1
    before = threading.stack_size(STACK_BYTES)
    try:
        pool, started = ThreadPoolExecutor(workers), threading.Barrier(workers + 1)
        for _ in range(workers):
            pool.submit(started.wait)
        started.wait()
    finally:
        threading.stack_size(before)
    return pool


def use_cache(folder: str | None) -> None:
    """Have JAX keep what it compiles in ``folder``, and look there first. None or empty: leave JAX as it is configured.

    Raises:
        StartupError: the folder cannot be written, or anybody may write to it: what lies there is run as machine code.
    """
    if not folder:
        return
    path = Path(folder).expanduser()
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
        open_to_all = path.stat().st_mode & stat.S_IWOTH
    except OSError as error:
        raise StartupError(
            f"the compile cache {path} cannot be used: {error.strerror}; give another folder, or none"
        ) from error
    if open_to_all:
        raise StartupError(
            f"the compile cache {path} may be written by everybody, and what lies there is run: "
            "chmod o-w it, or give another folder"
        )
    if jax.config.jax_compilation_cache_dir != str(path):  # type: ignore[attr-defined]
        jax.config.update("jax_compilation_cache_dir", str(path))
        compilation_cache.reset_cache()  # JAX opens its cache once
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)  # small models compile in less than its second


def default_cache() -> str:
    """A folder in the user's cache folder, by the XDG rules."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    root = Path(base) if os.path.isabs(base) else Path.home() / ".cache"
    return str(root / "astraea_jax" / "compiled")
