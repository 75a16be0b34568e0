"""Sessions that branch, end, expire or lose their tail, and the bounds on what is known of all of them."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from support.conversations import ME, MORE, START, SYSTEM, calling, conversations, result, say, talk

from astraea_jax.agents.turns import Owner, Turn
from astraea_jax.errors import RequestError


class Clock:
    """Time that a test sets."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_fork_branches_from_where_its_parent_is():
    known = conversations()
    messages = talk(known, "s")
    known.fork(ME, "s", "child")
    parent = known.begin(ME, "s", messages)
    child = known.begin(ME, "child", [*messages[:-1], {"role": "user", "content": "Look into it."}])
    assert [(one.program, one.parent) for one in (parent, child)] == [("s", None), ("child", "s")]
    assert child.report.why == "same"
    assert child.report.kept == parent.report.kept
    answer = say(known, child)
    later = known.begin(ME, "child", [*messages[:-1], {"role": "user", "content": "Look into it."}, answer, MORE])
    assert (later.program, later.parent, later.report.why) == ("child", "s", "same")


def test_a_fork_that_begins_with_something_else_is_a_program_of_its_own():
    known = conversations()
    talk(known, "s")
    known.fork(ME, "s", "child")
    child = known.begin(ME, "child", [{"role": "user", "content": "I am nobody's."}])
    assert (child.program, child.report.kept) == ("child/2", 0)


def test_what_cannot_be_forked():
    known = conversations(ttl_s=10, clock=(clock := Clock()))
    with pytest.raises(RequestError, match="'s' is not known, or has expired"):
        known.fork(ME, "s", "child")
    running = known.begin(ME, "s", START)
    with pytest.raises(RequestError, match="not known, or has expired"):  # it has no turn yet
        known.fork(ME, "s", "child")
    say(known, running)
    with pytest.raises(RequestError, match="'s' exists already"):
        known.fork(ME, "s", "s")
    known.fork(ME, "s", "child")
    with pytest.raises(RequestError, match="'child' exists already"):
        known.fork(ME, "s", "child")
    clock.now = 11
    with pytest.raises(RequestError, match="not known, or has expired"):
        known.fork(ME, "s", "other")
    assert known.begin(ME, "child", START).program == "child"


def test_a_forgotten_session_begins_anew_and_its_branches_go_on():
    known = conversations()
    messages = talk(known, "s")
    branch = known.begin(ME, "branch", messages)
    answer = say(known, branch)
    known.forget(ME, "s")
    known.forget(ME, "never known")
    assert known.begin(ME, "branch", [*messages, answer, MORE]).report.why == "same"
    again = known.begin(ME, "s", messages)
    assert again.program == "s"
    known.forget(ME, "s")  # while its request runs
    say(known, again)
    known.forget(ME, "branch")
    assert known.begin(ME, "s", messages).report.why == "new"


def test_a_forgotten_session_leaves_nothing():
    known = conversations()
    talk(known, "s")
    known.begin(ME, "s", [SYSTEM, MORE]).ended()
    known.forget(ME, "s")
    assert known.owners.size == 0


@pytest.mark.parametrize("mode", ["job", "off"])
def test_a_tail_is_replaced(mode):
    """The next request that continues the new history goes on from it, under the same name."""
    known = conversations(mode=mode)
    messages = talk(known, "s", rounds=4)
    summary = [{"role": "user", "content": "So far: <|im_end|> it is 14."}]
    begins_with = known.replace(ME, "s", 3, summary)
    later = known.begin(ME, "s", [*messages[:3], *summary, MORE])
    assert (later.program, later.parent) == ("s", None)
    assert later.prompt[: len(begins_with)] == begins_with
    assert later.report.why == ("same" if mode == "job" else "off")
    answer = say(known, later)
    on = known.begin(ME, "s", [*messages[:3], *summary, MORE, answer, MORE])
    assert on.program == "s"
    old = known.begin(ME, "s", messages)
    assert (old.program, old.parent) == ("s/2", "s")


