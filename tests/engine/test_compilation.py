"""Compilation at start-up: all of it, progress on the caller's thread, large stacks, and a folder that keeps it."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import threading
from functools import partial

import jax
import jax.numpy as jnp
import pytest

from astraea_jax.engine.compilation import STACK_BYTES, _pool, accepted, compile_all, default_cache, use_cache
from astraea_jax.errors import StartupError


def test_all_are_compiled_and_counted():
    seen = []
    jitted = jax.jit(lambda x: 2 * x)
    compiled = compile_all(
        {n: partial(jitted.lower, jnp.zeros(n)) for n in range(1, 8)},
        lambda done, total: seen.append((threading.get_ident(), done, total)),
    )
    assert all(compiled[n](jnp.ones(n)).shape == (n,) for n in range(1, 8))
    here, done, total = zip(*seen)
    assert set(here) == {threading.get_ident()}
    assert list(done) == sorted(set(done))
    assert done[-1] == 7
    assert set(total) == {7}


def test_as_many_compile_at_once_as_this_process_has_processors(monkeypatch):
    for processors in (1, 3):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _, n=processors: set(range(n)), raising=False)
        with _pool() as pool:
            assert pool._max_workers == processors


def test_what_cannot_be_lowered_is_told():
    with pytest.raises(TypeError, match="incompatible"):
        compile_all({0: partial(jax.jit(lambda x: x + jnp.ones(3)).lower, jnp.ones(2))})


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "pthread_getattr_np"), reason="only glibc tells the size of a stack")
def test_threads_have_large_stacks_and_nobody_else_does():
    """The kernel says how large the piece of memory is that a thread's own variables lie in."""
    before = threading.stack_size()
    with _pool() as pool:
        assert threading.stack_size() == before
        large = pool.submit(_stack_bytes).result()
    assert large >= STACK_BYTES * 0.9
    found = []
    other = threading.Thread(target=lambda: found.append(_stack_bytes()))
    other.start()
    other.join()
    assert found[0] < STACK_BYTES


def _stack_bytes() -> int:
    """Stack size of this thread, as glibc knows it."""
    libc = ctypes.CDLL(None)
    attributes = ctypes.create_string_buffer(64)
    libc.pthread_self.restype = ctypes.c_void_p
    assert libc.pthread_getattr_np(ctypes.c_void_p(libc.pthread_self()), attributes) == 0
    address, size = ctypes.c_void_p(), ctypes.c_size_t()
    assert libc.pthread_attr_getstack(attributes, ctypes.byref(address), ctypes.byref(size)) == 0
    libc.pthread_attr_destroy(attributes)
    return size.value


@pytest.mark.parametrize(("mode", "words"), [(0o777, "chmod o-w"), (None, "cannot be used")])
def test_a_folder_that_will_not_do_is_refused(tmp_path, mode, words):
    folder = tmp_path / "cache"
    if mode is None:
        folder.touch()
    else:
        folder.mkdir()
        folder.chmod(mode)
    with pytest.raises(StartupError, match=words):
        use_cache(str(folder))


def test_the_default_is_in_the_users_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache() == str(tmp_path / "astraea_jax" / "compiled")
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # to be ignored, says the standard
    assert default_cache().startswith(os.path.expanduser("~"))


HITS = """
import jax, sys
from astraea_jax.engine.compilation import use_cache
seen = []
jax.monitoring.register_event_listener(lambda event, **_: seen.append(event))
jax.jit(lambda x: x - 1)(1.0)  # JAX has looked for its cache before
use_cache(sys.argv[1])
jax.jit(lambda x: 3 * x)(1.0)
print(sum(event.endswith("cache_hits") for event in seen))
"""


def test_a_second_process_finds_what_the_first_compiled(tmp_path):
    folder = tmp_path / "kept"
    quiet = {k: v for k, v in os.environ.items() if not k.startswith("JAX_")}
    hits = [
        subprocess.run([sys.executable, "-c", HITS, str(folder)], env=quiet, capture_output=True, text=True, check=True)
        for _ in range(2)
    ]
    assert [run.stdout.strip() for run in hits] == ["0", "1"]
    assert folder.stat().st_mode & 0o777 == 0o700


def test_an_option_that_this_xla_does_not_know_is_left_out(caplog):
    assert accepted("xla_cpu_scheduler_type", "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED")
    assert not accepted("xla_cpu_no_such_option", "1")
    assert "does not accept xla_cpu_no_such_option=1" in caplog.text
    assert not accepted("xla_cpu_scheduler_type", "NO_SUCH_SCHEDULER")
