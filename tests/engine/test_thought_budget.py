"""Budgets of thoughts: kept by every turn that masks allow, and by an engine."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.engines import settled
from support.grammars import EVEN, Only

from astraea_jax.engine.sampling import SamplingParams
from astraea_jax.engine.thought_budget import ThoughtBudget

BEGIN, END, V = 30, 31, 64


def allowed(matcher) -> list[int]:
    row = np.zeros(V // 32, np.int32)
    matcher.fill(row)
    found = np.flatnonzero(np.unpackbits(row.view(np.uint8), bitorder="little")).tolist()
    assert not matcher.free or len(found) == V
    return found


def thoughts(tokens: list[int], opened: bool) -> list[list[int]]:
    """The thoughts of a turn, the last of which may be open."""
    found, thinks = [[]] if opened else [], opened
    for token in tokens:
        if thinks:
            thinks = token != END
            found[-1] += [token] * thinks
        elif thinks := token == BEGIN:
            found.append([])
    return found


@given(
    st.integers(0, 9),
    st.booleans(),
    st.sampled_from([None, EVEN, Only(frozenset([1, BEGIN, END]))]),
    st.lists(st.one_of(st.integers(0, V - 1), st.just(BEGIN), st.just(END)), max_size=80),
)
def test_every_turn_keeps_its_budget(budget, opened, inner, wanted):
    matcher = ThoughtBudget(budget, BEGIN, END, opened, inner).matcher()
    tokens = []
    for token in wanted:
        may = allowed(matcher)
        assert may
        assert inner is None or set(may) <= inner.tokens
        tokens.append(token if token in may else may[token % len(may)])
        assert matcher.accept(tokens[-1])
    within = sum(map(len, thoughts(tokens, opened)))
    assert within <= budget or END not in (range(V) if inner is None else inner.tokens)
    assert not matcher.finished


def test_nothing_is_masked_while_there_is_budget():
    matcher = ThoughtBudget(2, BEGIN, END, opened=False).matcher()
    for token in (5, 6, BEGIN, 7):
        assert matcher.free
        assert matcher.accept(token)
    assert matcher.accept(8)
    assert not matcher.free
    assert allowed(matcher) == [END]
    assert matcher.accept(END)
    assert matcher.free


@pytest.mark.parametrize("end", [0, 31, 32, 63])
def test_each_token_can_end_a_thought(end):
    assert allowed(ThoughtBudget(0, 1, end, opened=True).matcher()) == [end]


async def test_an_engine_ends_thoughts(engine):
    params = SamplingParams(max_tokens=20, ignore_eos=True)
    prompt = [5, 6, 7]
    free = list(itertools.chain.from_iterable([d.token_ids async for d in engine.generate(prompt, params)]))
    begin, end = [token for token in range(256) if token not in free][:2]
    for budget in (0, 1, 7):
        bounded = SamplingParams(max_tokens=20, ignore_eos=True, grammar=ThoughtBudget(budget, begin, end, opened=True))
        got = list(itertools.chain.from_iterable([d.token_ids async for d in engine.generate(prompt, bounded)]))
        assert got[: budget + 1] == [*free[:budget], end]
        again = [*prompt, *got[: budget + 1]]
        rest = SamplingParams(max_tokens=19 - budget, ignore_eos=True)
        after = list(itertools.chain.from_iterable([d.token_ids async for d in engine.generate(again, rest)]))
        assert got[budget + 1 :] == after
    await settled(engine)
