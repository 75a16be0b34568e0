"""The filters of sampling leave what those of transformers leave."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from astraea_jax.engine.sampling import sample

pytestmark = [
    pytest.mark.parity,
    pytest.mark.filterwarnings("default"),  # theirs are not ours to turn into errors
]

DRAWS = 4096


@pytest.mark.parametrize("temperature", [0.5, 1.0, 5.0])
@pytest.mark.parametrize("top_k", [0, 1, 7, 64])
@pytest.mark.parametrize("top_p", [1e-9, 0.6, 0.95, 1.0])
@pytest.mark.parametrize("min_p", [0.0, 0.05, 1.0])
def test_the_same_tokens_can_be_drawn(temperature, top_k, top_p, min_p):
    import torch
    from transformers import generation

    logits = np.random.default_rng(3).normal(0, 1, 24).astype(np.float32)
    warpers = [generation.TemperatureLogitsWarper(temperature)]
    warpers += [generation.TopKLogitsWarper(top_k)] if top_k else []
    warpers += [generation.TopPLogitsWarper(top_p)] if top_p < 1 else []
    warpers += [generation.MinPLogitsWarper(min_p)]
    warped = torch.from_numpy(logits[None])
    for warper in warpers:
        warped = warper(None, warped)
    theirs = torch.softmax(warped, -1)[0].numpy()

    full = lambda value, dtype: jnp.full(DRAWS, value, dtype)  # noqa: E731
    tokens = sample(
        jnp.broadcast_to(logits, (DRAWS, logits.size)),
        full(temperature, jnp.float32),
        full(top_k, jnp.int32),
        full(top_p, jnp.float32),
        full(min_p, jnp.float32),
        full(0, jnp.uint32),
        jnp.arange(DRAWS, dtype=jnp.int32),
    )
    ours = np.bincount(np.asarray(tokens), minlength=logits.size) / DRAWS
    assert not ours[theirs == 0].any()
    np.testing.assert_allclose(ours, theirs, atol=5 * (0.25 / DRAWS) ** 0.5)
