"""The library of the kernels in C++: it is built once by the compiler of this machine, kept, and loaded from then on.

XLA calls what it holds as custom calls (``jax.ffi``). It is built for this very processor, from the headers of the
jaxlib that will load it, so it is built anew when any of these changes.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import jax

from astraea_jax.errors import StartupError
from astraea_jax.folders import cache_folder, private_folder

log = logging.getLogger(__name__)

SOURCES = Path(__file__).parent
COMPILERS = ("c++", "g++", "clang++")
"""Names under which C++ compilers are installed; CXX in the environment goes before them."""
OPTIONS = ("-std=c++17", "-O3", "-fPIC", "-shared", "-pthread", "-fno-math-errno", "-fno-trapping-math", "-Wno-psabi")
TARGETS = {
    "astraea_attention": "Attention",
    "astraea_product": "Product",
    "astraea_grouped_product": "GroupedProduct",
}
"""Names of custom calls -> symbols of the library."""
PATIENCE_S = 300.0
"""Seconds that the compiler may take."""


@functools.cache
def load() -> None:
    """Make the kernels known to XLA, building them first if need be; later calls do nothing.

    Raises:
        StartupError: they cannot be built or loaded here; the message says why and what would help.
    """
    library = _loaded()
    for target, symbol in TARGETS.items():
        jax.ffi.register_ffi_target(target, jax.ffi.pycapsule(getattr(library, symbol)), platform="cpu")


def _loaded() -> ctypes.CDLL:
    """Load the library, and build it anew if what was kept is broken."""
    library = _opened(_built()) or _opened(_built())
    if library is None:
        raise StartupError("the kernels for CPUs cannot be loaded; the log says why")
    return library


def _opened(path: Path) -> ctypes.CDLL | None:
    """Load a library, or say why not and remove it."""
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        log.warning("the kernels for CPUs cannot be loaded: %s", error)
        path.unlink(missing_ok=True)
        return None


def _built() -> Path:
    """Build the library for this processor, these sources and this jaxlib, unless it is there; return its path."""
    compiler = _compiler()
    native = "-march=native" if platform.machine() in ("x86_64", "AMD64") else "-mcpu=native"
    command = [*compiler, *OPTIONS, native, "-isystem", jax.ffi.include_dir()]
    sources = sorted(SOURCES.glob("*.cc"))
    folder = private_folder(cache_folder("native"), "the folder of kernels for CPUs")
    library = folder / f"{_digest(command, [*sources, *sorted(SOURCES.glob('*.h'))])}.so"
    if not library.exists():
        log.info("building the kernels for CPUs with %s, once; this takes a few seconds", shlex.join(compiler))
        _build([*command, *map(str, sources)], library)
    return library


def _compiler() -> list[str]:
    named = os.environ.get("CXX")
    found = shlex.split(named) if named else next(([name] for name in COMPILERS if shutil.which(name)), [])
    if not found or shutil.which(found[0]) is None:
        what = f"CXX names {named!r}, which is not there" if named else "there is no C++ compiler"
        raise StartupError(f"the kernels for CPUs cannot be built, since {what}; install g++ or clang++")
    return found


def _digest(command: Sequence[str], files: Sequence[Path]) -> str:
    """Return a name for what a command makes of files on this processor."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else [platform.processor()]
    features = sorted({line for line in lines if line.lower().startswith(("flags", "features", "model name"))})
    digest = hashlib.sha256("\0".join([*command, version("jaxlib"), platform.platform(), *features]).encode())
    for file in files:
        digest.update(file.read_bytes())
    return digest.hexdigest()[:32]


def _build(command: Sequence[str], library: Path) -> None:
    """Build beside the place where it will lie, so that nobody loads half a file."""
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        made = Path(folder) / library.name
        try:
            done = subprocess.run(
                [*command, "-o", str(made)], capture_output=True, text=True, timeout=PATIENCE_S, check=False
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise StartupError(f"the kernels for CPUs cannot be built: {error}") from error
        if done.returncode:
            raise StartupError(f"the kernels for CPUs cannot be built: {shlex.join(command)}: {done.stderr[-2000:]}")
        made.replace(library)
