"""Fleets in the simulator: programs conserve over replicas that die and drain, and nothing is served twice at once."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from astraea_jax.scheduler.policies import make_policy
from astraea_jax.scheduler.rival_placements import make_rule
from astraea_jax.scheduler.simulation.engine import Sizes
from astraea_jax.scheduler.simulation.experiment import draw
from astraea_jax.scheduler.simulation.fleet import Change, FleetSimulator, Reporting
from astraea_jax.scheduler.simulation.fleet_study import FLEET_RULES, FleetCell, prepare, simulate, summary
from astraea_jax.scheduler.simulation.machines import MACHINES
from astraea_jax.scheduler.simulation.simulator import Simulator
from astraea_jax.scheduler.simulation.trace import TraceProgram, TraceRequest, everyone
from astraea_jax.scheduler.simulation.workload import generate, with_arrivals

MACHINE = MACHINES["cpu-tiny"]
SMALL = FleetCell("infercept-mix", "astraea", replicas=3, programs=8)


def small_programs(count, seed=0):
    return with_arrivals([p.scaled(0.05) for p in generate("infercept-mix", count, seed)], 4.0, seed)


def families(count, seed=0):
    programs = [p.scaled(0.01) for p in draw("swe-sub-agents", count, seed)]
    return with_arrivals(programs, 1.0, seed)


def fleet_of(programs, replicas, rule="astraea", pool=400, **options):
    sizes = Sizes(pool, page_size=16, host_tokens=10**6)
    return FleetSimulator(
        programs, lambda: make_policy("astraea"), make_rule(rule), MACHINE, sizes, replicas, **options
    )


def test_a_fleet_of_one_serves_what_the_engine_alone_serves():
    programs = small_programs(12)
    policy, sizes = make_policy("astraea"), Sizes(400, page_size=16, host_tokens=10**6)
    alone = Simulator(programs, policy, MACHINE, sizes).run()
    fleet = fleet_of(programs, 1).run()
    for a, b in zip(alone.records, fleet.history.records, strict=True):
        assert b.jct_s == pytest.approx(a.jct_s, rel=0.05, abs=0.2)
    assert fleet.moves == fleet.resent == 0


changes = st.lists(
    st.builds(Change, st.floats(0, 12), st.integers(0, 3), st.sampled_from(["die", "drain", "empty", "join"])),
    max_size=6,
)


@settings(max_examples=30, deadline=None)
@given(
    changes,
    st.integers(0, 100),
    st.sampled_from(["astraea", "lmetric", "least-busy", "sticky"]),
    st.sampled_from(["held", "stolen", ""]),
    st.booleans(),
)
def test_programs_conserve_whatever_becomes_of_replicas(changes, seed, rule, more, begin_others):
    programs = families(4, seed) if begin_others else small_programs(10, seed)
    back = [Change(20.0, replica, what) for replica in range(4) for what in ("die", "join")]  # all are there again
    options = {"held_back": more == "held", "steal_s": 0.25 if more == "stolen" else 0.0}
    fleet = fleet_of(programs, 4, rule, 2000 if begin_others else 400, changes=(*changes, *back), **options)
    for when in range(0, 24, 2):
        fleet.at(float(when), lambda now: fleet.check())
    outcome = fleet.run()
    fleet.check()
    for record in outcome.history.records:
        assert record.ended >= record.arrival
        assert len(record.spans) == len(record.program.requests)  # each is answered once
        ends = [span[3] for span in record.spans]
        starts = [span[0] for span in record.spans]
        assert all(end <= start for end, start in zip(ends, starts[1:], strict=False))  # one after the other
    assert not fleet.sent
    assert sum(outcome.placed.values()) == sum(len(p.requests) for p in everyone(programs))


def one_program():
    requests = (TraceRequest(0, 200, 20, "t", 5.0), TraceRequest(220, 20, 20, "t", 5.0), TraceRequest(260, 20, 20))
    return TraceProgram("p", requests, 0.0)


def test_a_program_whose_replica_dies_is_computed_again_elsewhere():
    home = fleet_of([one_program()], 2).run()
    ((replica, _),) = home.placed.items()
    outcome = fleet_of([one_program()], 2, changes=[Change(2.0, replica, "die")]).run()
    assert outcome.placed == {replica: 1, 1 - replica: 2}
    assert outcome.resent == outcome.moves == 0
    assert outcome.cached_tokens < home.cached_tokens - 200


def test_a_request_whose_replica_dies_is_sent_again():
    outcome = fleet_of(
        [one_program()], 2, changes=[Change(0.02, replica, "die") for replica in (0, 1)] + [Change(3.0, 1, "join")]
    ).run()
    assert outcome.placed == {1: 3}
    assert outcome.resent == 1
    (record,) = outcome.history.records
    assert record.spans[0][0] >= 3.0


def test_forks_go_on_where_their_parent_is_and_sessions_of_a_product_meet():
    programs = families(30)
    fleet = fleet_of(programs, 3, pool=100_000)
    outcome = fleet.run()
    forks = [r for r in outcome.history.records if len(r.program.lineage) == 3]
    assert len(forks) > 5
    # Nothing is short and nobody waits, so what is there already decides.
    cached = outcome.cached_tokens / sum(s.cached for p in everyone(programs) for s in p.requests)
    assert cached > 0.9


def test_who_drains_keeps_what_it_has_until_it_is_emptied():
    programs = [one_program(), replace(one_program(), id="late", arrival_s=3.0)]
    home = fleet_of(programs[:1], 2).run()
    ((replica, _),) = home.placed.items()
    drained = fleet_of(programs, 2, changes=[Change(2.0, replica, "drain")]).run()
    assert drained.placed == {replica: 3, 1 - replica: 3}
    emptied = fleet_of(programs, 2, changes=[Change(2.0, replica, "empty")]).run()
    assert emptied.placed == {replica: 1, 1 - replica: 5}
    assert emptied.moves == 1


def test_an_idle_replica_takes_over_who_waits():
    # All go to the first replica, which has no room for the second: the other one takes it over.
    programs = [replace(one_program(), id=str(i), arrival_s=0.0) for i in range(2)]
    options = {"rule": "consistent-hash", "pool": 352}
    together = next(
        fleet
        for fleet in (fleet_of([replace(p, id=f"{p.id}{n}") for p in programs], 2, **options) for n in range(20))
        if len(fleet.run().placed) == 1
    )
    ids = [record.program.id for record in together.history.records]
    assert together.history.records[1].queue_s > 0
    stolen = fleet_of([replace(p, id=i) for p, i in zip(programs, ids, strict=True)], 2, steal_s=0.01, **options)
    outcome = stolen.run()
    assert outcome.moves >= 1
    assert len(outcome.placed) == 2
    assert outcome.history.records[1].queue_s < together.history.records[1].queue_s


def test_a_program_larger_than_the_pool_is_refused():
    large = TraceProgram("l", (TraceRequest(0, 5000, 5),), 0.0)
    outcome = fleet_of([one_program(), large], 2).run()
    assert outcome.history.refused == 1
    assert sum(outcome.placed.values()) == 3


@pytest.mark.parametrize("rule", FLEET_RULES)
def test_equal_studies_are_equal(rule):
    cell = replace(SMALL, rule=rule)
    first, second = (summary(cell, simulate(cell)) for _ in range(2))
    assert first == second
    assert first["programs"] == 24
    assert first["p50_jct_s"] <= first["p99_jct_s"]
    assert 0 < first["prefix_hit"] < 1


def test_studies_name_unknown_rules():
    with pytest.raises(ValueError, match=r"no-such.*thunderagent"):
        simulate(replace(SMALL, rule="no-such"))


def test_arrivals_and_programs_grow_with_the_fleet():
    one, _ = prepare("swe-batch", 1, 20, 0, 0.85, "h200-8b")
    four, _ = prepare("swe-batch", 4, 20, 0, 0.85, "h200-8b")
    assert len(four) == 4 * len(one)
    assert four[-1].arrival_s == pytest.approx(one[-1].arrival_s, rel=0.7)


def test_a_fleet_works_without_any_report():
    outcome = fleet_of(small_programs(10), 3, reporting=Reporting(period_s=0.0)).run()
    assert min(outcome.placed.values()) > 5
