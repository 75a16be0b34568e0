"""The arrays of decoders by path, and whether those of two are the same."""

from __future__ import annotations

import numpy as np
from flax import nnx


def flat(decoder):
    return {".".join(map(str, path)): np.asarray(leaf[...]) for path, leaf in nnx.to_flat_state(nnx.state(decoder))}


def assert_same(a, b):
    a, b = flat(a), flat(b)
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)
