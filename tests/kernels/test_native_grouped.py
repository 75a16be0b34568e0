"""Products with the matrices of experts on CPUs: equal to NumPy's, each row by itself, and checked."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from astraea_jax.kernels.grouped import Blocks
from astraea_jax.kernels.native.grouped import GroupedNative
from astraea_jax.kernels.native.library import load
from astraea_jax.kernels.native.products import in_panels, put_in_panels
from astraea_jax.models.config import Experts, ModelConfig
from astraea_jax.models.experts import Mixture
from astraea_jax.models.formats import Format
from astraea_jax.models.matrix import Forms, Matrix, everywhere
from astraea_jax.models.product import bits

KINDS = ["float32", "bfloat16", "int8"]


@pytest.fixture(autouse=True, scope="module")
def loaded():
    load()


def stored(kind: str, experts: int, inputs: int, outputs: int) -> tuple[Matrix, np.ndarray]:
    """A random matrix of every expert in panels, and its numbers as float32."""
    rng = np.random.default_rng(inputs)
    matrix = Matrix((1, 1, outputs), jnp.float32, Format("int8") if kind == "int8" else None, nnx.Rngs(0))
    weight = jnp.asarray(rng.normal(0, 40, (experts, inputs, outputs)).astype(kind))
    numbers = np.asarray(weight, np.float32)
    if kind == "int8":
        matrix.scales = nnx.Param(jnp.asarray(rng.uniform(0.5, 2, (experts, 1, outputs)), jnp.float32))
        numbers = numbers * np.asarray(matrix.scales[...])
    matrix.weight = nnx.Param(in_panels(bits(weight) if kind == "bfloat16" else weight))
    return matrix, numbers


def rows_of(experts: np.ndarray, more: int = 0) -> Blocks:
    """Rows of these experts, and more that are not in use."""
    repeated = np.append(experts, np.full(more, experts[-1])).astype(np.int32)
    sizes = (np.arange(len(repeated)) < len(experts)).astype(np.int32)
    return Blocks(jnp.asarray(repeated), jnp.asarray(sizes), jnp.int32(len(experts)))


def random_rows(count: int, inputs: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(count).normal(size=(count, inputs)), jnp.float32)


@settings(max_examples=25, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    counts=st.lists(st.sampled_from([0, 0, 1, 2, 7, 30, 90]), min_size=1, max_size=6).filter(any),
    more=st.integers(0, 3),
    inputs=st.sampled_from([1, 9, 130, 200]),  # few to compile
    outputs=st.sampled_from([1, 64, 70, 200]),
)
def test_rows_are_multiplied_by_their_experts(kind, counts, more, inputs, outputs):
    matrix, numbers = stored(kind, len(counts), inputs, outputs)
    experts = np.repeat(np.arange(len(counts)), counts)
    x = random_rows(len(experts) + more, inputs)
    found = jax.jit(GroupedNative().product)(x, matrix, rows_of(experts, more))
    found, expected = np.asarray(found), np.asarray(x)[: len(experts), None] @ numbers[experts]
    np.testing.assert_allclose(found[: len(experts)], expected[:, 0], rtol=1e-4, atol=2e-2)
    assert not found[len(experts) :].any()


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_is_the_same_bits_whatever_is_beside_it(kind):
    """Alone, among few and many of its own expert, and where these are multiplied in several parts."""
    matrix, _ = stored(kind, 4, 700, 130)
    experts = np.repeat(np.arange(4), [3, 0, 1, 270])
    x = random_rows(len(experts), 700)
    whole = np.asarray(GroupedNative().product(x, matrix, rows_of(experts)))
    for first, end in ((0, 1), (2, 4), (3, 4), (4, 5), (4, 11), (3, 30), (100, 200), (250, 274)):
        found = GroupedNative().product(x[first:end], matrix, rows_of(experts[first:end]))
        np.testing.assert_array_equal(found, whole[first:end])


def test_activations_in_brain_floats_are_summed_in_float32():
    matrix, numbers = stored("bfloat16", 2, 300, 70)
    x = random_rows(5, 300).astype(jnp.bfloat16)
    experts = np.array([0, 0, 1, 1, 1])
    found = GroupedNative().product(x, matrix, rows_of(experts))
    assert found.dtype == jnp.bfloat16
    expected = np.asarray(x, np.float32)[:, None] @ numbers[experts]
    np.testing.assert_allclose(np.asarray(found, np.float32), expected[:, 0], rtol=2**-7, atol=1e-2)


@pytest.mark.parametrize(
    ("forms", "name"),
    [
        (everywhere(None), "native"),
        (everywhere(Format("int8")), "native"),
        (everywhere(Format("fp8")), "reference"),
        (everywhere(Format("int8", inputs=32)), "reference"),
        (everywhere(Format("int4", inputs=32)), "reference"),
        (lambda path: Format("int4", inputs=32) if path == "mlp.down" else None, "reference"),
    ],
)
def test_a_mixture_is_in_panels_as_a_whole_or_left_to_the_reference(forms: Forms, name):
    config = ModelConfig(8, 64, 96, 1, 4, 2, 16, 64, experts=Experts(3, 2, 32))
    made = Mixture(config, jnp.float32, forms, nnx.Rngs(0))
    shapes = made.gate_up.weight.shape, made.down.weight.shape
    assert GroupedNative().suited(made).name == "reference"
    for _ in range(2):  # as of two replicas
        put_in_panels(made)
    assert GroupedNative().suited(made).name == name
    stored_as = made.gate_up.weight.shape, made.down.weight.shape
    assert stored_as == (((3, 1, 64, 64), (3, 1, 32, 64)) if name == "native" else shapes)


@pytest.mark.parametrize(
    ("inputs", "blocks", "why"),
    [
        (17, rows_of(np.array([0, 1])), r"panels \[ceil\(O / 64\), I, 64\]"),
        (16, rows_of(np.array([0, 1, 1])), "every row has an expert"),
        (16, rows_of(np.array([0, 3])), "an expert that is not there"),
        (16, rows_of(np.array([-1, 1])), "an expert that is not there"),
        (16, rows_of(np.array([0, 1]))._replace(used=jnp.int32(3)), "of which 0 to B rows are used"),
        (16, rows_of(np.array([0, 1]))._replace(used=jnp.int32(-1)), "of which 0 to B rows are used"),
    ],
)
def test_what_does_not_fit_is_an_error(inputs, blocks, why):
    matrix, _ = stored("float32", 3, 16, 70)
    with pytest.raises(jax.errors.JaxRuntimeError, match=why):
        GroupedNative().product(random_rows(2, inputs), matrix, blocks).block_until_ready()


def test_weights_of_other_dtypes_are_an_error():
    matrix, _ = stored("float32", 2, 16, 70)
    matrix.weight = nnx.Param(matrix.weight[...].astype(jnp.float16))
    with pytest.raises(jax.errors.JaxRuntimeError, match="float32, bits of bfloat16 or int8"):
        GroupedNative().product(random_rows(2, 16), matrix, rows_of(np.array([0, 1]))).block_until_ready()
