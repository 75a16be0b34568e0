"""The versions that CI installs."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from support.scripts import ROOT

LOCK = (ROOT / "requirements" / "ci.lock").read_text()
PINS = dict(line.split("==") for line in LOCK.splitlines() if not line.startswith("#"))
INSTALLED_BY_CI = ("dev", "demo", "parity", "tpu")


def test_everything_that_ci_installs_is_pinned_within_the_users_ranges():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    extras = project["project"]["optional-dependencies"]
    lines = [*project["project"]["dependencies"], *(line for extra in INSTALLED_BY_CI for line in extras[extra])]
    pins = {canonicalize_name(name): version for name, version in PINS.items()}
    for requirement in map(Requirement, lines):
        if requirement.marker is None or requirement.marker.evaluate({"python_version": "3.11"}):
            assert requirement.specifier.contains(pins[canonicalize_name(requirement.name)]), requirement


def test_the_lock_names_versions_and_nothing_else():
    assert "astraea-jax" not in PINS
    assert not any(character in LOCK.partition("\n")[2] for character in "/@+ ")


def test_a_report_becomes_pins():
    report = {
        "install": [
            {"is_direct": True, "metadata": {"name": "astraea-jax", "version": "9"}},
            {"is_direct": False, "metadata": {"name": "Torch", "version": "2.13.0+cpu"}},
            {"is_direct": False, "metadata": {"name": "absl-py", "version": "2.5.1"}},
        ]
    }
    command = [sys.executable, "scripts/lock.py"]
    done = subprocess.run(command, input=json.dumps(report), cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[1:] == ["absl-py==2.5.1", "torch==2.13.0"]
