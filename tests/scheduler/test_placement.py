"""Placement: reports, costs, and the rules of other systems, by hand and at random."""

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.reports import QUIET

from astraea_jax.scheduler.placement import DECILES, MOST, Fleet, Report, ReportError, Segment, costs, place, waits
from astraea_jax.scheduler.rival_placements import RULES, make_rule


def fleet_of(*reports):
    """Replicas that have just reported."""
    fleet = Fleet(len(reports))
    fleet.takes[:] = True
    for index, report in enumerate(reports):
        fleet.learn(index, report, 0.0)
    return fleet


numbers = st.integers(0, 10**9)
seconds = st.floats(0, 1e6)
reports = st.builds(
    Report,
    pool=st.integers(1, 10**9),
    free=numbers,
    retained=numbers,
    host_free=numbers,
    live=numbers,
    demand=seconds,
    running=numbers,
    waiting=numbers,
    tool_waits=numbers,
    wait_s=st.lists(seconds, min_size=DECILES, max_size=DECILES).map(lambda w: tuple(sorted(w))),
    prefill_s=seconds,
    step_s=seconds,
    restore_s=seconds,
    draining=st.booleans(),
    sessions=numbers,
)


@given(reports)
def test_reports_are_read_as_they_were_written(report):
    flat = report.fields()
    counts = {name for name, value in flat.items() if type(value) is int}
    assert counts == {"pool", "free", "retained", "host_free", "live", "running", "waiting"} | {
        "tool_waits",
        "sessions",
        "draining",
    }
    assert all(type(value) is float for name, value in flat.items() if name not in counts)
    assert Report.from_fields({**flat, "new_field": 3.0}) == report


@pytest.mark.parametrize("value", [math.nan, math.inf, -1, 2 * MOST, "7", None, [1]])
@pytest.mark.parametrize("name", ["pool", "live", "demand", "wait_s_3", "draining"])
def test_reports_that_say_something_impossible_are_refused(name, value):
    flat: dict[str, object] = {**QUIET.fields(), name: value}
    with pytest.raises(ReportError, match=name):
        Report.from_fields(flat)
    del flat[name]
    with pytest.raises(ReportError, match=name):
        Report.from_fields(flat)


def test_a_report_needs_a_pool_and_all_deciles():
    with pytest.raises(ReportError, match="pool"):
        replace(QUIET, pool=0)
    with pytest.raises(ReportError, match="wait_s"):
        replace(QUIET, wait_s=(0.0,))


def test_costs_by_hand():
    # At home: a wait, 1,000 tokens that delay three others, and 4,000 from the host. They need 5,000 tokens of memory,
    # 2,000 of which others have, that are not running. Elsewhere: all of it, but nobody is delayed, and all is free.
    home = replace(QUIET, wait_s=(2.0,) * DECILES, free=3_000, retained=90_000, host_free=1)
    fleet = fleet_of(home, QUIET)
    fleet.requests[0] = fleet.requests_then[0] = 3
    found = costs(Segment(10_000, home=0, held=9_000, on_host=4_000), fleet)
    assert found == pytest.approx([2.0 + 0.1 * 4 + 0.04 + 0.02, 1.0])
    assert place(Segment(10_000), fleet, fleet.takes) == 1


def test_what_is_evicted_costs_more_without_a_host_tier():
    full = replace(QUIET, free=0, retained=100_000, restore_s=1e-6)
    with_host, without = (fleet_of(replace(full, host_free=host)) for host in (1_000, 0))
    prefill_s = 1000 * QUIET.prefill_s
    assert costs(Segment(1000), with_host) == pytest.approx(prefill_s + 1000 * 1e-6)
    assert costs(Segment(1000), without) == pytest.approx(2 * prefill_s)


def test_what_is_shared_needs_no_more_memory():
    full = replace(QUIET, free=0, retained=100_000, host_free=1)
    fleet = fleet_of(full, full)
    found = costs(Segment(1000, shared={1: 900}), fleet)
    assert found == pytest.approx(
        [1000 * (QUIET.prefill_s + QUIET.restore_s), 100 * (QUIET.prefill_s + QUIET.restore_s)]
    )


def test_who_was_sent_since_the_report_waits_where_others_do():
    fleet = fleet_of(replace(QUIET, wait_s=(3.0,) * DECILES, waiting=6), QUIET)
    fleet.requests[:] = 4
    assert waits(fleet) == pytest.approx([5.0, 0.0])


