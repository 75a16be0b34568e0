"""Matrices in fewer bits in the files of a checkpoint: layouts of their codes, scales and zeros.

Nothing is widened: what is read are the codes of a file, one in every byte, and its scales. Words of 32 bits are taken
apart as bytes, of which the first holds the lowest bits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from .config import CheckpointError
from .formats import FP4, MIDDLE, Format, ScaleType
from .safetensors_files import StoredTensor

Index = tuple[int | slice, ...]

SCALES: dict[str, ScaleType] = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "F8_E8M0": "bfloat16"}
"""Stored dtype of scales -> ours, which holds them exactly."""
DAMAGED = "fetch or quantize the checkpoint again"
AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)
"""Place in a word of AWQ, lowest bits first, of each of eight consecutive outputs."""


class Numbers(NamedTuple):
    """Codes of a matrix, one in each item, with scales and zeros: all ``[out, in]`` or all ``[in, out]``."""

    codes: np.ndarray
    scales: np.ndarray
    zeros: np.ndarray | None

    def map(self, change: Callable[[np.ndarray], np.ndarray]) -> Numbers:
        """The same with each array changed."""
        return Numbers(change(self.codes), change(self.scales), None if self.zeros is None else change(self.zeros))


class NarrowTensor(NamedTuple):
    """A weight in fewer bits, in the place of the tensors that make it up in files."""

    name: str
    shape: tuple[int, ...]
    """Shape of the weight, as if it were wide: ``[out, in]``, or ``[experts, in, out]`` (gpt-oss)."""
    form: Format
    read: Callable[[Index], Numbers]
    """``read(experts)``: its numbers, those of one expert if it has such an axis; last axes as those of ``shape``."""
    inside: Index = ()
    """Which part of it this is."""
    transposed: bool = False
    """Whether the part is then transposed, ``[in, out]`` to ``[out, in]``."""
    block: int | None = None
    """Outputs that share a scale in what is read, if that is not what the form says."""

    def part(self, name: str, index: Index, *, transposed: bool = False) -> NarrowTensor:
        """A part of some outputs, or of one expert, under another name; nothing is read."""
        shape = np.broadcast_to(np.int8(0), self.shape)[index].shape
        outputs = index[-1 if transposed else 0]
        form = self.form
        if outputs != slice(None) and _start(outputs) % form.outputs:
            form = replace(form, outputs=1)
        return NarrowTensor(
            name, shape[:: -1 if transposed else 1], form, self.read, index, transposed, self.form.outputs
        )

    def numbers(self) -> Numbers:
        """Its codes ``[out, in]``, scales and zeros (:meth:`.Format.grid`, transposed)."""
        lead = tuple(i for i in self.inside if isinstance(i, int))
        found, axes = self.read(lead), self.inside[len(lead) :]
        axis = 1 if self.transposed else 0
        if len(axes) > axis and axes[axis] != slice(None):
            found = self._of_outputs(found, axes[axis], axis)
        return found.map(np.transpose) if self.transposed else found

    def _of_outputs(self, found: Numbers, outputs: int | slice, axis: int) -> Numbers:
        assert isinstance(outputs, slice)
        places = np.arange(found.codes.shape[axis])[outputs]
        blocks = places[:: self.form.outputs] // (self.block or 1)
        take = lambda grid: np.take(grid, blocks, axis)  # noqa: E731
        zeros = None if found.zeros is None else take(found.zeros)
        return Numbers(np.take(found.codes, places, axis), take(found.scales), zeros)

    def array(self) -> np.ndarray:
        """The weight in float32."""
        codes, scales, zeros = self.numbers()
        spread = lambda grid: _spread(grid.astype(np.float32), self.form, codes.shape)  # noqa: E731
        if self.form.codes == "fp4":
            wide = np.array((*FP4, *(-x for x in FP4)), np.float32)[codes]
        else:
            wide = codes.astype(np.float32)
        zero = spread(zeros) if zeros is not None else MIDDLE if self.form.codes == "int4" else 0
        return (wide - zero) * spread(scales)


def _start(outputs: int | slice) -> int:
    return outputs if isinstance(outputs, int) else (outputs.start or 0) if outputs.step in (None, 1) else 1


def _spread(grid: np.ndarray, form: Format, shape: tuple[int, ...]) -> np.ndarray:
    """Every number of ``grid [out, in]`` for each weight that shares it."""
    outputs, inputs = shape
    wide = np.repeat(np.repeat(grid, form.outputs, 0), form.inputs or inputs, 1)
    return wide[:outputs, :inputs]


def float8(name: str, weight: StoredTensor, scale: StoredTensor, blocks: Sequence[tuple[int, int]]) -> NarrowTensor:
    """8-bit codes ``[O, I]`` with a scale for all, for each output, or for each block of one of these sizes."""
    check(weight, ("F8_E4M3", "I8"), 2)
    outputs, inputs = weight.shape
    form = Format("fp8" if weight.dtype == "F8_E4M3" else "int8", scales=_scales(scale))
    whole = math.prod(scale.shape) == 1
    if not whole and scale.shape not in ((outputs,), (outputs, 1)):
        sizes = [size for size in blocks if scale.shape == (-(-outputs // size[0]), -(-inputs // size[1]))]
        if not sizes:
            raise CheckpointError(
                f"tensor {scale.name} has shape {scale.shape}; a weight {weight.shape} needs one scale, one for each "
                f"output, or a block_structure that config.json names"
            )
        form = replace(form, inputs=sizes[0][1] if sizes[0][1] < inputs else None, outputs=sizes[0][0])

    def read(_: Index) -> Numbers:
        scales = _read_scales(scale)
        scales = np.broadcast_to(scales.reshape(1, 1), (outputs, 1)) if whole else scales.reshape(len(scales), -1)
        codes = weight.stored()
        if form.codes == "fp8" and (codes.view(np.uint8) & 127 == 127).any():
            raise CheckpointError(f"tensor {weight.name} holds numbers that are NaN; {DAMAGED}")
        return Numbers(codes, scales, None)

    return NarrowTensor(name, weight.shape, form, read)


def packed_words(
    name: str, weight: StoredTensor, scale: StoredTensor, zero: StoredTensor | None, shape: StoredTensor
) -> NarrowTensor:
    """compressed-tensors' ``pack-quantized``: words along inputs; those of zeros along outputs."""
    check(weight, ("I32",), 2)
    check(shape, ("I64", "I32"), 1)
    outputs, inputs = (int(n) for n in shape.stored()) if shape.shape == (2,) else (0, 0)
    bits = next((bits for bits in (4, 8) if weight.shape == (outputs, -(-inputs * bits // 32))), None)
    if bits is None:
        raise CheckpointError(
            f"tensor {weight.name} has shape {weight.shape} for a weight {[outputs, inputs]}; 4 and 8 bits are served"
        )
    groups = _groups(scale, (outputs, None), inputs)
    if zero is not None:
        check(zero, ("I32",), 2)
        need(zero, (-(-outputs * bits // 32), scale.shape[1]))

    def zeros() -> np.ndarray | None:
        return None if zero is None else _signed(_from_words(zero.stored().T, bits)[:, :outputs].T, bits)

    form = _integers(bits, groups, zeros(), scale)

    def read(_: Index) -> Numbers:
        codes = _signed(_from_words(weight.stored(), bits)[:, :inputs], bits)
        return Numbers(codes, _read_scales(scale), zeros() if form.zeros else None)

    return NarrowTensor(name, (outputs, inputs), form, read)


def awq(name: str, weight: StoredTensor, scale: StoredTensor, zero: StoredTensor | None) -> NarrowTensor:
    """AWQ's ``gemm``: words along outputs, in turns."""
    check(weight, ("I32",), 2)
    inputs, outputs = weight.shape[0], 8 * weight.shape[1]
    groups = _groups(scale, (None, outputs), inputs)
    if zero is not None:
        check(zero, ("I32",), 2)
        need(zero, (scale.shape[0], weight.shape[1]))

    def in_order(words: np.ndarray) -> np.ndarray:
        return _from_words(words, 4).reshape(len(words), -1, 8)[:, :, AWQ_ORDER].reshape(len(words), -1)

    def zeros() -> np.ndarray | None:
        return None if zero is None else in_order(zero.stored()).T

    form = _integers(4, groups, zeros(), scale)

    def read(_: Index) -> Numbers:
        return Numbers(in_order(weight.stored()).T, _read_scales(scale).T, zeros() if form.zeros else None)

    return NarrowTensor(name, (outputs, inputs), form, read)


def gptq(
    name: str,
    weight: StoredTensor,
    scale: StoredTensor,
    zero: StoredTensor,
    order: StoredTensor | None,
    *,
    lessened: bool,
    symmetric: bool,
) -> NarrowTensor:
    """GPTQ: words along inputs, those of zeros along outputs.

    Args:
        name: of the weight.
        weight: ``qweight``.
        scale: ``scales``.
        zero: ``qzeros``.
        order: ``g_idx``, if there is one.
        lessened: whether one has been taken from every zero, as version 1 does. GPTQModel takes it from whole words, so
            that a zero of 0 borrows from the next one.
        symmetric: whether zeros are in the middle. Some files that say version 1 hold these as version 2 does.
    """
    check(weight, ("I32",), 2)
    check(scale, tuple(SCALES), 2)
    check(zero, ("I32",), 2)
    outputs = weight.shape[1]
    bits = next((b for b in (4, 8) if zero.shape == (scale.shape[0], -(-outputs * b // 32))), None)
    if bits is None:
        raise CheckpointError(f"tensor {zero.name} has shape {zero.shape}; 4 and 8 bits are served")
    inputs = weight.shape[0] * 32 // bits
    groups = _groups(scale, (None, outputs), inputs)
    if order is not None:
        check(order, ("I32", "I64"), 1)
        need(order, (inputs,))
        if not np.array_equal(order.stored(), np.arange(inputs) // (groups or inputs)):
            raise CheckpointError(
                f"{order.name} orders inputs by their activations (desc_act); only groups of consecutive inputs are "
                f"served: quantize with desc_act=False, or with static_groups"
            )

    def zeros() -> np.ndarray:
        words = zero.stored()
        found = _from_words(words, bits)[:, :outputs]
        if lessened and not (symmetric and (found == 1 << (bits - 1)).all()):
            found = _from_words(words + np.int32(0x11111111 if bits == 4 else 0x01010101), bits)[:, :outputs]
        return _signed(found.T, bits)

    form = _integers(bits, groups, zeros(), scale)

    def read(_: Index) -> Numbers:
        codes = _signed(_from_words(weight.stored().T, bits), bits)
        return Numbers(codes, _read_scales(scale).T, zeros() if form.zeros else None)

    return NarrowTensor(name, (outputs, inputs), form, read)


def mxfp4(name: str, blocks: StoredTensor, scale: StoredTensor) -> NarrowTensor:
    """gpt-oss's MXFP4 of all experts: bytes ``[E, O, I / 32, 16]``, exponents ``[E, O, I / 32]``."""
    check(blocks, ("U8",), 4)
    check(scale, ("U8",), 3)
    need(scale, blocks.shape[:3])
    experts, outputs, groups, size = blocks.shape
    if size != 16:
        raise CheckpointError(f"tensor {blocks.name} has shape {blocks.shape}; blocks of 32 weights are served")

    def read(index: Index) -> Numbers:
        halves, exponents = blocks.stored()[index], scale.stored()[index].astype(np.uint16)
        codes = np.stack([halves & 15, halves >> 4], axis=-1).reshape(*halves.shape[:-2], -1)
        if (exponents == 255).any():
            raise CheckpointError(f"tensor {scale.name} holds scales that are NaN; {DAMAGED}")
        powers = np.where(exponents == 0, 64, exponents << 7).astype(np.uint16).view(jnp.bfloat16)
        return Numbers(codes.swapaxes(-1, -2), powers.swapaxes(-1, -2), None)

    return NarrowTensor(name, (experts, groups * 32, outputs), Format("fp4", 32, scales="bfloat16"), read)


def check(tensor: StoredTensor, dtypes: tuple[str, ...], axes: int) -> None:
    """Refuse a tensor of another dtype, or with another number of axes."""
    if tensor.dtype not in dtypes or len(tensor.shape) != axes or 0 in tensor.shape:
        raise CheckpointError(
            f"tensor {tensor.name} is {tensor.dtype} {list(tensor.shape)}; "
            f"only {' or '.join(dtypes)} with {axes} axes fits"
        )


def need(tensor: StoredTensor, shape: tuple[int, ...]) -> None:
    """Refuse a tensor of another shape."""
    if tensor.shape != shape:
        raise CheckpointError(f"tensor {tensor.name} has shape {tensor.shape}; its weight needs {shape}")


def _groups(scale: StoredTensor, shape: tuple[int | None, int | None], inputs: int) -> int | None:
    """Inputs that share one of the scales, which have this shape but for the axis of groups; None: all."""
    check(scale, tuple(SCALES), 2)
    axis = shape.index(None)
    groups = scale.shape[axis]
    if scale.shape[1 - axis] != shape[1 - axis] or inputs % groups:
        raise CheckpointError(f"tensor {scale.name} has shape {scale.shape}, which {inputs} inputs do not divide into")
    return None if groups == 1 else inputs // groups


def _integers(bits: int, groups: int | None, zeros: np.ndarray | None, scale: StoredTensor) -> Format:
    """The form of integer codes; zeros in the middle of the codes are none."""
    middle = MIDDLE if bits == 4 else 0
    own = zeros is not None and bool((zeros != middle).any())
    return Format("int4" if bits == 4 else "int8", groups, zeros=own, scales=_scales(scale))


def _scales(scale: StoredTensor) -> ScaleType:
    if scale.dtype not in SCALES:
        raise CheckpointError(f"tensor {scale.name} has dtype {scale.dtype}; scales in {', '.join(SCALES)} are read")
    return SCALES[scale.dtype]


def _read_scales(scale: StoredTensor) -> np.ndarray:
    scales = scale.stored().astype(SCALES[scale.dtype])
    if not np.isfinite(scales.astype(np.float32)).all():
        raise CheckpointError(f"tensor {scale.name} holds scales that are no numbers (NaN or infinite); {DAMAGED}")
    return scales


def _from_words(words: np.ndarray, bits: int) -> np.ndarray:
    """Codes ``[n, 32 / bits * m]`` uint8 from words ``[n, m]`` int32, lowest bits first."""
    parts = np.ascontiguousarray(words).view(np.uint8)
    return parts if bits == 8 else np.stack([parts & 15, parts >> 4], axis=-1).reshape(len(parts), -1)


def _signed(codes: np.ndarray, bits: int) -> np.ndarray:
    """Codes of 8 bits as numbers around zero; those of 4 bits stay."""
    return (codes ^ 128).view(np.int8) if bits == 8 else codes
