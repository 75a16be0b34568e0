"""Memory of this machine's devices, and accelerators that JAX leaves unused."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import jax
from jax.sharding import Mesh

from astraea_jax.errors import StartupError
from astraea_jax.models.config import ModelConfig

NVIDIA = ("dev/nvidia0", "dev/nvidiactl", "dev/dxg")
"""Device files of which one exists if there is an NVIDIA GPU; the last on Windows."""
GOOGLE = "0x1ae0"
"""PCI vendor of TPUs."""
DRIVERS = {"jax_cuda13_plugin": 580, "jax_cuda12_plugin": 525}
"""JAX's wheels for NVIDIA GPUs -> the oldest driver for their CUDA version."""
WEIGHTS_SHARE = 0.95
"""Share of a device's free memory that weights may take; pages and activations need the rest."""


def free_bytes(mesh: Mesh) -> int | None:
    """Free bytes of the device of the mesh in this process that has the least, or None if the backend does not tell."""
    stats = [device.memory_stats() for device in mesh.local_devices]
    free = [s["bytes_limit"] - s["bytes_in_use"] for s in stats if s and "bytes_limit" in s]
    return min(free) if free else None


def check_weights(
    model: ModelConfig, itemsize: int, matrix_itemsize: float | None, *, shared: int, free: int, available: int
) -> None:
    """Refuse a model whose weights do not fit into the devices, before they are loaded.

    Args:
        model: its shape.
        itemsize: bytes of one weight.
        matrix_itemsize: bytes of one weight of the layers' matrices with its share of scales, if that differs.
        shared: devices that share the model.
        free: bytes that each of them has free.
        available: devices of this machine.

    Raises:
        StartupError: the weights do not fit; the message says what is needed, what is free, and what would fit.
    """

    def needed(devices: int, matrix_itemsize: float | None) -> float:
        return (model.layer_weights * (matrix_itemsize or itemsize) + model.table_weights * itemsize) / devices

    room = WEIGHTS_SHARE * free
    if needed(shared, matrix_itemsize) <= room:
        return
    more = [n for n in range(shared + 1, available + 1) if not (model.num_kv_heads % n or model.intermediate_size % n)]
    fit = [
        f"--tensor_parallel={n} ({needed(n, matrix_itemsize) / 1e9:.1f} GB on each)"
        for n in more
        if needed(n, matrix_itemsize) <= room
    ]
    if matrix_itemsize is None and needed(shared, 1) <= room:
        fit.append(f"--quantize=int8 ({needed(shared, 1) / 1e9:.1f} GB)")
    advice = (
        f"; start with {' or '.join(fit)}" if fit else ", and nothing here would make it fit; choose a smaller model"
    )
    raise StartupError(
        f"the model's weights take {needed(shared, matrix_itemsize) / 1e9:.1f} GB of each device, which has "
        f"{free / 1e9:.1f} GB free{advice}"
    )


def overlooked() -> str | None:
    """Return :func:`unused_accelerator`, or None if JAX has been told to run on the CPU."""
    chosen = jax.config.jax_platforms or ""  # type: ignore[attr-defined]
    return None if jax.default_backend() != "cpu" or "cpu" in chosen.split(",") else unused_accelerator()


def unused_accelerator(root: Path = Path("/")) -> str | None:
    """Name an accelerator of this machine that JAX does not use, why, and what to do; None if there is none.

    Args:
        root: root of the file system that shows devices.
    """
    if any((root / name).exists() for name in NVIDIA):
        return f"this machine has an NVIDIA GPU, but JAX runs on the CPU: {_why_no_gpu(root)}"
    if any(file.read_text().strip() == GOOGLE for file in root.glob("sys/bus/pci/devices/*/vendor")):
        return f"this machine has a TPU, but JAX runs on the CPU: {_why_no_tpu()}"
    return None


def _why_no_gpu(root: Path) -> str:
    wheels = next((name for name in DRIVERS if importlib.util.find_spec(name)), None)
    if wheels is None:
        return "its wheels for GPUs are not installed; install the [cuda] extra, or set JAX_PLATFORMS=cpu to mean it"
    version = root / "proc/driver/nvidia/version"
    found = re.search(r"(\d+)\.\d+", version.read_text()) if version.exists() else None
    if found and int(found[1]) < DRIVERS[wheels]:
        return f"the driver is {found[0]}, and {wheels} needs {DRIVERS[wheels]} or newer; install a newer driver"
    return f"{wheels} is installed but cannot use it; with JAX_PLATFORMS=cuda JAX says why"


def _why_no_tpu() -> str:
    if importlib.util.find_spec("libtpu") is None:
        return "libtpu is not installed; install the [tpu] extra, or set JAX_PLATFORMS=cpu to mean it"
    return "libtpu is installed but cannot use it; with JAX_PLATFORMS=tpu JAX says why"
