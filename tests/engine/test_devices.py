"""Tests of what devices can hold, and of what is said of accelerators that lie idle."""

from __future__ import annotations

import importlib.util

import pytest

from astraea_jax.engine.devices import check_weights, unused_accelerator
from astraea_jax.errors import StartupError
from astraea_jax.models.published import PUBLISHED

LLAMA = PUBLISHED["llama-3.1-8b"]


def test_models_that_fit_are_let_through():
    check_weights(LLAMA, 2, None, shared=1, free=17 * 10**9, available=1)
    check_weights(LLAMA, 2, None, shared=4, free=5 * 10**9, available=4)
    check_weights(LLAMA, 2, 1, shared=1, free=10 * 10**9, available=1)


@pytest.mark.parametrize(
    ("narrow", "shared", "free", "available", "said"),
    [
        (None, 1, 16, 4, r"take 16\.1 GB of each device, which has 16\.0 GB free; start with --tensor_parallel=2 "
         r"\(8\.0 GB on each\) or --tensor_parallel=4 \(4\.0 GB on each\) or --quantize=int8 \(9\.1 GB\)$"),
        (None, 1, 16, 1, r"start with --quantize=int8 \(9\.1 GB\)$"),
        (1, 1, 8, 3, r"take 9\.1 GB .* --tensor_parallel=2 \(4\.5 GB on each\)$"),  # three do not divide the heads
        (1, 2, 4, 2, r"take 4\.5 GB .* nothing here would make it fit; choose a smaller model$"),
    ],
)  # fmt: skip
def test_models_that_do_not_fit_are_told_what_would(narrow, shared, free, available, said):
    with pytest.raises(StartupError, match=said):
        check_weights(LLAMA, 2, narrow, shared=shared, free=free * 10**9, available=available)


def gpu_machine(root, driver: str):
    (root / "dev").mkdir()
    (root / "dev/nvidia0").touch()
    (root / "proc/driver/nvidia").mkdir(parents=True)
    line = f"NVRM version: NVIDIA UNIX x86_64 Kernel Module  {driver}  Mon Jan  1 00:00:00 UTC 2026\n"
    (root / "proc/driver/nvidia/version").write_text(line)


def installed(monkeypatch, *names: str) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name if name in names else None)


def test_a_machine_without_accelerators_is_silent(tmp_path):
    assert unused_accelerator(tmp_path) is None


@pytest.mark.parametrize(
    ("wheels", "driver", "said"),
    [
        ((), "580.65.06", "wheels for GPUs are not installed; install the [cuda] extra"),
        (("jax_cuda13_plugin",), "535.104.05", "the driver is 535.104, and jax_cuda13_plugin needs 580 or newer"),
        (("jax_cuda13_plugin",), "580.65.06", "with JAX_PLATFORMS=cuda JAX says why"),
    ],
)
def test_a_gpu_that_lies_idle_is_named(wheels, driver, said, tmp_path, monkeypatch):
    gpu_machine(tmp_path, driver)
    installed(monkeypatch, *wheels)
    found = unused_accelerator(tmp_path)
    assert found.startswith("this machine has an NVIDIA GPU, but JAX runs on the CPU")
    assert said in found


@pytest.mark.parametrize(("wheels", "said"), [((), "install the [tpu] extra"), (("libtpu",), "JAX_PLATFORMS=tpu")])
def test_a_tpu_that_lies_idle_is_named(wheels, said, tmp_path, monkeypatch):
    for number, vendor in enumerate(("0x8086", "0x1ae0")):
        (tmp_path / f"sys/bus/pci/devices/{number}").mkdir(parents=True)
        (tmp_path / f"sys/bus/pci/devices/{number}/vendor").write_text(f"{vendor}\n")
    installed(monkeypatch, *wheels)
    assert said in unused_accelerator(tmp_path)
