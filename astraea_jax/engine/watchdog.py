"""Watches the serving loop: a turn that does not end means that the device hangs."""

from __future__ import annotations

import logging
import sys
import threading
import time
import traceback
from collections.abc import Callable

log = logging.getLogger(__name__)


def watch(
    thread: threading.Thread, began: Callable[[], float | None], limit_s: float, hung: Callable[[], None]
) -> None:
    """Look from time to time, while ``thread`` lives, whether its turn takes too long.

    Args:
        thread: of the serving loop.
        began: returns when its present turn began, by ``time.monotonic``; None: it waits for something to do.
        limit_s: seconds of a turn, at most.
        hung: called once if one takes longer.
    """
    while thread.is_alive():
        thread.join(min(1.0, limit_s / 4))
        since = began()
        if since is not None and time.monotonic() - since > limit_s:
            log.critical("a step hangs; the stacks of all threads:\n%s", _stacks())
            hung()
            return


def _stacks() -> str:
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    return "\n".join(
        f"{names.get(ident, ident)}:\n{''.join(traceback.format_stack(frame))}"
        for ident, frame in sys._current_frames().items()
    )
