"""Block hashes: a chain over content and salt."""

from __future__ import annotations

from hashlib import sha256

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from astraea_jax.scheduler.prefix import beginnings, hash_blocks, salted


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


@given(st.integers(0, 1500), st.integers(0, 1500), st.integers(0, 1500))
def test_prompts_have_the_names_of_what_they_begin_with_in_common(common, left, right):
    a, b = [*range(common), *range(10_000, 10_000 + left)], [*range(common), *range(20_000, 20_000 + right)]
    names = dict(beginnings(a)), dict(beginnings(tuple(b)))
    shared = [tokens for name, tokens in names[0].items() if name in names[1]]
    assert shared == list(range(256, common + 1, 256))
    assert list(names[0].values()) == list(range(256, len(a) + 1, 256))


def test_beginnings_are_bounded_and_salted():
    prompt = range(100_000)
    assert [tokens for _, tokens in beginnings(prompt)][-1] == 32_768
    assert not {name for name, _ in beginnings(prompt, "a")} & {name for name, _ in beginnings(prompt, "b")}
