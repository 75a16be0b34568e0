"""Attention as a few lines of NumPy, which the reference and the kernels of accelerators are held to."""

from __future__ import annotations

import numpy as np


def naive(q: np.ndarray, pages: np.ndarray, table: np.ndarray, kv_lens: np.ndarray, cu: np.ndarray) -> np.ndarray:
    """As ``astraea_jax.kernels.reference.attention``, one query and head at a time; zero where there is padding."""
    out = np.zeros_like(q)
    kv_heads, size, head = pages.shape[2:]
    group = q.shape[1] // kv_heads
    for r, kv_len in enumerate(kv_lens):
        used = table[r, : -(-kv_len // size)]
        context = pages[used].transpose(1, 2, 0, 3, 4).reshape(2, kv_heads, -1, head)
        for t in range(cu[r], cu[r + 1]):
            keys, values = context[:, :, : kv_len - (cu[r + 1] - t) + 1]
            for n in range(q.shape[1]):
                scores = keys[n // group] @ q[t, n] * head**-0.5
                weights = np.exp(scores - scores.max())
                out[t, n] = weights @ values[n // group] / weights.sum()
    return out
