"""Frequencies of rotary embeddings, and the order of dimensions of heads that are rotated in part."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from astraea_jax.models.rope import Linear, LongRope, Proportional, Rope, Yarn


def turned(head, rope, position):
    """A checkpoint's head as transformers turns it: halves of its first dimensions are paired."""
    count = rope.rotated(len(head))
    angle = position * rope.frequencies(len(head))[: count // 2]
    a, b, rest = np.split(head, [count // 2, count])
    return np.concatenate([a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle), rest])


@given(half=st.integers(1, 16), position=st.integers(0, 50), data=st.data())
def test_partial_rotation_is_one_of_the_whole_head_in_another_order(half, position, data):
    size, pairs = 2 * half, data.draw(st.integers(1, half))
    rope = Rope(100.0, partial=(2 * pairs + 0.5) / size)
    order = list(rope.order(size))
    assert sorted(order) == list(range(size))
    head = np.random.default_rng(half).normal(size=size)
    ours = head[order]
    angle, (a, b) = position * rope.frequencies(size), np.split(ours, 2)
    ours = np.concatenate([a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)])
    np.testing.assert_allclose(ours, turned(head, rope, position)[order], atol=1e-6)


def test_a_whole_head_keeps_its_order():
    assert Rope().order(8) == tuple(range(8))


def test_kinds():
    plain = Rope(100.0).frequencies(8)
    np.testing.assert_allclose(plain, 100.0 ** (-np.arange(4) / 4), rtol=1e-6)
    np.testing.assert_allclose(Rope(100.0, Linear(4.0)).frequencies(8), plain / 4, rtol=1e-6)
    long = LongRope((1.0, 2.0, 3.0, 4.0), 1.25, True)
    np.testing.assert_allclose(Rope(100.0, long).frequencies(8), plain / [1, 2, 3, 4], rtol=1e-6)
    np.testing.assert_allclose(Rope(100.0, Proportional(0.5, 2.0)).frequencies(8), plain / 2 * [1, 1, 0, 0], rtol=1e-6)
    assert Rope(100.0, long, partial=0.5).magnitudes(16).tolist() == [1.25] * 4 + [1.0] * 4


def test_yarn_keeps_what_turns_often_and_stretches_what_does_not():
    freqs, plain = Rope(100.0, Yarn(8.0, 256, 16.0)).frequencies(64), Rope(100.0).frequencies(64)
    assert freqs[0] == plain[0]
    ratio = freqs / plain
    assert ratio[-1] == pytest.approx(1 / 8, rel=1e-5)
    assert ratio.max() == 1.0
    assert (np.diff(ratio) <= 1e-6).all()
    assert Rope(2.0, Yarn(8.0, 4, 1.1, 1.0)).frequencies(8).min() > 0