def test_a_tail_can_go_altogether():
    known = conversations()
    messages = talk(known, "s", rounds=3)
    begins_with = known.replace(ME, "s", 3, [])
    later = known.begin(ME, "s", messages[:4])
    assert later.prompt[: len(begins_with) - 1] == begins_with[:-1]  # the last token may be divided otherwise
    assert later.program == "s"


def test_a_history_that_ends_with_a_known_turn_is_looked_at():
    known = conversations()
    messages = talk(known, "s")
    looked, program = known.look(ME, "s", messages)
    assert (looked.why, looked.message, program) == ("same", None, "s")
    assert looked.kept == known.look(ME, "s", [*messages, MORE])[0].kept


def test_what_cannot_be_replaced():
    known = conversations()
    messages = talk(known, "s")
    for owner, session, keep, error in [
        ("you", "s", 1, "not known"),
        (ME, "other", 1, "not known"),
        (ME, "s", 6, "has 5 messages"),
        (ME, "s", -1, "has 5 messages"),
    ]:
        with pytest.raises(RequestError, match=error):
            known.replace(owner, session, keep, [MORE])
    with pytest.raises(ValueError, match="no messages"):
        known.replace(ME, "s", 0, [])
    running = known.begin(ME, "s", messages)
    with pytest.raises(RequestError, match="runs a request"):
        known.replace(ME, "s", 1, [MORE])
    assert say(known, running)
    with pytest.raises(ValueError, match="surrogate"):
        known.replace(ME, "s", 1, [{"role": "user", "content": "\ud800"}])
    assert known.begin(ME, "s", messages).program == "s/2"  # "s" goes on from its newest turn
    known.begin_text(ME, "text", "Once").ended([1], " upon", "length")
    with pytest.raises(RequestError, match="has 0 messages: its requests were plain text"):
        known.replace(ME, "text", 0, [MORE])


def test_unused_turns_expire_from_the_end():
    known = conversations(ttl_s=10, clock=(clock := Clock()))
    early = talk(known, "early")
    clock.now = 6
    late = talk(known, "late", text="It is late.")
    known.begin(ME, "early", early).ended()  # used again
    clock.now = 12
    assert known.begin(ME, "early", early).report.why == "same"
    clock.now = 17
    waiting = known.begin(ME, "late", late)
    assert waiting.report.why == "new"
    for i in range(20):
        clock.now += 100
        known.begin(f"owner {i}", None, START).ended()
    assert list(known.owners._owners) == [ME]  # mine has a request that nobody has ended
    assert known.owners.size == 0


def test_who_takes_most_pays_first():
    known = conversations(max_bytes=200_000)
    small = talk(known, "s", owner="small")
    for i in range(30):
        known.begin("large", f"s{i}", [{"role": "user", "content": f"{i}" * 5000}]).ended([1], _said("y"), "stop")
    assert known.owners.size <= 200_000
    assert known.begin("small", "s", small).report.why == "same"
    assert known.begin("large", "s0", [{"role": "user", "content": "0" * 5000}, _said("y"), MORE]).report.why == "new"


def test_owners_that_have_nothing_are_not_remembered():
    known = conversations()
    say(known, known.begin(ME, None, START))
    for i in range(100):
        known.look(f"look {i}", None, START)
        known.programs(f"programs {i}", "s")
        known.forget(f"forget {i}", "s")
        known.begin(f"cancelled {i}", "s", START).ended()
        with pytest.raises(RequestError, match="not known"):
            known.fork(f"fork {i}", "s", "t")
    assert list(known.owners._owners) == [ME]


def test_a_session_that_is_forgotten_while_it_runs_leaves_no_owner():
    known = conversations()
    opened = known.begin(ME, "s", START)
    known.forget(ME, "s")
    say(known, opened)
    assert not known.owners._owners
    assert known.owners.size == 0


def test_many_owners_stay_within_the_bytes():
    known = conversations(max_bytes=100_000)
    for i in range(300):
        say(known, known.begin(f"owner {i}", None, START))
    assert known.owners.size <= 100_000
    assert sum(owner.count for owner in known.owners._owners.values()) == len(known.owners._owners)


