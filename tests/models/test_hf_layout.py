"""Every parameter of every family is made of tensors, each of which is used once."""

from __future__ import annotations

import dataclasses
import math

import jax.numpy as jnp
import pytest
from flax import nnx

from astraea_jax.models.hf_layout import hf_tensors
from astraea_jax.models.published import PUBLISHED
from astraea_jax.models.published_fields import FIELDS
from astraea_jax.models.sharding import abstract_decoder, default_mesh


def small(name):
    """Four layers of a published model, with few experts."""
    model = dataclasses.replace(PUBLISHED[name], num_layers=4)
    if model.experts is None:
        return model
    return dataclasses.replace(model, experts=dataclasses.replace(model.experts, count=16))


@pytest.mark.parametrize("name", FIELDS)
def test_tensors_make_up_all_parameters(name):
    model, seen = small(name), set()
    for path, leaf in nnx.to_flat_state(nnx.state(abstract_decoder(model, jnp.bfloat16, default_mesh()))):
        tensors = [tensor for expert in hf_tensors(path, leaf.shape, model) for tensor in expert]
        assert sum(math.prod(tensor.part) for tensor in tensors) == math.prod(leaf.shape)
        assert all(math.prod(tensor.part) == math.prod(tensor.shape) for tensor in tensors)
        assert not seen & {tensor.name for tensor in tensors}
        seen |= {tensor.name for tensor in tensors}
