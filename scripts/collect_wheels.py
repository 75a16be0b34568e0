#!/usr/bin/env python3
"""Collects the wheels that a GPU machine without a network lacks, to be brought there in a folder.

  python3.12 scripts/collect_wheels.py                         into .wheels, for benchmarks/first_contact.sh
  python3.12 scripts/collect_wheels.py --there=freeze.txt      leaves out what the machine has in a version that will do
  python3 scripts/collect_wheels.py --missing                  names what is missing where it runs; fails if anything is

The machine is x86-64 Linux with Python 3.12, JAX for CUDA 13, and Triton, which PyTorch brings; these never travel.
`pip list --format=freeze` there prints what --there reads. Needs Python 3.12 and pip here, nothing else.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
TESTS = ("hypothesis", "pytest", "pytest-asyncio", "pytest-timeout", "pytest-xdist", "httpx")
STAYS = re.compile(r"jax|jaxlib|jax-cuda.*|nvidia-.*|triton|torch|numpy|scipy")
"""Names of what the machine must have: no gigabytes travel."""
PLATFORMS = (*(f"manylinux_2_{minor}_x86_64" for minor in range(5, 36)), "manylinux2014_x86_64", "manylinux1_x86_64")
"""pip takes each name literally: a wheel for glibc 2.24 is none for 2.28."""


def requirements() -> list[str]:
    """List what serving, the [cuda] extra and the tests ask for."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return [*project["dependencies"], *project["optional-dependencies"]["cuda"], *TESTS]


def versions(freeze: str) -> dict[str, str]:
    """Parse lines of ``name==version``; other lines are skipped."""
    found = (line.strip().split("==") for line in freeze.splitlines() if line.count("==") == 1)
    return {normal(name): version for name, version in found}


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def missing_here() -> list[str]:
    """Name the requirements that what is installed here does not meet, with what there is instead."""
    from pip._vendor.packaging.requirements import Requirement

    found = []
    for asked in map(Requirement, requirements()):
        if asked.marker is None or asked.marker.evaluate():
            try:
                there = importlib.metadata.version(asked.name)
            except importlib.metadata.PackageNotFoundError:
                found.append(f"{asked} (not installed)")
            else:
                if not asked.specifier.contains(there, prereleases=True):
                    found.append(f"{asked} (here: {there})")
    return found


def to_bring(packages: Iterable[dict[str, Any]], there: dict[str, str]) -> list[str]:
    """Name the packages (``name==version``) that must travel.

    Args:
        packages: metadata of each package that pip would install, of its report.
        there: version of each package that the machine has.
    """
    from pip._vendor.packaging.requirements import Requirement

    packages = list(packages)
    wanted: dict[str, list[Any]] = {}
    for text in [*requirements(), *(line for p in packages for line in p.get("requires_dist", []))]:
        asked = Requirement(text)
        if asked.marker is None or asked.marker.evaluate({"extra": ""}):
            wanted.setdefault(normal(asked.name), []).append(asked.specifier)
    return [
        f"{p['name']}=={p['version']}"
        for p in packages
        if not STAYS.fullmatch(name := normal(p["name"]))
        and not (name in there and all(s.contains(there[name], prereleases=True) for s in wanted.get(name, [])))
    ]


def pip(*arguments: str) -> str:
    command = [sys.executable, "-m", "pip", *arguments, "--quiet", "--disable-pip-version-check"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(f"pip {arguments[0]} failed, as above; nothing has been changed")
    return done.stdout


def frozen(path: str) -> dict[str, str]:
    """Read what a machine has from a file."""
    try:
        found = versions(Path(path).read_text())
    except (OSError, UnicodeDecodeError) as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    if not found:
        raise argparse.ArgumentTypeError(f"{path} has no line name==version")
    return found


def collect(out: Path, there: dict[str, str]) -> None:
    kept = [f"{name}=={there[name]}" for name in ("jax", "jaxlib", "numpy") if name in there]
    with tempfile.TemporaryDirectory() as folder:
        constraints = Path(folder, "constraints.txt")
        constraints.write_text("\n".join(kept))
        resolved = ("install", "--dry-run", "--ignore-installed", "--only-binary=:all:", f"--constraint={constraints}")
        report = json.loads(pip(*resolved, "--report=-", *requirements()))
        names = to_bring((found["metadata"] for found in report["install"]), there)
        target = ("--python-version=3.12", "--implementation=cp", *(f"--platform={name}" for name in PLATFORMS))
        if names:
            pip("download", "--no-deps", "--only-binary=:all:", *target, f"--dest={folder}", *names)
        for old in out.glob("*.whl"):
            old.unlink()
        for new in Path(folder).glob("*.whl"):
            shutil.move(new, out)
    wheels = sorted(out.glob("*.whl"))
    print(f"{len(wheels)} wheels, {sum(w.stat().st_size for w in wheels) / 1e6:.0f} MB, in {out}")


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / ".wheels", help="folder for the wheels; %(default)s")
    parser.add_argument(
        "--there", type=frozen, default={}, help="what the machine has, as `pip list --format=freeze` prints it"
    )
    parser.add_argument("--missing", action="store_true", help="collect nothing; name what this machine lacks")
    given = parser.parse_args(arguments)
    if given.missing:
        if lacks := missing_here():
            sys.exit(f"missing: {', '.join(lacks)}")
        return
    if sys.version_info[:2] != (3, 12):
        parser.error(f"run this with Python 3.12, which the machine has, not {sys.version.split()[0]}")
    try:
        given.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--out: {error}")
    collect(given.out, given.there)


if __name__ == "__main__":
    main(sys.argv[1:])
