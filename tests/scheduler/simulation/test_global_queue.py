"""ThunderAgent's global queue, by hand."""

from astraea_jax.scheduler.simulation.global_queue import GlobalQueue


def test_programs_start_where_most_room_is_and_wait_behind_paused_ones():
    queue = GlobalQueue(100)
    assert queue.arrives("a", 60, [0, 1], 0.0) == 0
    assert queue.arrives("b", 50, [0, 1], 0.0) == 1
    assert queue.arrives("c", 70, [0, 1], 0.0) is None
    assert queue.arrives("d", 10, [0, 1], 0.0) is None  # there is room, but somebody waits
    queue.forget("a")
    assert queue.tick([0, 1], {"b"}, 5.0) == {"d": 0, "c": 0}
    assert queue.arrives("c", 70, [0, 1], 5.0) == 0


def test_who_waits_for_a_tool_is_paused_first_and_then_the_shortest():
    queue = GlobalQueue(100)
    for name, tokens in (("long", 50), ("short", 20), ("acts", 30)):
        assert queue.arrives(name, tokens, [0], 0.0) == 0
    queue.ended("acts", 30, 5.0)
    queue.ended("long", 90, 5.0)
    assert queue.arrives("long", 95, [0], 5.0) == 0
    queue.tick([0], {"long"}, 5.0)
    assert queue.arrives("long", 95, [0], 5.0) == 0
    assert queue.arrives("short", 20, [0], 5.0) is None
    assert queue.arrives("acts", 31, [0], 5.0) is None


def test_contexts_of_tool_waits_fade():
    queue = GlobalQueue(100)
    assert queue.arrives("a", 90, [0], 0.0) == 0
    queue.ended("a", 90, 0.0)
    assert queue.arrives("b", 80, [0], 1.0) is None
    assert queue.tick([0], (), 10.0) == {"b": 0}


def test_programs_of_a_dead_replica_go_on_elsewhere_and_the_largest_has_one_alone():
    queue = GlobalQueue(100)
    assert queue.arrives("a", 60, [0, 1], 0.0) == 0
    assert queue.arrives("a", 130, [1], 1.0) is None
    assert queue.tick([1], (), 5.0) == {"a": 1}
    assert queue.tick([], (), 10.0) == {}
