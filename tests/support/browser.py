"""Headless Chromium, where there is one: pages as a reader sees them."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from pathlib import Path

NAMES = ("chromium-headless-shell", "chrome-headless-shell", "chromium", "chromium-browser", "google-chrome")
BROWSER = next((found for name in NAMES if (found := shutil.which(name))), None)
"""Its path; None: there is none here."""


async def page_of(url: str, *, until_ms: int = 4000, size: str = "1240,860", picture: Path | None = None) -> str:
    """The page's elements after its scripts have run for a while of the browser's own time; and a picture of it."""
    with tempfile.TemporaryDirectory() as profile:
        command = [
            *(BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars"),
            *(f"--user-data-dir={profile}", f"--window-size={size}", f"--virtual-time-budget={until_ms}", "--dump-dom"),
            *([f"--screenshot={picture}"] if picture else []),
        ]
        process = await asyncio.create_subprocess_exec(
            *command, url, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
        )
        said, errors = await asyncio.wait_for(process.communicate(), 120)
    assert process.returncode == 0, errors.decode()
    return said.decode()
