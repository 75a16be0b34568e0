"""What waits for a turn and what does not; nothing is lost, and the order stays."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from astraea_jax.engine.generation import Delta, Generation, Mailbox, TokenLogprob
from astraea_jax.engine.pacing import Pace
from astraea_jax.errors import StepFailed


class Still(Pace):
    """Turns come when the test says so."""

    def wake(self, reader) -> None:
        self._waiting.append(reader)


def started(pace: Pace | None) -> tuple[Mailbox, Generation]:
    mailbox = Mailbox(asyncio.get_running_loop())
    generation = Generation(mailbox, lambda _: None)
    return mailbox, generation if pace is None else generation.paced(pace)


def delta(i: int, reason: str | None = None) -> Delta:
    return Delta(f"{i},", (i,), reason, (TokenLogprob(i, -1.0, ()),))


async def test_the_first_delta_and_the_last_wait_for_no_turn():
    pace = Still()
    mailbox, generation = started(pace)
    mailbox.put(delta(0))
    assert await anext(generation) == delta(0)
    reading = asyncio.ensure_future(anext(generation))
    await asyncio.sleep(0)
    for i in (1, 2):
        mailbox.put(delta(i))
    for _ in range(5):
        await asyncio.sleep(0)
    assert not reading.done()
    mailbox.put(delta(3, "stop"))
    assert await reading == Delta("1,2,3,", (1, 2, 3), "stop", tuple(TokenLogprob(i, -1.0, ()) for i in (1, 2, 3)))
    with pytest.raises(StopAsyncIteration):
        await anext(generation)


async def test_all_that_wait_are_told_in_one_turn():
    pace = Still()
    streams = [started(pace) for _ in range(3)]
    for mailbox, generation in streams:
        mailbox.put(delta(0))
        await anext(generation)
        mailbox.put(delta(1))
    reading = [asyncio.ensure_future(anext(generation)) for _, generation in streams]
    await asyncio.sleep(0)
    streams[0][0].put(delta(2))
    pace._turn()
    assert [d.token_ids for d in await asyncio.gather(*reading)] == [(1, 2), (1,), (1,)]


async def test_a_failure_comes_after_what_came_before_it():
    mailbox, generation = started(Still())
    for item in (delta(0), delta(1), StepFailed("gone")):
        mailbox.put(item)
    assert (await anext(generation)).token_ids == (0, 1)
    with pytest.raises(StepFailed, match="gone"):
        await anext(generation)


async def test_what_comes_while_a_reader_wakes_is_read_at_once_and_its_turn_wakes_nobody():
    pace = Still()
    mailbox, generation = started(pace)
    mailbox.put(delta(0))
    await anext(generation)
    reading = asyncio.ensure_future(anext(generation))
    await asyncio.sleep(0)
    mailbox.put(delta(1))
    pace._turn()
    mailbox.put(delta(2))  # its reader is awake, and has not run yet
    assert (await reading).token_ids == (1, 2)
    reading = asyncio.ensure_future(anext(generation))
    await asyncio.sleep(0)
    pace._turn()
    for _ in range(5):
        await asyncio.sleep(0)
    assert not reading.done()
    mailbox.put(delta(3))
    pace._turn()
    assert (await reading).token_ids == (3,)


async def test_a_reader_that_gives_up_is_not_woken():
    pace = Still()
    mailbox, generation = started(pace)
    mailbox.put(delta(0))
    await anext(generation)
    reading = asyncio.ensure_future(anext(generation))
    await asyncio.sleep(0)
    mailbox.put(delta(1))
    reading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reading
    pace._turn()
    mailbox.put(delta(2, "stop"))


async def test_an_event_loop_with_nothing_to_do_makes_nobody_wait():
    """Without a share to keep there is a turn at any time."""
    mailbox, generation = started(Pace(share=float("inf")))
    for i in range(3):
        mailbox.put(delta(i))
        assert await anext(generation) == delta(i)


@settings(max_examples=500)
@given(st.lists(st.sampled_from(["put", "turn", "run"]), max_size=40), st.booleans())
@example(["run", "put", "run", "run", "put", "turn", "put", "run", "run", "turn", "run"], True)
async def test_nothing_is_lost_whenever_turns_come(acts, paced):
    pace = Still()
    mailbox, generation = started(pace if paced else None)
    reading = asyncio.ensure_future(_all(generation))
    put = 0
    for act in acts:
        match act:
            case "put":
                mailbox.put(delta(put))
                put += 1
            case "turn":
                pace._turn()
            case "run":
                await asyncio.sleep(0)
    mailbox.put(delta(put, "length"))
    deltas = await asyncio.wait_for(reading, 60)
    assert [i for d in deltas for i in d.token_ids] == list(range(put + 1))
    assert [d.finish_reason for d in deltas] == [None] * (len(deltas) - 1) + ["length"]
    assert Delta.joined(deltas).text == "".join(f"{i}," for i in range(put + 1))


async def _all(generation: Generation) -> list[Delta]:
    return [d async for d in generation]


async def test_a_turn_waits_while_the_latest_one_still_spends(monkeypatch):
    """Messages are written after the turn that wakes their streams, when the next turn has already been set."""
    spent, woken = [0.0], []
    monkeypatch.setattr("astraea_jax.engine.pacing.time.thread_time", lambda: spent[0])
    pace = Pace(share=1e-6, longest_s=600)
    reader = SimpleNamespace(wake=lambda: woken.append(spent[0]))
    pace.wake(reader)
    spent[0] = 5e-8
    pace.wake(reader)
    spent[0] = 1.0
    await asyncio.sleep(0.1)
    assert woken == [0.0]
    spent[0] = 0.0
    pace._turn()
    assert woken == [0.0, 0.0]
