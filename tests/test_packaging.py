"""Tests that what is built is what is imported: the wheel, the sdist, and what they depend on."""

from __future__ import annotations

import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from collections.abc import Iterator
from importlib.metadata import distributions
from pathlib import Path

import pytest
from hatchling.builders.sdist import SdistBuilder
from hatchling.builders.wheel import WheelBuilder
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import astraea_jax

ROOT = Path(__file__).parents[1]

STRANGERS = {"jetstream-pt", "google-jetstream", "jetstream"}
"""The first is a dependency-confusion dummy, the second a dead release, the third an unrelated tool."""

IMPORT_EVERYTHING = """
import importlib, importlib.util, pkgutil, sys
sys.path.insert(0, sys.argv[1])
import astraea_jax
assert astraea_jax.__file__.startswith(sys.argv[1]), astraea_jax.__file__
from absl import flags
names = [module.name for module in pkgutil.walk_packages(astraea_jax.__path__, "astraea_jax.")]
for name in names:
    needs = {".triton_": "triton", ".gguf_file": "gguf", ".ray_": "ray", ".bench_ray": "ray"}
    if any(part in name and importlib.util.find_spec(module) is None for part, module in needs.items()):
        continue  # in the [cuda], [parity] and [ray] extras
    known = set(flags.FLAGS)
    importlib.import_module(name)
    for flag in set(flags.FLAGS) - known:  # commands have flags of equal names
        delattr(flags.FLAGS, flag)
for name in ("models", "scheduler"):
    assert importlib.util.find_spec(name) is None, f"{name} is a top-level import"
print(*names)
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_wheel(ROOT, tmp_path_factory.mktemp("wheel"))


def build_wheel(root: Path, into: Path) -> Path:
    """Build with hatchling in this process: no network, no isolated environment."""
    return Path(next(WheelBuilder(str(root)).build(directory=str(into), versions=["standard"])))


def contents(wheel: Path) -> dict[str, int]:
    """Name and checksum of every file but the record of them."""
    with zipfile.ZipFile(wheel) as archive:
        return {info.filename: info.CRC for info in archive.infolist() if not info.filename.endswith("RECORD")}


def test_wheel_holds_one_top_level_package(wheel: Path) -> None:
    names = contents(wheel).keys()
    assert {name.split("/")[0] for name in names} == {"astraea_jax", f"astraea_jax-{astraea_jax.__version__}.dist-info"}
    for room in ("models", "scheduler"):
        files = {path for path in (ROOT / room).rglob("*") if path.is_file() and path.suffix != ".pyc"}
        assert files
        assert {f"astraea_jax/{path.relative_to(ROOT)}" for path in files} <= names
    kernels = {str(path.relative_to(ROOT)) for path in (ROOT / "astraea_jax/kernels/native").glob("*.*")}
    assert {Path(path).suffix for path in kernels} == {".py", ".cc", ".h"}
    assert kernels <= names


def test_everything_imports_from_the_installed_wheel(wheel: Path, tmp_path: Path) -> None:
    target = tmp_path / "site"
    pip = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--no-index",
        "--target",
        str(target),
    ]
    subprocess.run([*pip, str(wheel)], check=True)
    probe = [sys.executable, "-I", "-c", IMPORT_EVERYTHING, str(target)]
    done = subprocess.run(probe, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert {"astraea_jax.models.decoder", "astraea_jax.scheduler"} <= set(done.stdout.split())


def test_sdist_builds_the_same_wheel(wheel: Path, tmp_path: Path) -> None:
    sdist = Path(next(SdistBuilder(str(ROOT)).build(directory=str(tmp_path), versions=["standard"])))
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    unpacked = tmp_path / sdist.name.removesuffix(".tar.gz")
    assert not (unpacked / "models").exists()
    assert contents(build_wheel(unpacked, tmp_path)) == contents(wheel)


def requirements(pyproject: str) -> Iterator[str]:
    """Canonical names of all that a ``pyproject.toml`` asks for: build, core and every extra."""
    read = tomllib.loads(pyproject)
    lists = [read["build-system"]["requires"], read["project"]["dependencies"]]
    lists += read["project"]["optional-dependencies"].values()
    yield from (canonicalize_name(Requirement(line).name) for lines in lists for line in lines)


def named(lock: str) -> set[str]:
    """Canonical form of every word of a lock or requirements file, whatever its format."""
    return {canonicalize_name(word) for word in re.findall(r"[A-Za-z0-9][A-Za-z0-9._-]*", lock)}


def test_no_stranger_is_required() -> None:
    assert STRANGERS.isdisjoint(requirements((ROOT / "pyproject.toml").read_text()))
    patterns = ("*.lock", "requirements/*", "pylock*.toml", "*requirements*.txt", "constraints*.txt")
    for lock in (path for pattern in patterns for path in ROOT.glob(pattern)):
        assert STRANGERS.isdisjoint(named(lock.read_text())), f"{lock.name} names one of {STRANGERS}"


def test_no_stranger_is_installed() -> None:
    """Not even through a dependency of a dependency."""
    assert STRANGERS.isdisjoint(canonicalize_name(found.metadata["Name"]) for found in distributions())


def test_the_check_itself() -> None:
    project = """
        build-system.requires = []
        project.dependencies = ["Jetstream_PT[x] >= 0.0.1; python_version > '3'"]
        project.optional-dependencies.tpu = ["google.jetstream"]
    """
    assert set(requirements(project)) == {"jetstream-pt", "google-jetstream"}
    assert STRANGERS & named("jax==0.10.2\njetstream.pt==0.0.1 --hash=sha256:00\n") == {"jetstream-pt"}
    assert STRANGERS & named('[[package]]\nname = "google_jetstream"\n') == {"google-jetstream"}
