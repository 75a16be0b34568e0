"""The state machine of support/engine_states.py, run on the engine as it is, and on engines with faults put back."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import run_state_machine_as_test
from support import engine_states
from support.callers import callers_of
from support.engine_states import Machine

from astraea_jax.engine import calls as calls_module
from astraea_jax.engine import sessions as sessions_module
from astraea_jax.engine.engine import Engine
from astraea_jax.engine.events import checked_name
from astraea_jax.engine.generation import Generation
from astraea_jax.engine.lifecycle import Lifecycle, State
from astraea_jax.engine.loop import ServingLoop

STEPS = 50
EXAMPLES = 400 if os.environ.get("CI") else 40
"""Steps of each run; CI takes 20,000 in all."""

callers = callers_of(Machine)


def run(examples: int, **more) -> None:
    run_state_machine_as_test(
        Machine,
        settings=settings(
            max_examples=examples,
            stateful_step_count=STEPS,
            deadline=None,
            derandomize=False,  # as it would be in CI, which would always go the same ways
            suppress_health_check=list(HealthCheck),
            **more,
        ),
    )


def test_whatever_happens_every_request_ends_once_and_nobody_meets_another():
    run(EXAMPLES)


def _anonymous_programs_with_names(patch) -> None:
    """The engine numbers programs that have no name, in the table of those that clients name."""
    submit = ServingLoop._submit

    def named(self, event, now):
        name = ("", f"#{1 + self._scheduler.stats().created % 3}")
        call = event.call if event.call.session else replace(event.call, session=name)
        return submit(self, replace(event, call=call), now)

    patch.setattr(ServingLoop, "_submit", named)


def _sessions_without_owners(patch) -> None:
    patch.setattr(calls_module, "checked_key", lambda session, owner: ("", checked_name("name", session)))


def _ends_that_ask_the_scheduler(patch) -> None:
    """Whoever tells callers of the end asks books first that may be what is broken."""
    die = Engine._die

    def broken(self, reason):
        for request in list(self._loop._live._by_request):
            if "test" in reason:
                raise KeyError(request.number)
        die(self, reason)

    patch.setattr(Engine, "_die", broken)


def _a_start_that_forgets_the_end(patch) -> None:
    def compile_(self) -> bool:
        self._state = State.COMPILING
        return True

    patch.setattr(Lifecycle, "compile", compile_)


def _names_that_nobody_checks(patch) -> None:
    for module in (calls_module, sessions_module):
        patch.setattr(module, "checked_name", lambda what, name, empty=False: name)
        patch.setattr(module, "checked_key", lambda session, owner: (owner, session))


def _prompts_that_nobody_checks(patch) -> None:
    patch.setattr(calls_module, "checked_prompt", lambda prompt, *_: tuple(prompt))


def _answers_that_come_twice(patch) -> None:
    patch.setattr(Lifecycle, "end", lambda self, mailbox: True)


def _callers_that_cannot_give_up(patch) -> None:
    patch.setattr(Generation, "cancel", lambda self: None)


def _any_exception_but_those_of_the_system(patch) -> None:
    """A thread that ends by SystemExit tells nobody."""

    def run(self) -> None:
        try:
            self._die(self._loop.run())
        except Exception as error:
            self._die(repr(error))

    patch.setattr(Engine, "_run", run)


FAULTS = [fault for name, fault in list(globals().items()) if name.startswith("_") and hasattr(fault, "__code__")]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__[1:])
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # what some of them are about
def test_the_machine_finds_what_was_wrong_once(fault, monkeypatch):
    """Each of these was in the engine, or nearly: the machine above must find it."""
    monkeypatch.setattr(engine_states, "LIMIT_S", 1.0)
    fault(monkeypatch)
    with pytest.raises(Exception):  # noqa: B017 # an assertion, an error of the engine, or a group of several
        run(1000, phases=[Phase.generate], report_multiple_bugs=False, database=None)
