"""Tensors of the safetensors files in a Hugging Face folder, read only when they are asked for."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open

from .config import CheckpointError
from .config_file import read_json

INDEX = "model.safetensors.index.json"

DTYPES: dict[str, Any] = {
    "F64": jnp.dtype("float64"),
    "F32": jnp.dtype("float32"),
    "F16": jnp.dtype("float16"),
    "BF16": jnp.dtype("bfloat16"),
    "F8_E4M3": jnp.dtype("float8_e4m3fn"),
    "F8_E5M2": jnp.dtype("float8_e5m2"),
}
"""Stored dtypes that are weights by themselves."""
CODES: dict[str, Any] = {
    "I8": jnp.dtype("int8"),
    "U8": jnp.dtype("uint8"),
    "I32": jnp.dtype("int32"),
    "I64": np.dtype("int64"),
    "F8_E8M0": jnp.dtype("float8_e8m0fnu"),
}
"""Stored dtypes of what makes up quantized weights (:mod:`.narrow_files`), besides those of weights."""


class StoredTensor(NamedTuple):
    """A tensor in a file that is mapped into memory."""

    name: str
    path: Path
    dtype: str
    """Dtype by the name that safetensors gives it."""
    shape: tuple[int, ...]
    data: np.ndarray
    """Its bytes."""
    whole: tuple[int, ...] | None = None
    """Shape in the file of a tensor that this is a part of; None: it is the tensor itself."""
    inside: tuple[int | slice, ...] = ()
    """What part of it."""
    transposed: bool = False
    """Whether the part is then transposed."""

    def part(self, name: str, index: tuple[int | slice, ...], *, transposed: bool = False) -> StoredTensor:
        """A part of it under another name; nothing is read."""
        shape = np.broadcast_to(np.int8(0), self.shape)[index].shape
        shape = shape[::-1] if transposed else shape
        return self._replace(name=name, shape=shape, whole=self.shape, inside=index, transposed=transposed)

    def array(self) -> np.ndarray:
        """The tensor, still in the mapped file.

        Raises:
            CheckpointError: numbers of its dtype are not weights.
        """
        if self.dtype not in DTYPES:
            raise CheckpointError(
                f"tensor {self.name} in {self.path} has dtype {self.dtype}; {', '.join(DTYPES)} are read"
            )
        return self.stored()

    def stored(self) -> np.ndarray:
        """The tensor, whatever its dtype means.

        Raises:
            CheckpointError: numbers of its dtype are not read at all.
        """
        dtype = (DTYPES | CODES).get(self.dtype)
        if dtype is None:
            raise CheckpointError(f"tensor {self.name} in {self.path} has dtype {self.dtype}, which is not read")
        array = self.data.view(dtype).reshape(self.whole or self.shape)[self.inside]
        return array.T if self.transposed else array


def open_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Every tensor of a folder by name.

    Raises:
        CheckpointError: a file is missing, damaged or incomplete.
    """
    return {tensor.name: tensor for path in _weight_files(folder) for tensor in _tensors(path)}


def _tensors(path: Path) -> Iterator[StoredTensor]:
    try:
        with safe_open(path, framework="numpy"):  # checks all that the header says
            pass
        data = np.memmap(path, np.uint8, mode="r")
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged or incomplete ({error}); fetch it again") from error
    begin = 8 + int.from_bytes(data[:8].tobytes(), "little")
    header = json.loads(data[8:begin].tobytes())
    header.pop("__metadata__", None)
    for name, entry in header.items():
        start, end = entry["data_offsets"]
        yield StoredTensor(name, path, entry["dtype"], tuple(entry["shape"]), data[begin + start : begin + end])


def _weight_files(folder: Path) -> Iterator[Path]:
    single = folder / "model.safetensors"
    if single.is_file():
        yield single
        return
    if not (folder / INDEX).is_file():
        raise CheckpointError(f"{folder} has neither model.safetensors nor {INDEX}; only safetensors are read")
    names = read_json(folder / INDEX).get("weight_map")
    if not isinstance(names, dict) or any(
        not isinstance(name, str) or Path(name).name != name for name in names.values()
    ):
        raise CheckpointError(f"{folder / INDEX} must map tensors to files in its own folder")
    for name in sorted(set(names.values())):
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder} lacks {name}, which {INDEX} names; fetch it again")
        yield folder / name
