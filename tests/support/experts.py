"""Random choices of experts, matrices in every form, and what grouped products must make of them, in NumPy."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from hypothesis import strategies as st

from astraea_jax.kernels.grouped import dispatch
from astraea_jax.models.config import Experts, ModelConfig
from astraea_jax.models.experts import Mixture
from astraea_jax.models.formats import Format
from astraea_jax.models.matrix import Matrix, everywhere
from astraea_jax.models.mlp import activated
from astraea_jax.models.narrow import Codes, dequantized

FORMATS: dict[str, Format | None] = {
    "numbers": None,
    "int8": Format("int8"),
    "fp8": Format("fp8"),
    "fp8 blocks": Format("fp8", inputs=32, outputs=16),
    "int8 groups": Format("int8", inputs=64, zeros=True),
    "int4": Format("int4", inputs=32, scales="bfloat16"),
    "int4 zeros": Format("int4", inputs=64, zeros=True, scales="float16"),
    "int4 channels": Format("int4"),
    "fp4": Format("fp4", inputs=32, scales="bfloat16"),
}

widened = jax.jit(dequantized, static_argnums=(1, 2))
"""Compiled as one, since each form and shape would else need a dozen executables."""


def matrix(shape: tuple[int, ...], form: Format | None, dtype: Any, seed: int) -> Matrix:
    """A random matrix; its zeros, if it has some, are random, too."""
    made = Matrix(shape, dtype, form, nnx.Rngs(seed))
    _with_random_zeros(made, seed)
    return made


def _with_random_zeros(made: Matrix, seed: int) -> None:
    if made.form is not None and made.form.zeros:
        low, high = (0, 16) if made.form.codes == "int4" else (-9, 9)
        zeros = np.random.default_rng(seed).integers(low, high, made.zeros.shape)
        made.zeros = nnx.Param(jnp.asarray(zeros, jnp.int8))


def numbers(made: Matrix) -> np.ndarray:
    """The weights ``[E, I, O]``, or ``[I, O]``, that a matrix stands for."""
    if made.form is None:
        return np.asarray(made.weight[...], np.float32)
    if made.weight.ndim == 2:
        return np.asarray(widened(made.codes, made.form, jnp.dtype("float32")))
    one = lambda codes: widened(codes, made.form, jnp.dtype("float32"))  # noqa: E731
    return np.stack(
        [np.asarray(one(Codes(*(None if x is None else x[e] for x in made.codes)))) for e in range(len(made.weight))]
    )


@dataclass(frozen=True)
class Choices:
    """Tokens that chose experts."""

    index: np.ndarray
    """``[T, k]``; those outside of 0 to ``experts`` are on another device."""
    experts: int
    inputs: int
    outputs: int
    form: str
    seed: int

    @property
    def rng(self) -> np.random.Generator:
        return np.random.default_rng(self.seed)

    @cached_property
    def x(self) -> np.ndarray:
        return self.rng.normal(size=(len(self.index), self.inputs)).astype(np.float32)

    def check_product(self, grouped: Any, dtype: Any, rtol: float) -> None:
        """Every row is the product of its token with the matrix of its expert; the others are finite."""
        made = matrix((self.experts, self.inputs, self.outputs), FORMATS[self.form], dtype, self.seed)
        sent = dispatch(jnp.asarray(self.index), self.experts, grouped.block_rows(self.index.size, self.experts))
        x = jnp.asarray(self.x, dtype)
        out = np.asarray(grouped.product(x[sent.tokens], made, sent.blocks), np.float32)
        assert np.isfinite(out).all()
        weights, of_tokens = numbers(made), np.asarray(x, np.float32)
        for t, k in np.argwhere(np.asarray(sent.here)):
            expected = of_tokens[t] @ weights[self.index[t, k]]
            np.testing.assert_allclose(out[sent.rows[t, k]], expected, rtol=rtol, atol=rtol)


@st.composite
def choices(draw: st.DrawFn) -> Choices:
    """One token or many, which choose different experts, or all the same ones, and sometimes experts of others."""
    experts = draw(st.integers(1, 6))
    tokens, k = draw(st.sampled_from([1, 2, 7, 40])), draw(st.integers(1, experts))
    seed = draw(st.integers(0, 2**16))
    rng = np.random.default_rng(seed)
    index = np.stack([rng.permutation(experts)[:k] for _ in range(tokens)])
    if draw(st.booleans()):
        index[:] = index[0]
    elif draw(st.booleans()):
        index = np.where(rng.random(index.shape) < 0.3, experts + 1, index)
    inputs, outputs = draw(st.sampled_from([(32, 24), (96, 64), (160, 100)]))
    return Choices(index.astype(np.int32), experts, inputs, outputs, draw(st.sampled_from([*FORMATS])), seed)


def mixture(form: str, activation: str, limit: float | None, biases: bool, dtype: Any, size: int = 48) -> Mixture:
    """Four experts of ``size`` features on 64 numbers."""
    of_experts = Experts(4, 2, size, biases=biases, activation_limit=limit)
    config = ModelConfig(8, 64, 64, 1, 4, 2, 16, 64, activation=activation, experts=of_experts)
    made = Mixture(config, dtype, everywhere(FORMATS[form]), nnx.Rngs(1))
    for i, matrix_ in enumerate((made.gate_up, made.down)):
        _with_random_zeros(matrix_, i)
    for name in ("gate_up_bias", "down_bias") if biases else ():
        bias = getattr(made, name)
        setattr(made, name, nnx.Param(jax.random.normal(jax.random.key(1), bias.shape, bias.dtype)))
    return made


def fed_forward(made: Mixture, x: np.ndarray, expert: int) -> np.ndarray:
    """What one expert makes of the tokens ``x [T, D]``."""
    zero = np.zeros(1, np.float32)
    biases = [zero if bias is None else np.asarray(bias[expert]) for bias in (made.gate_up_bias, made.down_bias)]
    both = jnp.asarray(x @ numbers(made.gate_up)[expert] + biases[0])
    inner = activated(both, made.block, made.activation, made.experts.activation_limit)
    return np.asarray(inner) @ numbers(made.down)[expert] + biases[1]
