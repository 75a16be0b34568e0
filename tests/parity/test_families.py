"""Configurations of published models say here what they say to transformers."""

from __future__ import annotations

import json

import numpy as np
import pytest

from astraea_jax.models.config_file import read_json
from astraea_jax.models.families import read_config
from astraea_jax.models.family_table import FAMILIES
from astraea_jax.models.published_fields import FIELDS

pytestmark = [
    pytest.mark.parity,
    pytest.mark.filterwarnings("default"),  # theirs are not ours to turn into errors
]

LEFT_OUT = (
    *("head_dim", "sliding_window", "rope_parameters", "rope_scaling", "rope_theta", "num_key_value_heads"),
    "max_position_embeddings",
)
"""Fields without which a file is read by the defaults of its class."""
CASES = [(name, None) for name in FIELDS] + [
    (name, field)
    for name, fields in FIELDS.items()
    for field in LEFT_OUT
    if field in fields and not (field == "head_dim" and name.startswith("glm"))  # which makes it odd
]


@pytest.mark.parametrize(("name", "missing"), CASES)
def test_published_models(name, missing, tmp_path):
    import transformers

    fields = {field: value for field, value in FIELDS[name].items() if field != missing}
    family = FAMILIES[fields["architectures"][0]]
    (tmp_path / "config.json").write_text(json.dumps({**fields, "model_type": family.model_type}))
    theirs = transformers.AutoConfig.from_pretrained(tmp_path)
    ours = read_config(read_json(tmp_path / "config.json"))
    assert ours.head_dim == (getattr(theirs, "head_dim", None) or theirs.hidden_size // theirs.num_attention_heads)
    assert ours.num_kv_heads == theirs.num_key_value_heads
    assert ours.max_position == theirs.max_position_embeddings
    assert (ours.rms_eps, ours.tie_embeddings) == (theirs.rms_norm_eps, theirs.tie_word_embeddings)
    window = getattr(theirs, "sliding_window", None)
    types = getattr(theirs, "layer_types", None) or [_one_type(window, ours.max_position)] * ours.num_layers
    assert ours.sliding == tuple(i for i, kind in enumerate(types) if kind == "sliding_attention")
    assert ours.window == (window if ours.sliding else None)
    check_rope(ours.rope, ours.head_dim, theirs, "full_attention")
    if ours.window_rope is not None:
        check_rope(ours.window_rope, ours.head_dim, theirs, "sliding_attention")


def _one_type(window, max_position):
    """The type of all layers, where the class knows one only; a window as long as the context hides nothing."""
    return "full_attention" if window is None or window >= max_position else "sliding_attention"


def check_rope(rope, head_dim, theirs, kind):
    """Frequencies and magnitudes are those of transformers."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    nested = kind in theirs.rope_parameters
    parameters = theirs.rope_parameters[kind] if nested else theirs.rope_parameters
    rotated = int(head_dim * parameters.get("partial_rotary_factor", 1.0))
    if parameters["rope_type"] == "default":
        expected, magnitude = parameters["rope_theta"] ** (-np.arange(0, rotated, 2) / rotated), 1.0
    else:
        theirs.head_dim = head_dim  # Phi-3's class has none, and the function would take None
        length = theirs.max_position_embeddings if parameters["rope_type"] == "longrope" else None
        layer = {"layer_type": kind} if nested else {}
        expected, magnitude = ROPE_INIT_FUNCTIONS[parameters["rope_type"]](theirs, "cpu", seq_len=length, **layer)
    found = rope.frequencies(head_dim)
    np.testing.assert_allclose(found[: rotated // 2], np.asarray(expected), rtol=1e-5)
    assert not found[rotated // 2 :].any()
    np.testing.assert_allclose(rope.magnitudes(head_dim)[: rotated // 2], magnitude, rtol=1e-6)
