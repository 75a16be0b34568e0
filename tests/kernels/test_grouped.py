"""Mixtures of experts as products of blocks: against every expert on every token, and each token by itself."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from support.experts import widened

from astraea_jax.kernels.grouped import GroupedProduct, dispatch, mixed, most_blocks
from astraea_jax.kernels.grouped_reference import GroupedReference
from astraea_jax.kernels.native.grouped import GroupedNative
from astraea_jax.kernels.native.library import load
from astraea_jax.kernels.native.products import put_in_panels
from astraea_jax.models.config import Experts, ModelConfig
from astraea_jax.models.experts import Mixture
from astraea_jax.models.formats import Format
from astraea_jax.models.matrix import Matrix, everywhere
from astraea_jax.models.mlp import activated
from astraea_jax.models.narrow import Codes
from astraea_jax.models.product import bits

FORMS = {
    "numbers": None,
    "int8": Format("int8"),
    "fp8 blocks": Format("fp8", inputs=32, outputs=16),
    "int4": Format("int4", inputs=32, scales="bfloat16"),
    "fp4": Format("fp4", inputs=32, scales="bfloat16"),
}


def mixture(experts: Experts, hidden: int = 64, form: Format | None = None, dtype=jnp.float32) -> Mixture:
    config = ModelConfig(8, hidden, 96, 1, 4, 2, 16, 64, experts=experts)
    made = Mixture(config, dtype, everywhere(form), nnx.Rngs(1))
    for name in ("router_bias", "gate_up_bias", "down_bias") if experts.biases else ():
        bias = getattr(made, name)
        bias[...] = jax.random.normal(jax.random.key(1), bias.shape, bias.dtype)
    return made


def tokens(count: int, hidden: int = 64) -> jax.Array:
    return jnp.asarray(np.random.default_rng(count).standard_normal((count, hidden)), jnp.float32)


def kernel(name: str, made: Mixture) -> GroupedProduct:
    """The kernel of this name, and the mixture's matrices brought into the order in which it reads them, in place."""
    if name == "reference":
        return GroupedReference()
    load()
    put_in_panels(made)
    return GroupedNative()


def run(made: Mixture, grouped: GroupedProduct | None = None):
    """The jitted mixture: router, experts and their sum."""
    return jax.jit(lambda x: mixed(grouped or GroupedReference(), x, *made.routed(x), made))


def weights(matrix: Matrix, expert: int) -> jax.Array:
    if matrix.form is None:
        return matrix.weight[expert].astype(jnp.float32)
    codes = Codes(*(None if x is None else x[expert] for x in matrix.codes))
    return widened(codes, matrix.form, jnp.dtype("float32"))


def every_expert_on_every_token(made: Mixture, x: jax.Array) -> jax.Array:
    index, share = made.routed(x)
    out = jnp.zeros(x.shape)
    for e in range(made.experts.count):
        gate_up = x @ weights(made.gate_up, e)
        if made.gate_up_bias is not None:
            gate_up = gate_up + made.gate_up_bias[e]
        down = activated(gate_up, made.block, made.activation, made.experts.activation_limit) @ weights(made.down, e)
        if made.down_bias is not None:
            down = down + made.down_bias[e]
        out = out + jnp.where(index == e, share, 0).sum(1, keepdims=True) * down
    return out


