"""Ports for processes that cannot take a free one by themselves."""

from __future__ import annotations

import secrets
import socket

LOWEST, HIGHEST = 20_000, 32_767
"""Below those that systems give to whoever asks for any, so that what is found here is still free a moment later."""


def free_port() -> int:
    """Find a port of this machine that nobody listens at."""
    while True:
        port = LOWEST + secrets.randbelow(HIGHEST - LOWEST + 1)
        try:
            socket.create_server(("127.0.0.1", port)).close()
        except OSError:
            continue
        return port