def test_a_program_leaves_its_home_only_for_a_gain():
    stays, leaves = (fleet_of(replace(QUIET, wait_s=(wait,) * DECILES), QUIET) for wait in (1.5, 30.0))
    segment = Segment(10_000, home=0, held=9_900)
    assert place(segment, stays, stays.takes) == 0
    assert place(segment, leaves, leaves.takes) == 1
    leaves.requests[1] = leaves.requests_then[1] = 30  # whom its prefill would delay
    assert place(segment, leaves, leaves.takes) == 0


def test_old_reports_are_not_trusted():
    fleet = fleet_of(replace(QUIET, wait_s=(30.0,) * DECILES), QUIET)
    assert costs(Segment(1), fleet)[0] > 29
    fleet.now = 600.0
    assert costs(Segment(1), fleet)[0] < 1


def test_without_any_report_what_was_sent_counts():
    fleet = Fleet(3)
    fleet.takes[:] = True
    fleet.requests[:] = 5, 1, 2
    assert place(Segment(100), fleet, fleet.takes) == 1
    fleet.requests[:] = 1
    fleet.homes[:] = 500, 200, 100
    assert place(Segment(100), fleet, fleet.takes) == 2


segments = st.integers(1, 10**6).flatmap(
    lambda tokens: st.builds(
        Segment,
        tokens=st.just(tokens),
        home=st.none() | st.integers(0, 3),
        held=st.integers(0, tokens),
        on_host=st.integers(0, tokens),
        shared=st.dictionaries(st.integers(0, 3), st.integers(0, tokens)),
        key=st.integers(0, 2**32 - 1),
    )
)


@given(
    segments,
    st.lists(st.none() | reports, min_size=4, max_size=4),
    st.lists(st.integers(0, 10**7), min_size=4, max_size=4),
    st.lists(st.booleans(), min_size=4, max_size=4).filter(any),
    st.floats(0, 1e6),
    st.sampled_from(sorted(RULES)),
)
def test_every_rule_chooses_an_allowed_replica(segment, given_reports, sent, allowed, now, name):
    fleet = Fleet(4)
    fleet.takes[:] = True
    for index, report in enumerate(given_reports):
        if report is not None:
            fleet.learn(index, report, 0.0)
    fleet.now = now
    fleet.fresh[:] = fleet.requests[:] = fleet.context[:] = fleet.homes[:] = sent
    rule = make_rule(name)
    assert allowed[rule(segment, fleet, np.array(allowed))]
    assert np.isfinite(costs(segment, fleet)).all()
    assert (costs(segment, fleet) >= 0).all()


def test_rules_by_hand():
    fleet = fleet_of(*[QUIET] * 3)
    fleet.requests[:] = 3, 1, 0
    fleet.fresh[:] = 9_000, 500, 700
    at_home, new = Segment(10_000, home=0, held=9_500), Segment(10_000, key=1)
    rules = {name: make_rule(name) for name in RULES}
    chosen = {name: (rule(at_home, fleet, fleet.takes), rule(new, fleet, fleet.takes)) for name, rule in rules.items()}
    assert chosen["least-busy"] == (2, 2)
    assert chosen["sticky"] == (0, 2)
    assert chosen["sticky-until-saturated"] == (0, 1)  # (9000 - 500) / 10,000 tokens a second are below 18 s
    assert chosen["lmetric"] == (0, 2)  # 500 * 4, 10,000 * 2, 10,000 * 1; and 40,000, 20,000, 10,000
    assert chosen["autellix"] == (0, 2)
    assert make_rule("autellix")(Segment(2048, home=0, held=2000), fleet, fleet.takes) == 2
    fleet.fresh[0] = 200_000
    assert rules["sticky-until-saturated"](at_home, fleet, fleet.takes) == 1


def test_a_hash_moves_only_programs_of_the_replica_that_is_gone():
    fleet = Fleet(5)
    fleet.takes[:] = True
    rule = make_rule("consistent-hash")
    keys = range(0, 2**32, 2**22)
    before = [rule(Segment(1, key=key), fleet, fleet.takes) for key in keys]
    left = fleet.takes.copy()
    left[2] = False
    after = [rule(Segment(1, key=key), fleet, left) for key in keys]
    assert [b for a, b in zip(before, after, strict=True) if a != 2] == [a for a in before if a != 2]
    assert set(before) == set(range(5))


def test_an_unknown_rule_is_named():
    with pytest.raises(ValueError, match=r"no-such.*lmetric"):
        make_rule("no-such")
