"""Folders of this user for what is compiled once and used again."""

from __future__ import annotations

import os
import stat
import tempfile
from pathlib import Path

from astraea_jax.errors import StartupError


def cache_folder(name: str) -> Path:
    """A folder in the user's cache folder, by the XDG rules.

    Raises:
        StartupError: the user has none.
    """
    base = os.environ.get("XDG_CACHE_HOME", "")
    try:
        root = Path(base) if os.path.isabs(base) else Path.home() / ".cache"
    except RuntimeError as error:
        raise StartupError(f"there is no cache folder: {error}; set XDG_CACHE_HOME") from error
    return root / "astraea_jax" / name


def private_folder(path: Path, what: str) -> Path:
    """Make a folder whose files are run as machine code, unless it is there.

    Args:
        path: where.
        what: its name in error messages, such as "the compile cache".

    Raises:
        StartupError: it is not writable, it is somebody else's, or everybody may write to it.
    """
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
        status = path.stat()
    except OSError as error:
        raise StartupError(f"{what} {path} cannot be used: {error.strerror}; give another folder, or none") from error
    if status.st_uid not in (0, os.geteuid()):
        raise StartupError(f"{what} {path} is another user's, and what lies there is run: give another folder, or none")
    if status.st_mode & stat.S_IWOTH:
        raise StartupError(
            f"{what} {path} may be written by everybody, and what lies there is run: "
            "chmod o-w it, or give another folder"
        )
    return path
