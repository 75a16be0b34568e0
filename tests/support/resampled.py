"""What the device does to logits, in NumPy: without a compiler, and to compare with."""

from __future__ import annotations

import numpy as np

from astraea_jax.engine.sampling import MAX_LOGPROBS


def adjusted(logits: np.ndarray, entries: np.ndarray) -> np.ndarray:
    """As :func:`astraea_jax.engine.resampling.adjusted`, one entry after the other."""
    changed = logits.ravel().copy()
    for at, (bias, factor, addend) in zip(entries[:, 0], entries[:, 1:].view(np.float32), strict=True):
        if at < changed.size:
            biased = changed[at] + bias
            changed[at] = (biased / factor if biased > 0 else biased * factor) + addend
    return changed.reshape(logits.shape)


def masked(logits: np.ndarray, masks: np.ndarray) -> np.ndarray:
    """As :func:`astraea_jax.engine.resampling.masked`."""
    bits = np.unpackbits(np.ascontiguousarray(masks).view(np.uint8), axis=1, bitorder="little")
    return np.where(bits[:, : logits.shape[1]] == 1, logits, -np.inf)


def logprobs(logits: np.ndarray, sampled: np.ndarray) -> np.ndarray:
    """As :func:`astraea_jax.engine.resampling.logprobs`."""
    logp = (logits - np.log(np.exp(logits).sum(-1, keepdims=True))).astype(np.float32)
    ids = np.argsort(-logp, axis=-1, kind="stable")[:, :MAX_LOGPROBS].astype(np.int32)
    values = np.concatenate((logp[np.arange(len(logp)), sampled][:, None], np.take_along_axis(logp, ids, 1)), axis=1)
    return np.concatenate((values.view(np.int32), ids), axis=1)
