"""Matrices of a decoder joined from weights in fewer bits (:mod:`.narrow_files`)."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from .formats import MIDDLE, Format, packed
from .hf_layout import HfTensor
from .hf_views import Tensor
from .narrow_files import NarrowTensor, Numbers

log = logging.getLogger(__name__)

Experts = Sequence[Sequence[HfTensor]]
"""Tensors that a matrix joins, or those of each expert."""


def stored_form(name: str, experts: Experts, tensors: Mapping[str, Tensor]) -> Format | None:
    """The form that a matrix keeps; None: it is wide in the files, or is dequantized while it is read.

    The latter is logged. Parts that are joined keep a form if their codes and groups of inputs are alike.
    """
    parts = [part for one in experts for part in one]
    narrow = [tensor.form for part in parts if isinstance(tensor := tensors[part.name], NarrowTensor)]
    if not narrow:
        return None
    form, outputs = narrow[0], math.gcd(*(each.outputs for each in narrow))
    if len(experts[0]) > 1:
        outputs = math.gcd(outputs, *(part.part[-1] for part in parts))
    joined = replace(
        form,
        outputs=1 if any(part.order is not None for part in parts) else outputs,
        zeros=any(each.zeros for each in narrow),
        scales=form.scales if len({each.scales for each in narrow}) == 1 else "float32",
    )
    alike = len(narrow) == len(parts) and len({(each.codes, each.inputs) for each in narrow}) == 1
    fitted = joined.fitted(parts[0].shape[-1]) if alike else None
    if fitted is None:
        why = f"its {parts[0].shape[-1]} inputs are no multiple of 32" if alike else "its parts differ in their form"
        log.warning("%s is dequantized while it is read: %s", name, why)
    return fitted


def read_narrow(experts: Experts, tensors: Mapping[str, Tensor], form: Format) -> Numbers:
    """A matrix as the form stores it, its experts along the first axis if there are several."""
    if len(experts) == 1:
        return _of_one(experts[0], tensors, form)
    found: Numbers | None = None
    for e, parts in enumerate(experts):
        one = _of_one(parts, tensors, form)
        if found is None:
            found = one.map(lambda array: np.empty((len(experts), *array.shape), array.dtype))
        for whole, array in zip(found, one, strict=True):
            if whole is not None:
                whole[e] = array
    assert found is not None
    return found


def _of_one(parts: Sequence[HfTensor], tensors: Mapping[str, Tensor], form: Format) -> Numbers:
    pieces = [_as_part(tensors[part.name], part, form) for part in parts]
    codes, scales, zeros = (
        None if arrays[0] is None else np.concatenate(arrays, axis=-2).reshape(len(arrays[0]), -1)
        for arrays in zip(*pieces, strict=True)
    )
    assert codes is not None
    assert scales is not None
    codes = packed(codes) if form.per_item == 2 else np.ascontiguousarray(codes)
    return Numbers(codes, scales.astype(form.scales), None if zeros is None else zeros.astype(np.int8))


def _as_part(tensor: Tensor, part: HfTensor, form: Format) -> Numbers:
    """A tensor's codes, scales and zeros in the order of the decoder, with outputs ``[blocks, w, size]`` if joined."""
    assert isinstance(tensor, NarrowTensor)
    codes, scales, zeros = tensor.numbers()
    if form.zeros and zeros is None:
        zeros = np.full(scales.shape, MIDDLE if form.codes == "int4" else 0, np.int8)
    if form.outputs != tensor.form.outputs:
        block = np.arange(0, tensor.shape[0], form.outputs) // tensor.form.outputs
        scales, zeros = scales[block], None if zeros is None else zeros[block]

    def ordered(array: np.ndarray, size: int) -> np.ndarray:
        *middle, last = part.part[1:]
        array = array.T.reshape(array.shape[1], *(middle or (1,)), -(-last // size))
        return array if part.order is None else array[..., part.order]

    grid = form.outputs
    return Numbers(ordered(codes, 1), ordered(scales, grid), None if zeros is None else ordered(zeros, grid))
