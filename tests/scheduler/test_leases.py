"""Leases against a table of who has one."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from astraea_jax.scheduler.leases import Leases
from astraea_jax.scheduler.program import Program

EVENTS = st.tuples(st.integers(0, 9), st.sampled_from(["grant", "end", "due"]), st.floats(0, 50), st.integers(0, 8))


@given(st.lists(EVENTS, max_size=60))
def test_leases_end_when_they_are_due_and_stay_within_their_shares(events):
    leases, programs = Leases(32), [Program(n, 0.0, owner=n % 3) for n in range(10)]
    held: dict[Program, tuple[float, int]] = {}
    for number, what, when, pages in events:
        program = programs[number]
        if what == "grant":
            program.pages = [0] * pages
            held.pop(program, None)
            of_owner = sum(n for p, (_, n) in held.items() if p.owner == program.owner)
            fits = of_owner + pages <= 8 and sum(n for _, n in held.values()) + pages <= 16
            assert leases.grant(program, when) == fits
            if fits:
                held[program] = when, pages
        elif what == "end":
            leases.end(program)
            held.pop(program, None)
        else:
            over = {p for p, (until, _) in held.items() if until <= when}
            assert set(leases.due(when)) == over
            held = {p: lease for p, lease in held.items() if p not in over}
        leases.check()
        assert [p in leases for p in programs] == [p in held for p in programs]