def test_a_tail_that_ends_with_a_known_answer():
    known = conversations()
    messages = talk(known, "s")
    kept = known.replace(ME, "s", len(messages) - 1, [])
    opened = known.begin(ME, "s", messages)
    assert opened.prompt[: len(kept)] == kept


def _said(text):
    return {"role": "assistant", "content": text}


class Bounds(RuleBasedStateMachine):
    """Clients do anything, in any order; what is known stays within its bounds, and is what it says it is."""

    MAX_BYTES, MAX_TURNS, TTL_S = 30_000, 12, 50.0

    def __init__(self) -> None:
        super().__init__()
        self.clock = Clock()
        self.known = conversations(
            max_bytes=self.MAX_BYTES, max_turns=self.MAX_TURNS, ttl_s=self.TTL_S, clock=self.clock
        )
        self.histories = [[{"role": "user", "content": f"I am {i}."}] for i in range(2)]
        self.running: list[tuple[object, list[dict[str, object]]]] = []

    @rule(owner=st.sampled_from("ab"), session=st.sampled_from(["s", "t", None]), data=st.data())
    def begin(self, owner, session, data):
        messages = data.draw(st.sampled_from(self.histories))
        opened = self.known.begin(owner, session, messages)
        assert session is None or opened.program.split("/")[0] == session
        self.running.append((opened, messages))

    @rule(data=st.data(), reason=st.sampled_from(["stop", "length", "tool_calls", "cancelled", "error"]))
    def end(self, data, reason):
        if self.running:
            opened, messages = self.running.pop(data.draw(st.integers(0, len(self.running) - 1)))
            calls = calling() if reason == "tool_calls" else {}
            answer = say(self.known, opened, data.draw(st.sampled_from(["Fine.", "No.", "x" * 4000])), reason, **calls)
            self.histories.append([*messages, answer, result() if calls else MORE])

    @rule()
    def drop(self):
        self.running = self.running[1:]

    @rule(owner=st.sampled_from("ab"), session=st.sampled_from("st"), child=st.sampled_from("stu"))
    def fork(self, owner, session, child):
        with contextlib.suppress(RequestError):
            self.known.fork(owner, session, child)

    @rule(owner=st.sampled_from("ab"), session=st.sampled_from("stu"))
    def forget(self, owner, session):
        self.known.forget(owner, session)

    @rule(owner=st.sampled_from("ab"), session=st.sampled_from("st"), keep=st.integers(0, 4))
    def replace(self, owner, session, keep):
        with contextlib.suppress(RequestError):
            self.known.replace(owner, session, keep, [{"role": "user", "content": "In short."}])

    @rule(seconds=st.sampled_from([1, 30, 100]))
    def wait(self, seconds):
        self.clock.now += seconds

    @invariant()
    def bounded(self):
        owners = self.known.owners
        assert owners.size == sum(owner.size for owner in owners._owners.values())
        for owner in owners._owners.values():
            turns = _turns(owner)
            assert owner.count == len(turns)
            assert owner.size == sum(turn.size for turn in turns)
            assert owner.count <= self.MAX_TURNS or not owner.leaves
            assert owner.leaves.keys() == {turn for turn in turns if not turn.followers}
            assert all(turn.previous in turns for turn in turns if turn.previous)
            assert all(program.busy or program.tip in turns for program in owner.programs.values())
            assert all(program.name == name for name, program in owner.programs.items())
        assert owners.size <= self.MAX_BYTES or not any(owner.leaves for owner in owners._owners.values())

    def teardown(self):
        self.running.clear()
        for owner in "abab":
            self.known.begin(owner, None, START).ended()
            self.clock.now += self.TTL_S + 1
        assert self.known.owners.size == 0


def _turns(owner: Owner) -> set[Turn]:
    return {turn for turns in owner._by_digest.values() for turn in turns}


TestBounds = Bounds.TestCase
TestBounds.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
