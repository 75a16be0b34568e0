"""JSON with one absurd value somewhere."""

from __future__ import annotations

import copy

from hypothesis import strategies as st


@st.composite
def damaged(draw, fields, odd):
    """``fields``, JSON, with one place in it taken out or filled with something odd."""
    fields = node = copy.deepcopy(fields)
    while True:
        key = draw(st.sampled_from(sorted(node) if isinstance(node, dict) else range(len(node))))
        if isinstance(node[key], dict | list) and node[key] and draw(st.booleans()):
            node = node[key]
        elif isinstance(node, dict) and draw(st.integers(0, 4)) == 0:
            del node[key]
            return fields
        else:
            node[key] = draw(odd)
            return fields
