"""Which experts see a token, and with what weights."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from astraea_jax.models.config import Experts
from astraea_jax.models.experts import chosen_experts
from astraea_jax.models.rowwise import rowwise


def draw(*shape: int) -> np.ndarray:
    return np.random.default_rng(shape).standard_normal(shape).astype(np.float32)


def softmax(x: np.ndarray) -> np.ndarray:
    powers = np.exp(x - x.max())
    return powers / powers.sum()


def expected(experts: Experts, logits: np.ndarray, correction: np.ndarray) -> dict[int, float]:
    """By the definitions, for one token."""
    if experts.scores == "softmax of chosen":
        best = np.argsort(-logits, kind="stable")[: experts.chosen]
        return dict(zip(best.tolist(), (experts.scale * softmax(logits[best])).tolist(), strict=True))
    scores = softmax(logits) if experts.scores == "softmax" else 1 / (1 + np.exp(-logits))
    rank = (scores + correction).reshape(experts.groups, -1)
    if experts.groups > 1:
        kept = np.argsort(-np.sort(rank)[:, -2:].sum(1), kind="stable")[: experts.chosen_groups]
        rank = np.where(np.isin(np.arange(experts.groups), kept)[:, None], rank, -np.inf)
    best = np.argsort(-rank.reshape(-1), kind="stable")[: experts.chosen]
    weights = scores[best] / (scores[best].sum() if experts.normalized else 1)
    return dict(zip(best.tolist(), (experts.scale * weights).tolist(), strict=True))


@pytest.mark.parametrize(
    "experts",
    [
        Experts(16, 3, 8),
        Experts(16, 3, 8, normalized=False, scale=2.0),
        Experts(16, 3, 8, "softmax of chosen"),
        Experts(16, 3, 8, "sigmoid", corrected=True, scale=1.8),
        Experts(16, 3, 8, "sigmoid", corrected=True, groups=4, chosen_groups=2),
        Experts(11, 4, 8),
    ],
    ids=str,
)
def test_routers_choose_and_weigh(experts):
    logits, correction = draw(20, experts.count), 0.3 * draw(experts.count)
    if not experts.corrected:
        correction[:] = 0
    index, weights = jax.jit(
        lambda x: chosen_experts(experts, x, jnp.asarray(correction) if experts.corrected else None)
    )(logits)
    for t in range(20):
        wanted = expected(experts, logits[t], correction)
        assert index[t].tolist() == list(wanted)
        np.testing.assert_allclose(weights[t], list(wanted.values()), rtol=2e-6)


@pytest.mark.parametrize("scores", ["softmax", "softmax of chosen", "sigmoid"])
def test_ties_go_to_the_lower_index(scores):
    logits = jnp.asarray([[1.0, 2.0, 2.0, 2.0, 0.0], [0.0, 0.0, 0.0, 0.0, 0.0], [3.0, 1.0, 3.0, 1.0, 1.0]])
    index, weights = chosen_experts(Experts(5, 3, 8, scores), logits, None)
    assert index.tolist() == [[1, 2, 3], [0, 1, 2], [0, 2, 1]]
    assert np.unique(weights[1]).size == 1


@pytest.mark.parametrize("scores", ["softmax", "softmax of chosen", "sigmoid"])
@pytest.mark.parametrize("corrected", [False, True])
def test_a_token_is_routed_the_same_among_any_others(scores, corrected):
    """Bit for bit."""
    experts = Experts(24, 4, 8, scores, corrected=corrected)
    weight, x = draw(768, 24), draw(300, 768)
    correction = jnp.asarray(draw(24)) if corrected else None
    route = jax.jit(lambda x: chosen_experts(experts, rowwise(x, jnp.asarray(weight)), correction))
    among_all = jax.tree.map(np.asarray, route(x))
    for rows in (slice(0, 1), slice(7, 8), slice(7, 23), slice(100, 200)):
        for ours, every in zip(route(x[rows]), among_all, strict=True):
            np.testing.assert_array_equal(ours, every[rows])
