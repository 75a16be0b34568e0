"""Compile attention for a GPU on a machine without one, and print what came of it as a line of JSON.

python tests/support/ahead.py a100 | h200 | b200 decode | mixed | float8
python tests/support/ahead.py traits
"""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_TRITON_DUMP_DIR"] = tempfile.mkdtemp()  # read when jax-triton is imported

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from astraea_jax.kernels import Batch, Triton
from astraea_jax.lab.ahead import TARGETS
from astraea_jax.lab.gpu_code import assembled
from astraea_jax.models.heads import Heads
from astraea_jax.models.sharding import mesh_of

PAGES, SIZE, HEADS, GROUP, HEAD, ROWS, WIDTH = 4096, 16, 8, 4, 128, 16, 256


def compile_attention(target: str, kind: str) -> dict[str, int | str]:
    mesh = mesh_of(TARGETS[target].devices()[:1])
    placed = NamedSharding(mesh, PartitionSpec())
    tokens, q_tile = (256, 16) if kind == "mixed" else (ROWS, 1)

    def array(shape: tuple[int, ...], dtype: jnp.dtype = jnp.int32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=placed)

    rotary = [array((tokens, HEAD // 2), jnp.float32) for _ in ("cos", "sin")]
    norms = [array((HEAD,), jnp.bfloat16) for _ in ("queries", "keys")]
    heads = Heads(array((tokens, HEADS, GROUP + 2, HEAD), jnp.bfloat16), *rotary, *norms)
    backend = Triton(compute_capability=TARGETS[target].capability)
    kv_dtype = jnp.float8_e4m3fn if kind == "float8" else jnp.bfloat16
    pool = array((PAGES, *backend.page_shape(HEADS, SIZE, HEAD, kv_dtype)), kv_dtype)
    batch = Batch(array((ROWS, WIDTH)), array((ROWS,)), array((ROWS + 1,)), array((tokens,)))

    def attend(heads, pages, batch):
        return backend.attend(heads, pages, batch, q_tile=q_tile)

    with jax.set_mesh(mesh):
        compiled = jax.jit(attend, donate_argnums=1).lower(heads, pool, batch).compile()
    memory, hlo = compiled.memory_analysis(), compiled.as_text()
    kernels = list(assembled(Path(os.environ["JAX_TRITON_DUMP_DIR"]), TARGETS[target].capability))
    shutil.rmtree(os.environ["JAX_TRITON_DUMP_DIR"])
    return {
        "kernels": hlo.count('custom_call_target="triton_kernel_call_ffi"'),
        "pages": PAGES,
        "pool": pool.size * pool.dtype.itemsize,
        "aliased": memory.alias_size_in_bytes,
        "temporary": memory.temp_size_in_bytes,
        "hlo": hlo,
        "spilled": sum(kernel.spilled for kernel in kernels),
    }


class Extension(ctypes.Structure):
    """XLA_FFI_Metadata_Extension, an XLA_FFI_InternalExtension of type 1 with a pointer behind it."""

    _fields_ = [("size", ctypes.c_size_t), ("type", ctypes.c_int), ("next", ctypes.c_void_p), ("data", ctypes.c_void_p)]


class Metadata(ctypes.Structure):
    """XLA_FFI_Metadata: sizes, the version (size, extension, major, minor), traits, and the state's type."""

    _fields_ = [
        ("size", ctypes.c_size_t),
        ("version_size", ctypes.c_size_t),
        ("version_extension", ctypes.c_void_p),
        ("version", ctypes.c_int * 2),
        ("traits", ctypes.c_uint32),
        ("state", ctypes.c_int64),
    ]


def handler_traits() -> int:
    """Bits that jaxlib's handler of Triton calls reports: call it with a frame that asks for its metadata only."""
    from jax_cuda13_plugin import _triton

    capsule = _triton.registrations()["triton_kernel_call_ffi"]["execute"]
    pointer = ctypes.pythonapi.PyCapsule_GetPointer
    pointer.restype, pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    metadata = Metadata(ctypes.sizeof(Metadata))
    extension = Extension(ctypes.sizeof(Extension), 1, None, ctypes.addressof(metadata))
    frame = (ctypes.c_size_t * 64)()
    frame[0], frame[1] = 168, ctypes.addressof(extension)  # size of XLA_FFI_CallFrame up to its attributes
    assert not ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p)(pointer(capsule, None))(ctypes.addressof(frame))
    return metadata.traits


if __name__ == "__main__":
    result = handler_traits() if sys.argv[1] == "traits" else json.dumps(compile_attention(*sys.argv[1:]))
    sys.stdout.write(f"{result}\n")