@pytest.mark.serves("reference", "tested", "experts", "MXFP4 weights")
@pytest.mark.serves("native", "tested", "experts", "MXFP4 weights")
@pytest.mark.parametrize("name", ["reference", "native"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("count", [1, 7, 150])
def test_experts_see_the_tokens_that_chose_them(form, count, name):
    made = mixture(Experts(5, 2, 32, biases=True, activation_limit=7.0), form=FORMS[form])
    x = tokens(count)
    expected = jax.jit(partial(every_expert_on_every_token, made))(x)
    np.testing.assert_allclose(run(made, kernel(name, made))(x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["reference", "native"])
@pytest.mark.parametrize(
    ("experts", "hidden", "form"),
    [
        (Experts(8, 3, 32), 64, "numbers"),
        (Experts(3, 2, 600), 640, "numbers"),
        (Experts(4, 1, 40), 80, "numbers"),
        (Experts(3, 2, 608), 640, "int4"),
    ],
    ids=str,
)
def test_a_token_is_the_same_among_any_others(experts, hidden, form, name):
    """Bit for bit, router included: one row at a time, in blocks of few and of many, wherever it stands."""
    made, x = mixture(experts, hidden, FORMS[form]), tokens(700, hidden)
    step = run(made, kernel(name, made))
    among_all = np.asarray(step(x))
    for count in (1, 24, 130):
        for first in (0, 5):
            np.testing.assert_array_equal(step(x[first : first + count]), among_all[first : first + count])


@pytest.mark.parametrize("name", ["reference", "native"])
def test_weights_of_experts_that_nobody_chose_are_not_read(name):
    made = mixture(Experts(6, 2, 32))
    x = tokens(9)
    index = jnp.tile(jnp.asarray([[1, 4]]), (9, 1))
    for matrix in (made.gate_up, made.down):
        matrix.weight[...] = matrix.weight[...].at[jnp.asarray([0, 2, 3, 5])].set(jnp.nan)
    assert np.isfinite(mixed(kernel(name, made), x, index, jnp.ones((9, 2)), made)).all()


@pytest.mark.parametrize("name", ["reference", "native"])
def test_experts_on_two_devices_add_up(name):
    """Choices of experts that a device does not hold add nothing there, whatever their index."""
    whole = mixture(Experts(6, 3, 32))
    x = tokens(20)
    index, share = whole.routed(x)
    parts = []
    for first in (0, 3):
        half = nnx.clone(whole)
        for matrix in (half.gate_up, half.down):
            matrix.weight = nnx.Param(matrix.weight[first : first + 3])
        parts.append(mixed(kernel(name, half), x, index - first, share, half))
    np.testing.assert_allclose(sum(parts), run(whole)(x), rtol=1e-5, atol=1e-6)


@given(st.data())
@settings(max_examples=12, deadline=None)
def test_blocks_suffice_for_any_choices(data):
    experts, k = data.draw(st.sampled_from([1, 9])), data.draw(st.sampled_from([1, 4]))
    count, size = data.draw(st.sampled_from([1, 40])), data.draw(st.sampled_from([1, 16]))  # few to compile
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    some = rng.integers(-1, experts + 1, data.draw(st.integers(1, experts)))  # few experts, or all; or none of these
    index = rng.choice(some, (count, k)).astype(np.int32)
    sent = jax.tree.map(np.asarray, jax.jit(dispatch, static_argnums=(1, 2))(jnp.asarray(index), experts, size))
    blocks = sent.blocks
    here = (index >= 0) & (index < experts)
    np.testing.assert_array_equal(sent.here, here)
    assert len(blocks.experts) == most_blocks(count * k, experts, size) >= blocks.used
    assert blocks.sizes.sum() == here.sum()
    assert (blocks.sizes[: blocks.used] > 0).all()
    assert (blocks.sizes[blocks.used :] == 0).all()
    assert (np.diff(blocks.experts) >= 0).all()
    rows = sent.rows[here]
    assert len(set(rows.tolist())) == len(rows), "every choice has a row of its own"
    np.testing.assert_array_equal(blocks.experts[rows // size], index[here])
    np.testing.assert_array_equal(sent.tokens[rows], np.nonzero(here)[0])
    assert (rows % size < blocks.sizes[rows // size]).all()


def test_a_large_weight_is_copied_in_parts(monkeypatch):
    made = mixture(Experts(3, 2, 96), hidden=640)
    x = tokens(70, 640)
    expected = run(made)(x)
    monkeypatch.setattr("astraea_jax.kernels.grouped_reference.COPIED", 640 * 128)
    np.testing.assert_array_equal(run(made)(x), expected)


@pytest.mark.parametrize("name", ["reference", "native"])
def test_brain_floats_are_widened_exactly(name):
    made = mixture(Experts(4, 2, 32), dtype=jnp.bfloat16)
    wide = nnx.clone(made)
    for narrow, matrix in ((made.gate_up, wide.gate_up), (made.down, wide.down)):
        matrix.weight = nnx.Param(matrix.weight[...].astype(jnp.float32))
        narrow.weight = nnx.Param(bits(narrow.weight[...]))
    x = tokens(9)
    np.testing.assert_array_equal(run(made, kernel(name, made))(x), run(wide, kernel(name, wide))(x))
