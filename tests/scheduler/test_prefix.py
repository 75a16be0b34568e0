"""Block hashes: a chain over content and salt."""

from __future__ import annotations

from hashlib import sha256

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from astraea_jax.scheduler.prefix import hash_blocks, salted


def test_a_hash_covers_what_precedes_and_the_page():
    tokens = np.array([1, 2, 3, 4, 5], np.int32)
    first, second = hash_blocks(tokens, 2, salted("s"))
    content = tokens.astype("<i4").tobytes()
    assert first == sha256(salted("s") + content[:8]).digest()
    assert second == sha256(first + content[8:16]).digest()


@given(
    st.lists(st.integers(0, 3), max_size=24),
    st.lists(st.integers(0, 3), max_size=24),
    st.integers(1, 5),
    st.sampled_from(["", "x"]),
)
def test_hashes_are_equal_as_far_as_pages_and_salts_are(a, b, size, salt):
    left = hash_blocks(np.array(a, np.int32), size, salted(""))
    right = hash_blocks(np.array(b, np.int32), size, salted(salt))
    same = 0
    while salt == "" and (same + 1) * size <= min(len(a), len(b)) and a[: (same + 1) * size] == b[: (same + 1) * size]:
        same += 1
    assert left[:same] == right[:same]
    assert not set(left[same:]) & set(right[same:])
    extended = hash_blocks(np.array(a[size:], np.int32), size, left[0]) if left else []
    assert left[1:] == extended
