"""Headless Chromium, where there is one: pages as a reader sees them."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import tempfile

NAMES = ("chromium-headless-shell", "chrome-headless-shell", "chromium", "chromium-browser", "google-chrome")
BROWSER = next((found for name in NAMES if (found := shutil.which(name))), None)
"""Its path; None: there is none here."""
ATTEMPTS, ATTEMPT_S = 3, 30
"""With a clock of its own it stands still for ever once in a while."""


async def page_of(url: str, *, until_ms: int = 4000) -> str:
    """The page's elements after its scripts have run for a while of the browser's own time."""
    for _ in range(ATTEMPTS):
        with contextlib.suppress(TimeoutError):
            return await _page_of(url, until_ms)
    raise AssertionError(f"{BROWSER} does not end")


async def _page_of(url: str, until_ms: int) -> str:
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        process = await asyncio.create_subprocess_exec(
            *(BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"),
            *(f"--user-data-dir={profile}", f"--virtual-time-budget={until_ms}", "--dump-dom", url),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            async with asyncio.timeout(ATTEMPT_S):
                said, _ = await process.communicate()
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            await process.wait()
    assert process.returncode == 0
    return said.decode()
