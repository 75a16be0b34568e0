"""Pages of layers with a window: who holds them, what stays valid, and what programs can go on from."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.device import complete
from support.loop import Loop, make, serve

from astraea_jax.scheduler.config import SchedulerConfig
from astraea_jax.scheduler.prefix import salted
from astraea_jax.scheduler.program import Program
from astraea_jax.scheduler.transfer import HostTier
from astraea_jax.scheduler.windows import Window, WindowPages, resumable

AMPLE = HostTier(pages=100, staging=100, layers=(1, 5))
"""Pages of four tokens, and window pages of five times their size."""


def loop_of(tokens=8, windows=40, pages=100, host=AMPLE, strategy="infercept", **more) -> Loop:
    window = Window(tokens, windows + 1)
    return Loop(make("program-fcfs", strategy, num_pages=pages + 1, host=host, window=window, **more))


def test_without_a_window_nobody_holds_anything():
    windows, program = WindowPages(None, 9, 4), Program(1, 0.0)
    windows.hold(program, [1, 2, 3], windows.first(12), 3)
    assert not program.window
    assert resumable(windows, 9, 4, lambda i: False) == 9
    assert windows.has(1000)


@given(tokens=st.integers(1, 20), size=st.integers(1, 8), at=st.integers(0, 100))
def test_every_page_that_the_next_token_sees_is_held(tokens, size, at):
    windows = WindowPages(Window(tokens, 100), 2, size)
    seen = max(0, at - tokens + 1)
    assert windows.first(at) <= seen // size <= windows.first(at) + 1


@given(there=st.lists(st.sampled_from("-dhb"), max_size=12), tokens=st.integers(1, 14), left=st.integers(0, 3))
def test_programs_go_on_from_as_far_as_their_window_is_there(there, tokens, left):
    """Of each page's window page the device, the host, both or nobody has it."""
    windows, size = WindowPages(Window(tokens, 100), 2, 4), 4
    most = max(0, len(there) * size - left)

    def possible(n):
        return re.fullmatch("[db]*[hb]*", "".join(there[windows.first(n) : -(-n // size)]))

    found = resumable(windows, most, size, lambda i: there[i] in "db", lambda i: there[i] in "hb")
    assert possible(found)
    assert not any(possible(n) for n in range(found + 1, most + 1) if n % size == 0 or n == most)


def test_the_longest_unused_window_page_is_taken_first():
    windows, a, b = WindowPages(Window(1, 4), 20, 4), Program(1, 0.0), Program(2, 0.0)
    windows.hold(a, [11, 12, 13], 0, 3)
    windows.hold(a, [11, 12, 13], 3, 3)
    windows.hold(b, [12], 0, 1)  # used again
    windows.hold(b, [12], 1, 1)
    assert (windows.available, windows.valid) == (3, 3)
    windows.hold(a, [11, 12, 13, 14, 15], 3, 5)
    assert [bool(windows.of[page]) for page in (11, 12, 13, 14, 15)] == [False, True, False, True, True]
    with pytest.raises(MemoryError, match="every window page is held"):
        windows.hold(b, [16, 17], 0, 2)


def test_a_long_context_holds_only_its_window():
    loop = loop_of(tokens=9, windows=4 + 3, pages=12)
    loop.scheduler.submit([1] * 40, 8, program="a", now=0.0)
    least = 7
    while loop.turn():
        least = min(least, loop.scheduler.stats().free_windows)
        loop.scheduler.check()
    assert least == 7 - 3  # two pages before that of the last token, and it


def test_no_more_run_than_have_room_for_their_windows():
    loop = loop_of(tokens=9, windows=2 * 4 + 3, max_seqs=8)
    for i in range(5):
        loop.scheduler.submit([i] * 20, 9, now=0.0)
    most = 0
    while loop.turn():
        most = max(most, loop.scheduler.stats().running)
    assert most == 2
    with pytest.raises(ValueError, match="no room for a single request"):
        SchedulerConfig(9, 4, 8, 12, 32, window=Window(9, 4 + 3))


def test_a_shared_beginning_is_gone_on_from_while_its_window_is_there():
    system = list(range(30))  # seven full pages
    for others, cached in ((60, 28), (150, 0)):
        loop = loop_of(windows=4 * 4 + 3, host=HostTier(), max_context=200)
        serve(loop, None, [*system, *[7] * others], 2, salt=salted(""))
        assert serve(loop, None, [*system, 8, 9], 2, salt=salted("")).cached_tokens == cached


def test_only_the_last_window_goes_to_the_host_and_comes_back():
    loop = loop_of(tokens=8, windows=40, pages=12)
    serve(loop, "a", [1] * 30, 3)  # 32 tokens on eight pages
    serve(loop, "b", [2] * 44, 1)
    stats = loop.scheduler.stats()
    assert (stats.offloaded_pages, stats.offloaded_windows, stats.dropped_pages) == (8, 2, 0)
    assert stats.host_pages == -(-(8 + 2 * 5) // 6)
    back = serve(loop, "a", [1] * 30 + complete([1] * 30, 3) + [5], 2)
    assert back.cached_tokens == 32
    stats = loop.scheduler.stats()
    assert (stats.restored_pages, stats.restored_windows) == (7, 2)


def test_what_has_lost_its_window_is_computed_again():
    """Without a host the last pages are dropped first, and what comes before may have no window left."""
    loop = loop_of(tokens=8, windows=4 + 3, pages=16, host=HostTier(), max_seqs=1)
    serve(loop, "a", [1] * 30, 3)
    serve(loop, None, [3] * 20, 1)  # takes the window pages that "a" has left
    serve(loop, "b", [2] * 44, 1)
    back = serve(loop, "a", [1] * 30 + complete([1] * 30, 3) + [5], 2)
    assert back.cached_tokens == 0
    assert back.resumed.why == "evicted"


def test_programs_that_wait_make_room_for_the_windows_of_others():
    """Pages are ample, window pages are not."""
    loop = loop_of(tokens=8, windows=4 * 4 + 3)
    for i in range(12):
        serve(loop, f"p{i}", [i] * 21, 3)
    stats = loop.scheduler.stats()
    assert stats.offloaded_windows > 0
    assert stats.dropped_pages == 0
    for i in range(12):
        assert serve(loop, f"p{i}", [i] * 21 + complete([i] * 21, 3) + [5], 2).cached_tokens == 23


def test_windows_of_forks_are_theirs_until_somebody_needs_them():
    loop = loop_of(tokens=8, windows=4 * 4 + 3, max_context=96, host=HostTier())
    serve(loop, "a", [1] * 21, 3)
    for i in range(6):
        loop.scheduler.branches.fork("a", f"f{i}", loop.now)
    loop.scheduler.check()
    text = [1] * 21 + complete([1] * 21, 3)
    assert serve(loop, "f0", [*text, 4], 3).cached_tokens == 20  # the last page is left to the others
    for i in range(4):
        loop.scheduler.submit([3 + i] * 70, 20, now=loop.now)
    loop.drain()
    assert serve(loop, "f1", [*text, 5], 3).finish_reason == "length"


def test_a_text_that_parts_from_what_the_host_holds_goes_on_where_a_window_is_left():
    loop = loop_of(tokens=5, windows=40, pages=14, max_context=56)
    serve(loop, "a", [1] * 20, 5)
    serve(loop, None, [2] * 50, 1)  # its pages go to the host, with one window page before the last
    parted = serve(loop, "a", [1] * 14 + [9] * 4, 2)
    assert parted.cached_tokens < 12
    last = serve(loop, "a", [*parted.prompt, *parted.output, 3], 2)
    assert last.cached_tokens == 19
