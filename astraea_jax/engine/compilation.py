"""Compilation at start-up: several executables at a time, kept in a folder for later starts; and none afterwards."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from functools import cache
from pathlib import Path
from typing import TypeVar

import jax
from jax.experimental.compilation_cache import compilation_cache
from jax.stages import Compiled, Lowered

from astraea_jax.folders import cache_folder, private_folder

log = logging.getLogger(__name__)

STACK_BYTES = 64 * 2**20
"""Stack of a compiling thread. XLA for TPUs overflows the usual 8 MiB on large models, so tpu-inference's
``compilation_manager.py`` uses this size, too; on a CPU we have not seen it. Unused stack takes no memory."""

K = TypeVar("K")


def compile_all(
    lowerings: Mapping[K, Callable[[], Lowered]], progress: Callable[[int, int], None] = lambda done, total: None
) -> dict[K, Compiled]:
    """Compile several executables at a time, one per available processor.

    Lowering is Python and holds the GIL, so it is done one after the other on the calling thread, while a pool of
    threads compiles what has been lowered.

    Args:
        lowerings: a function that lowers it, for each executable.
        progress: called on this thread with (compiled, total).
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


@cache
def accepted(option: str, value: str | bool) -> bool:
    """Whether the compiler of the default device knows an option of XLA; one that it does not know is logged.

    Options come and go with versions of jaxlib, and a compilation that is given an unknown one fails.
    """
    try:
        jax.jit(lambda x: x + 1, compiler_options={option: value}).lower(jax.ShapeDtypeStruct((), "int32")).compile()
    except jax.errors.JaxRuntimeError as error:
        log.warning("this XLA does not accept %s=%s, so steps may be slower: %s", option, value, error)
        return False
    return True


def _pool() -> ThreadPoolExecutor:
    """A pool of threads with large stacks. All start here, since the stack size is a setting of the whole process."""
    # os.cpu_count() would count processors that this process may not use; macOS has no affinity mask.
    workers = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
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
    """Have JAX keep compiled executables in ``folder`` and look there first; None or empty leaves JAX as configured.

    Raises:
        StartupError: the folder is not writable, or everybody may write to it: its files are run as machine code.
    """
    if not folder:
        return
    path = private_folder(Path(folder).expanduser(), "the compile cache")
    if jax.config.jax_compilation_cache_dir != str(path):  # type: ignore[attr-defined]
        jax.config.update("jax_compilation_cache_dir", str(path))
        compilation_cache.reset_cache()  # JAX opens its cache once
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)  # small models compile in less than its second


def default_cache() -> str:
    """The default folder for compiled steps, in the user's cache folder by the XDG rules."""
    return str(cache_folder("compiled"))


class CompileGuard:
    """Notices compilations on the thread that armed it: after start-up every shape must be compiled.

    JAX keeps event listeners for ever, so one listener serves all guards of the process.
    """

    _armed: dict[int, CompileGuard] = {}  # noqa: RUF012
    _listening = False

    def __init__(self) -> None:
        self.compiled: list[str] = []

    def arm(self) -> None:
        if not CompileGuard._listening:
            jax.monitoring.register_event_duration_secs_listener(CompileGuard._on_event)
            CompileGuard._listening = True
        CompileGuard._armed[threading.get_ident()] = self

    def disarm(self) -> None:
        CompileGuard._armed.pop(threading.get_ident(), None)

    def check(self) -> None:
        """Raise RuntimeError if anything was compiled since the guard was armed."""
        if self.compiled:
            raise RuntimeError(f"compiled after start-up: {self.compiled[0]}; a step shape was not compiled ahead")

    @staticmethod
    def _on_event(event: str, duration_secs: float, **_: str | int) -> None:
        guard = CompileGuard._armed.get(threading.get_ident())
        if guard is not None and "backend_compile" in event:
            guard.compiled.append(f"{event} ({duration_secs:.2f} s)")
