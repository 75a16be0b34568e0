"""Which wheels travel to a machine without a network, and what such a machine says that it lacks."""

from __future__ import annotations

import importlib.util
import sys

import pytest
from support.scripts import ROOT

spec = importlib.util.spec_from_file_location("collect_wheels", ROOT / "scripts" / "collect_wheels.py")
script = importlib.util.module_from_spec(spec)
spec.loader.exec_module(script)


def metadata(name: str, version: str, *needs: str) -> dict[str, object]:
    return {"name": name, "version": version, "requires_dist": list(needs)}


def test_what_the_machine_has_in_a_version_that_will_do_stays_behind():
    packages = [
        metadata("rich", "15.0.0", "Pygments>=2.19"),
        metadata("Pygments", "2.21.0"),
        metadata("jaxlib", "0.11.2"),
    ]
    there = script.versions("rich==14.0.0\npygments==2.0\n# a comment\nlocal @ file:///here\n")
    assert script.to_bring(packages, there) == ["Pygments==2.21.0"], (
        "rich will do, its needs will not, JAX never travels"
    )
    assert script.to_bring(packages, {}) == ["rich==15.0.0", "Pygments==2.21.0"]


def test_names_are_compared_as_pip_does():
    assert script.versions("Jinja2==3.1.6\ntyping_extensions==4.16.0") == {
        "jinja2": "3.1.6",
        "typing-extensions": "4.16.0",
    }


def test_a_machine_names_what_it_lacks(monkeypatch, capsys):
    monkeypatch.setattr(
        script, "requirements", lambda: ["pytest>=1", "pytest>=999", "nowhere-to-be-found", "x; python_version<'3'"]
    )
    with pytest.raises(SystemExit, match=r"pytest>=999 \(here: .*\), nowhere-to-be-found \(not installed\)$"):
        script.main(["--missing"])
    monkeypatch.setattr(script, "requirements", lambda: ["pytest>=1"])
    script.main(["--missing"])


def test_everything_that_serving_needs_is_asked_for():
    asked = script.requirements()
    assert any(line.startswith("jax-triton") for line in asked)
    assert any(line.startswith("flax") for line in asked)
    assert "pytest" in asked


@pytest.mark.skipif(sys.version_info[:2] == (3, 12), reason="this is the Python that the machine has")
def test_wheels_are_collected_with_the_machines_python(capsys):
    with pytest.raises(SystemExit):
        script.main([])
    assert "run this with Python 3.12" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "words"),
    [(None, "No such file"), (b"\xff\xfe\xc0", "codec"), (b"# nothing\n", "no line name==version")],
)
def test_what_a_machine_has_must_be_readable(tmp_path, capsys, content, words):
    path = tmp_path / "freeze.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(SystemExit):
        script.main([f"--there={path}"])
    assert words in capsys.readouterr().err


def test_without_an_index_the_wheels_of_before_stay(tmp_path, monkeypatch):
    old = tmp_path / "old.whl"
    old.touch()
    for name, value in {
        "INDEX_URL": "http://127.0.0.1:9",
        "EXTRA_INDEX_URL": "",
        "FIND_LINKS": "",
        "RETRIES": "0",
    }.items():
        monkeypatch.setenv(f"PIP_{name}", value)
    with pytest.raises(SystemExit, match="pip install failed, as above"):
        script.collect(tmp_path, {})
    assert old.exists()
