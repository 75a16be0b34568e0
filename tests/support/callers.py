"""The event loop that all callers of a state machine share, in a thread of its own."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis.stateful import RuleBasedStateMachine


def callers_of(machine: type[RuleBasedStateMachine]) -> Any:
    """Return a fixture that gives a machine its ``loop`` while the tests of a module run."""

    @pytest.fixture(scope="module", autouse=True)
    def callers() -> Iterator[None]:
        loop = asyncio.new_event_loop()
        machine.loop = loop
        thread = threading.Thread(target=loop.run_forever, daemon=True)
        thread.start()
        yield
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()

    return callers
