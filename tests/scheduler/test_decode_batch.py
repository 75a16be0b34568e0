"""The decode batch against a list of requests that are looked at one by one."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from astraea_jax.scheduler.decode_batch import DecodeBatch
from astraea_jax.scheduler.program import Program, Request

PAGE = 4


def decoding(number: int, prompt: int, max_tokens: int) -> Request:
    """A request that has its prompt computed, on as many pages as that takes."""
    request = Request(number, Program(number, 0.0), range(prompt), max_tokens, frozenset(), False, 0.0, page_size=PAGE)
    request.slot, request.num_computed = number, prompt
    request.capacity = -(-prompt // PAGE) * PAGE
    return request


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 9), st.integers(2, 12)), min_size=1, max_size=30),
    st.randoms(use_true_random=False),
)
def test_every_request_is_told_of_in_time_and_none_before(arrivals, rng):
    batch, here, expected = DecodeBatch(len(arrivals)), [], {}
    coming = list(enumerate(arrivals))
    while coming or here:
        for _ in range(min(len(coming), rng.randint(0, 3) if here else 1)):
            number, (prompt, max_tokens) = coming.pop()
            request = decoding(number, prompt, max_tokens)
            batch.add(request)
            here.append(request)
            expected[request] = prompt
        for request in here:
            if request.num_computed < request.max_computed and rng.random() < 0.2:  # preempted, and back at once
                batch.discard(request)
                batch.add(request)
        full = batch.full()
        done = [r for r in here if r.num_computed == r.max_computed]
        assert all(r not in batch for r in done)
        here = [r for r in here if r not in done]
        assert sorted(r.number for r in full) == sorted(r.number for r in here if r.num_computed == r.capacity)
        for request in full:
            if rng.random() < 0.8:
                request.capacity += PAGE
                batch.schedule(request)
            else:
                batch.discard(request)
                here.remove(request)
        requests, outputs, slots, starts = batch.advance(room=2)
        assert len(slots) == len(starts) == len(requests) + 2
        assert starts[:-2].tolist() == [expected[r] for r in requests]
        assert slots[:-2].tolist() == [r.slot for r in requests]
        assert all(output is r.output for r, output in zip(requests, outputs, strict=True))
        for request in requests:
            expected[request] += 1
            request.output.append(0)
            assert request.num_computed == expected[request]
        assert [requests[row] for row in batch.last()] == [r for r in requests if r.num_computed == r.max_computed]
        batch.check()


def test_who_has_left_is_advanced_no_more():
    batch, request = DecodeBatch(1), decoding(0, 3, 9)
    batch.add(request)
    batch.advance(2)
    batch.discard(request)
    batch.advance()
    assert request.num_computed == 5
    request.num_computed = 0
    assert request.num_computed == 0
