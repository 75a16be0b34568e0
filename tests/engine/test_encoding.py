"""What the threads for clients' texts take, refuse and let go."""

from __future__ import annotations

import asyncio
import threading

import pytest
from support.engines import until

from astraea_jax.engine.encoding import LONG_TEXT, VERY_LONG_TEXT, TextPool, check_length, checked_ids, encode_prompt
from astraea_jax.errors import Overloaded, RequestError
from astraea_jax.models import resolve
from astraea_jax.models.tokenizer import Tokenizer

TOKENIZER = Tokenizer.from_folder(resolve("astraea-tiny"))


@pytest.fixture
def gate():
    """Work that lasts until the test opens it."""
    opened = threading.Event()
    yield opened
    opened.set()


async def test_short_texts_need_no_thread_and_long_ones_have_one():
    pool = TextPool(1)
    assert await pool.run("a", LONG_TEXT - 1, threading.current_thread) is threading.current_thread()
    names = [(await pool.run("a", size, threading.current_thread)).name for size in (LONG_TEXT, VERY_LONG_TEXT)]
    assert ["astraea-door-text" in names[0], "astraea-door-long-text" in names[1]] == [True, True]
    assert await encode_prompt(LONG_TEXT, lambda: [1]) == await encode_prompt(1, lambda: [1]) == [1]


async def test_ordinary_texts_do_not_wait_behind_very_long_ones(gate):
    pool = TextPool(1)
    long = [asyncio.create_task(pool.run("a", VERY_LONG_TEXT, gate.wait)) for _ in range(8)]
    await asyncio.sleep(0)
    assert await pool.run("b", LONG_TEXT, lambda: "done") == "done"
    assert not any(task.done() for task in long)
    gate.set()
    assert all(await asyncio.gather(*long))


async def test_what_waits_is_bounded_and_one_client_leaves_room_for_others(gate):
    pool = TextPool(1, 4 * LONG_TEXT)
    mine = [asyncio.create_task(pool.run("a", LONG_TEXT, gate.wait)) for _ in range(3)]
    await asyncio.sleep(0)
    with pytest.raises(Overloaded, match="try again later"):
        await pool.run("a", LONG_TEXT, gate.wait)
    others = asyncio.create_task(pool.run("b", LONG_TEXT, gate.wait))
    await asyncio.sleep(0)
    with pytest.raises(Overloaded):
        await pool.run("c", LONG_TEXT, gate.wait)
    gate.set()
    assert all(await asyncio.gather(*mine, others))
    assert await pool.run("c", 4 * LONG_TEXT, lambda: "all of it") == "all of it"


async def test_whoever_gives_up_frees_what_he_held(gate):
    pool, begun = TextPool(1, 4 * LONG_TEXT), threading.Event()
    first = asyncio.create_task(pool.run("a", LONG_TEXT, lambda: begun.set() or gate.wait()))
    await until(begun.is_set)
    ran = []
    second = asyncio.create_task(pool.run("b", 3 * LONG_TEXT, lambda: ran.append("second")))
    await asyncio.sleep(0)
    second.cancel()
    with pytest.raises(asyncio.CancelledError):
        await second
    third = asyncio.create_task(pool.run("c", 3 * LONG_TEXT, lambda: ran.append("third")))
    await asyncio.sleep(0)
    first.cancel()  # it has begun: its thread goes on, and its text counts until it ends
    await asyncio.sleep(0)
    with pytest.raises(Overloaded):
        await pool.run("d", LONG_TEXT, lambda: ran.append("fourth"))
    gate.set()
    await third
    assert ran == ["third"]


async def test_a_fault_of_the_work_is_its_callers():
    pool = TextPool(1)

    def broken():
        raise ValueError("no text")

    for _ in range(3):
        with pytest.raises(ValueError, match="no text"):
            await pool.run("a", LONG_TEXT, broken)
    assert not pool._waiting.total


def test_texts_that_cannot_fit_are_refused_by_their_length():
    assert TOKENIZER.longest_token is not None
    check_length(TOKENIZER, 10 * TOKENIZER.longest_token, 10)
    with pytest.raises(RequestError, match="context of 10 tokens"):
        check_length(TOKENIZER, 10 * TOKENIZER.longest_token + 1, 10)
    assert checked_ids([1] * 9, 10) == [1] * 9
    with pytest.raises(RequestError, match="10 tokens"):
        checked_ids([1] * 10, 10)


async def test_other_work_goes_on_while_a_long_text_is_tokenised():
    """The interpreter's lock is not held: an event loop turns many times meanwhile, however fast the machine is."""
    text, turns = "hello world 12 " * 100_000, 0
    task = asyncio.create_task(TextPool(1).run("a", len(text), lambda: len(TOKENIZER.encode(text, add_bos=True))))
    while not task.done():
        await asyncio.sleep(0.001)
        turns += 1
    assert await task > 1_000_000
    assert turns > 20
